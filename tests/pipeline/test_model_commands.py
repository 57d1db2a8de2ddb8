"""`rlhf evaluate` on every kind of data, models from elsewhere, trackers, cards."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback
from transformers.integrations import integration_utils
from trl import RewardConfig

from rlhf import load_reward_model
from rlhf.errors import UserError
from rlhf.evaluation.pairs import score_pairs
from rlhf.pipeline.evaluate import evaluate_models
from rlhf.pipeline.model_commands import score_stream
from rlhf.pipeline.trainers import StagePairRewardTrainer
from rlhf.pipeline.training import train
from rlhf.recipe import load_recipe
from rlhf.reward.score_jsonl import score_lines
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model


def write(path: Path, rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pair_file(tmp_path: Path) -> str:
    rows = [
        {"prompt": prompt, "chosen": f"yes {WORDS[i % 9]}", "rejected": f"no {WORDS[i % 5]}", "margin": 1 + i % 3}
        for i, prompt in enumerate(PROMPTS)
    ]
    return write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "Hi", "chosen": "same", "rejected": "same"}])


@pytest.fixture
def ranking_file(tmp_path: Path) -> str:
    rows = [
        {"prompt": p, "responses": [{"content": w, "score": s} for s, w in enumerate(WORDS[i % 5 : i % 5 + 4])]}
        for i, p in enumerate(PROMPTS[:12])
    ]
    return write(tmp_path / "ranked.jsonl", rows)


@pytest.mark.usefixtures("drawn")
def test_pairs_and_rankings_with_another_model_beside(
    reward_folder: Path, base_folder: Path, tokenizer: Any, pair_file: str, ranking_file: str, tmp_path: Path
) -> None:
    """JSON as promised, accuracy as recomputed from scores, and the comparison with a model that is itself: no difference."""
    said: list[str] = []
    out = tmp_path / "e.json"
    result = evaluate_models([str(reward_folder)] * 2, [pair_file, ranking_file], out, say=said.append)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    pairs, ranked = result["data"]["pairs"], result["data"]["ranked"]
    assert pairs["n"] == len(PROMPTS)
    assert "  1 left out: chosen and rejected are the same (row 37)" in said
    assert list(pairs["by"]["difficulty"]) == ["margin 1", "margin 2", "margin 3"]
    assert pairs["against"]["difference"] == 0
    assert pairs["against"]["p_value"] == 1
    reward = load_reward_model(reward_folder)
    right = 0
    for i, prompt in enumerate(PROMPTS):
        chosen, rejected = reward.score([prompt] * 2, [f"yes {WORDS[i % 9]}", f"no {WORDS[i % 5]}"]).tolist()
        right += chosen > rejected
    assert pairs["accuracy"] == pytest.approx(right / len(PROMPTS))
    assert ranked["n"] == 12 * 6, "every pair of four answers"
    assert ranked["rankings"]["best_of_k_by_chance"] == pytest.approx(1 / 4)
    assert [row["n"] for row in ranked["rankings"]["best_of_n"]] == [1, 2, 4]
    page = (tmp_path / "e.html").read_text()
    assert "best of K" in page
    assert page.count("<svg") >= 7
    with pytest.raises(UserError, match="two data sets have the same name"):
        evaluate_models([str(reward_folder)], [pair_file, pair_file], out, say=said.append)


def test_a_model_from_elsewhere_is_scored_but_not_vouched_for(
    reward_folder: Path, tmp_path: Path, base_folder: Path
) -> None:
    """Any one-label classifier: without our card there is no probe, and the run says so; no model at all is a sentence."""
    import shutil

    foreign = tmp_path / "foreign"
    shutil.copytree(reward_folder, foreign)
    (foreign / "reward_model.json").unlink()
    line = json.dumps({"prompt": PROMPTS[0], "response": "yes"})
    with pytest.warns(UserWarning, match="not checked against stored ones"):
        (theirs,) = score_stream(str(foreign), [line], print)
    (ours,) = score_stream(str(reward_folder), [line], print)
    assert theirs["score"] == ours["score"]
    with pytest.raises(UserError, match="no reward model there"):
        list(score_stream(str(tmp_path / "nothing"), [line], print))


def test_texts_that_are_too_long_are_named_beside_their_scores(
    reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row says it, and so does a sentence at the end; a mark of an earlier model, which read less, is taken off."""
    long = "word " * 5000
    rows: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0], "response": "yes", "cut": True},
        {"prompt": long, "response": "yes"},
        {"prompt": PROMPTS[0], "response": long},
        {"prompt": PROMPTS[0], "response": "no", "cut": "hair"},
    ]
    lines = [json.dumps(row) for row in rows]
    heard: list[str] = []
    scored = list(score_stream(str(reward_folder), lines, heard.append))
    assert [row.get("cut") for row in scored] == [None, True, True, "hair"]
    limit = load_reward_model(reward_folder).max_length
    assert (
        heard[0] == f"{reward_folder}: 2 texts are longer than {limit} tokens and lost the beginning of their prompt."
    )
    assert "1 answers alone are longer than that" in heard[1]
    assert len(heard) == 2
    reward = load_reward_model(reward_folder)
    score_rows = reward.score_rows

    def with_little_memory(rows: Any) -> Any:
        if len(rows) > 1:
            raise RuntimeError("out of memory")
        return score_rows(rows)

    monkeypatch.setattr(reward, "score_rows", with_little_memory)
    again = list(score_lines(reward, lines))
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in scored], abs=1e-5)
    assert (reward.cut, reward.cut_answers) == (2, 1), "those of a batch that is tried again count once"
    assert list(score_stream(str(reward_folder), lines[3:], heard.append))
    assert len(heard) == 2, "nothing is said where nothing was cut"


