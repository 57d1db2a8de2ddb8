"""Rankings and rated answers through the command: killed and gone on with, saved, certified, planned, and refused."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cost.sizes import Sizes
from rlhf.pipeline.estimate import training_elements
from rlhf.recipe.schema import RewardSection
from rlhf.reward.load import load_reward_model
from tests.command import Process, rlhf, wait_for
from tests.conftest import WORDS

RECIPE = """
name: small
backbone: {{model: {model}}}
data: {{preferences: rows.jsonl, test_fraction: 0.2}}
reward: {{objective: {objective}, learning_rate: 1.0e-3, per_device_train_batch_size: 4, num_train_epochs: 1, save_steps: 3,
          logging_steps: 1{more}}}
ppo: {{max_completion_length: 16}}
"""
PROMPTS = 60
ELEMENTS = {"plackett_luce": "rankings", "kwise": "rankings", "regression": "ratings"}
ATTRIBUTES = ", attributes: {helpfulness: 1.0, verbosity: -0.5}"


def answers(i: int) -> list[str]:
    return [" ".join(WORDS[(i + j * k) % 15] for j in range(1 + k)) for k in (1, 2, 3)]


def rows(objective: str) -> list[dict[str, Any]]:
    """Three answers to a prompt, ranked with a tie now and then; or two rows of one rated answer each, or only one."""
    made: list[dict[str, Any]] = []
    for i in range(PROMPTS):
        prompt, texts = f"list {WORDS[i % 15]} {WORDS[i // 15]}", answers(i)
        if objective == "regression":
            made += [
                {"prompt": prompt, "response": text, "helpfulness": (i + k) % 5, "verbosity": k if i % 3 else None}
                for k, text in enumerate(texts[: 1 + i % 2])
            ]
        else:
            scores = [2, 1, i % 2]
            responses = [{"content": text, "score": score} for text, score in zip(texts, scores, strict=True)]
            made.append({"prompt": prompt, "responses": responses})
    return made


def write(folder: Path, model: Path, objective: str, more: str = "") -> None:
    folder.mkdir(exist_ok=True)
    more = (ATTRIBUTES if objective == "regression" else "") + more
    (folder / "r.yaml").write_text(RECIPE.format(model=model, objective=objective, more=more), encoding="utf-8")
    text = "".join(json.dumps(row) + "\n" for row in rows(objective))
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("objective", ELEMENTS)
def test_killed_and_the_same_command_again(base_folder: Path, tmp_path: Path, objective: str) -> None:
    """Through, and killed after a checkpoint: the same weights bit for bit, and a model that scores the same in plain transformers."""
    # 1. Through, and killed.
    for name in ("through", "killed"):
        write(tmp_path / name, base_folder, objective)
    through = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path / "through")
    assert through.returncode == 0, through.stdout + through.stderr
    process = Process(("reward", "r.yaml", "--out", "x"), tmp_path / "killed")
    stage = tmp_path / "killed/x/round-1/reward"
    wait_for((stage / "checkpoints/checkpoint-3/complete.json").is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (stage / "manifest.json").exists(), "the kill came too late to mean anything"
    again = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path / "killed")
    assert again.returncode == 0, again.stderr
    assert "goes on from checkpoint-" in again.stdout + again.stderr
    models = [tmp_path / name / "x/round-1/reward/model" for name in ("through", "killed")]
    one, other = (load_file(model / "model.safetensors") for model in models)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)

    # 2. What it says it was trained on.
    facts = json.loads((models[0].parent / "manifest.json").read_text())["facts"]
    assert facts[ELEMENTS[objective]] > 40
    assert facts["accuracy"] is not None
    if objective != "regression":
        assert "rankings, by their answers: " in through.stdout + through.stderr
        assert facts["pairs"] > 2 * facts["rankings"]

    # 3. The saved model.
    plain: Any = AutoModelForSequenceClassification.from_pretrained(models[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    turns = [{"role": "user", "content": "list red"}, {"role": "assistant", "content": "blue cat"}]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
    assert plain.config.num_labels == 1
    score = load_reward_model(models[0]).score([turns[:1]], ["blue cat"]).item()
    with torch.no_grad():
        assert plain(input_ids=ids).logits.item() == pytest.approx(score, abs=1e-5)
    assert rlhf("certify", str(models[0]), cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("objective", ELEMENTS)
def test_it_is_checked_and_planned(base_folder: Path, tmp_path: Path, objective: str) -> None:
    write(tmp_path, base_folder, objective)
    checked = rlhf("check", "r.yaml", "--show", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert f"objective: {objective}" in checked.stdout
    planned = rlhf("plan", "r.yaml", "--until", "reward", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "round-1/reward" in planned.stdout
    pairs = ", margin_scale: 2.0, flip_rate: 0.1, meta: true, extra: simcse, group_weight: prompt"
    write(tmp_path, base_folder, objective, more=pairs)
    refused = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path)
    assert refused.returncode == 2
    assert not (tmp_path / "x").exists()
    assert "margin_scale is 2.0, which is not used" in refused.stderr


def test_what_pairs_have_and_rankings_have_not_is_refused(base_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, base_folder, "kwise", more=", flip_rate: 0.1, meta: true, extra: simcse, group_weight: prompt")
    refused = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path)
    assert refused.returncode == 2
    for key in ("flip_rate", "meta", "extra", "group_weight"):
        assert f"reward.{key}: it is for pairs, and kwise trains on rankings" in refused.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (", rating_scale: [0, 3]", "helpfulness is 4"),
        (", rating_scale: [3, 0]", "[3, 0] is no scale"),
        (", members: 2, use_peft: true, experts: weights", "regression trains on ratings"),
    ],
)
def test_bad_ratings_are_one_sentence(base_folder: Path, tmp_path: Path, more: str, sentence: str) -> None:
    write(tmp_path, base_folder, "regression", more=more)
    refused = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert sentence in refused.stderr
    assert not (tmp_path / "x/round-1").exists()


def test_ratings_without_pairs_train_and_are_tested_on_pairs_of_another_file(base_folder: Path, tmp_path: Path) -> None:
    """One answer a prompt: nothing to compare in training, and `data.test` says what is held out."""
    write(tmp_path, base_folder, "regression")
    alone = [row for i, row in enumerate(rows("regression")) if i % 3 == 0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone), encoding="utf-8")
    refused = rlhf("reward", "r.yaml", "--out", "untested", cwd=tmp_path)
    assert refused.returncode == 2
    assert "data: nothing is left for test_pairs" in refused.stderr
    pairs = [{"prompt": f"name {word}", "chosen": "yes", "rejected": "no"} for word in WORDS]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    result = rlhf("reward", "r.yaml", "--out", "x", "data.test=test.jsonl", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "x/round-1/reward/manifest.json").read_text())["facts"]
    assert facts["ratings"] == len(alone)
    assert facts["n"] == len(WORDS)
    assert not (tmp_path / "x/round-0/data/data/pairs.jsonl").exists()


def test_the_plan_counts_rankings_and_ratings() -> None:
    """100 pairs that make 20 rankings of 70 answers; labels of rounds are rankings of two; on a hub nothing is known of rankings."""
    rows = {"pairs": 100, "ratings": 30}
    sizes = Sizes(rows=rows, prompts=[], answers=[], demonstrations=[], rankings=20, ranked_answers=70)
    assert training_elements("bt", 100, sizes) == (100, 2.0)
    assert training_elements("plackett_luce", 100, sizes) == (20, 3.5)
    assert training_elements("kwise", 150, sizes) == (70, 3.5)
    assert training_elements("regression", 100, sizes) == (30, 1.0)
    unknown = Sizes(rows=rows, prompts=[], answers=[], demonstrations=[])
    assert training_elements("kwise", 100, unknown) == (100, 2.0)


def test_keys_of_other_objectives_know_nothing_of_ratings() -> None:
    """A finished run of an earlier version is not made again."""
    assert not {"attributes", "rating_scale"} & set(RewardSection().model_dump())
    assert RewardSection(objective="regression").ratings() == {
        "names": ("helpfulness", "correctness", "coherence", "complexity", "verbosity"), "low": 0.0, "high": 4.0
    }  # fmt: skip