class Tracker(TrainerCallback):
    """Stands in for wandb or trackio: keeps what it is told."""

    rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append({"step": state.global_step, "run": args.run_name, **(logs or {})})


def test_trackers_get_every_number(
    base_folder: Path,
    tokenizer: Any,
    pairs: Dataset,
    cpu_arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Tracker)
    arguments = {**cpu_arguments, "report_to": "mlflow", "logging_steps": 1, "num_train_epochs": 1}
    model = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id)
    trainer = StagePairRewardTrainer(model, RewardConfig(**arguments), train_dataset=pairs, processing_class=tokenizer)
    train(trainer, tmp_path, label="reward", say=lambda _: None)
    on_disk = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in Tracker.rows if "loss" in row]
    assert [row["loss"] for row in told] == [row["loss"] for row in on_disk]
    assert {"accuracy", "margin", "grad_norm"} <= set(told[0])


def test_an_encoder_makes_a_reward_model_and_no_policy(encoder_folder: Path, pair_file: str, tmp_path: Path) -> None:
    from rlhf.pipeline.run import run

    file = tmp_path / "r.yaml"
    file.write_text(
        f"name: enc\nbackbone: {{model: {encoder_folder}}}\ndata: {{preferences: {pair_file}, test_fraction: 0.3}}\n"
        "reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 8, max_length: 512}\n"
    )
    recipe = load_recipe(file)
    with pytest.raises(UserError, match=r"is an encoder \(bert\), which cannot generate"):
        run(recipe, tmp_path / "x", say=lambda _: None)
    assert not (tmp_path / "x").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(recipe, tmp_path / "x", until="reward", say=lambda _: None)
    facts = json.loads((tmp_path / "x/round-1/reward/manifest.json").read_text())["facts"]
    reward = load_reward_model(tmp_path / "x/round-1/reward/model")
    rows = [json.loads(line) for line in (tmp_path / "x/round-0/data/data/test_pairs.jsonl").read_text().splitlines()]
    assert score_pairs(reward, rows).right.mean() == facts["accuracy"]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "x/round-1/reward/model")
    assert plain.config.problem_type == "regression"
    card = (tmp_path / "x/round-1/reward/model/README.md").read_text()
    assert f"| accuracy | {facts['accuracy']:.3f}" in card
    assert "base_model:" in card
    page = (tmp_path / "x/report.html").read_text()
    assert "No policy has been judged in this run" in page
    assert "Accuracy by length difference" in page
