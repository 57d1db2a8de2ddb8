"""Every member of the reward-model family through all that a reward model is for: killed, certified, served, exported, used.

A member is what trains in its own way: one objective of the table for each loss, and one extra term of each kind. What other
objectives do is done to the pairs, before any training.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf import PPOConfig, PPOTrainer
from rlhf.errors import UserError
from rlhf.models.load import load_policy, load_tokenizer, model_settings
from rlhf.pipeline.certificates import certify_model, verify_target
from rlhf.pipeline.evaluate import evaluate_models
from rlhf.pipeline.model_commands import export_model
from rlhf.recipe.objectives import EXTRAS, OBJECTIVES
from rlhf.reward.load import CARD, load_reward_model
from rlhf.serve.reward import reward_app
from tests.command import Process, rlhf, wait_for
from tests.conftest import PROMPTS, WORDS
from tests.reward.test_gated import plain_scores
from tests.serve.test_reward import running

RECIPE = """
name: small
backbone: {{model: {model}}}
data: {{preferences: rows.jsonl, test_fraction: 0.2}}
reward: {{{member}, learning_rate: 1.0e-3, per_device_train_batch_size: 4, num_train_epochs: 1, save_steps: 3, logging_steps: 1}}
ppo: {{max_completion_length: 16}}
"""
ATTRIBUTES = ", attributes: {helpfulness: 1.0, verbosity: -0.5}"
CRITIQUE = ", critique_tokens: 6"


def members() -> dict[str, str]:
    """What a recipe says of each member, by its name: the first objective of every loss, the first term of every kind."""
    by_loss = {(x.loss.function, x.needs.pairs): x for x in reversed(OBJECTIVES.values())}
    by_kind = {extra.kind: extra for extra in reversed(EXTRAS.values())}
    said = {x.name: f"objective: {x.name}" + (ATTRIBUTES if x.needs.ratings else "") for x in by_loss.values()}
    return said | {x.name: f"extra: {x.name}" + CRITIQUE * (x.kind == "critique") for x in by_kind.values()}


def elements(member: str) -> str:
    return OBJECTIVES[member].loss.elements if member in OBJECTIVES else "pairs"


def rows(member: str) -> list[dict[str, Any]]:
    """Three answers to a prompt, ranked with a tie now and then; or two rows of one rated answer each, or only one.

    Of rated answers there are pairs too: a prompt's two differ in helpfulness.
    """
    made: list[dict[str, Any]] = []
    for i in range(60):
        prompt = f"list {WORDS[i % 15]} {WORDS[i // 15]}"
        texts = [" ".join(WORDS[(i + j * k) % 15] for j in range(1 + k)) for k in (1, 2, 3)]
        if elements(member) == "ratings":
            made += [
                {"prompt": prompt, "response": text, "helpfulness": (i + k) % 5, "verbosity": k if i % 3 else None}
                for k, text in enumerate(texts[: 1 + i % 2])
            ]
        else:
            scores = [2, 1, i % 2]
            responses = [{"content": text, "score": score} for text, score in zip(texts, scores, strict=True)]
            made.append({"prompt": prompt, "responses": responses if elements(member) == "rankings" else responses[:2]})
        if member == "critique":
            words = {
                f"critique_{side}": f"{word} {WORDS[i % 9]}" for side, word in (("chosen", "yes"), ("rejected", "no"))
            }
            made[-1] = {"prompt": prompt, "chosen": texts[0], "rejected": texts[1], **words}
    return made


def write(folder: Path, model: Path, member: str, more: str = "") -> None:
    folder.mkdir(exist_ok=True)
    recipe = RECIPE.format(model=model, member=members()[member] + more)
    (folder / "r.yaml").write_text(recipe, encoding="utf-8")
    text = "".join(json.dumps(row) + "\n" for row in rows(member))
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def test_every_row_of_the_tables_is_a_member_or_trains_as_one() -> None:
    assert {OBJECTIVES[name].loss.function for name in members() if name in OBJECTIVES} == {
        objective.loss.function for objective in OBJECTIVES.values()
    }
    assert {EXTRAS[name].kind for name in members() if name in EXTRAS} == {extra.kind for extra in EXTRAS.values()}
    assert list(members()) == [
        *("gated", "regression", "kwise", "plackett_luce", "bt", "critique", "bottleneck", "length", "text", "simcse")
    ]


@pytest.mark.parametrize("member", members())
def test_a_member_is_a_reward_model_like_any_other(
    base_folder: Path, tmp_path: Path, cpu_arguments: dict[str, Any], member: str
) -> None:
    # 1. Through, and killed after a checkpoint and gone on with: the same weights bit for bit.
    for name in ("through", "killed"):
        write(tmp_path / name, base_folder, member)
    through = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path / "through")
    assert through.returncode == 0, through.stdout + through.stderr
    stage = tmp_path / "killed/x/round-1/reward"
    marks = ["checkpoint-3"] if member != "critique" else ["critic/model", "checkpoint-3"]
    for mark in marks:
        process = Process(("reward", "r.yaml", "--out", "x"), tmp_path / "killed")
        wait_for((stage / "checkpoints" / mark / "complete.json").is_file, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (stage / "manifest.json").exists(), "the kill came too late to mean anything"
    again = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path / "killed")
    assert again.returncode == 0, again.stderr
    assert "goes on from checkpoint-" in again.stdout + again.stderr
    model, other = (tmp_path / name / "x/round-1/reward/model" for name in ("through", "killed"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (model, other))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    # 2. What it says it was trained on.
    facts = json.loads((model.parent / "manifest.json").read_text())["facts"]
    assert facts[elements(member)] > 40
    assert facts["accuracy"] is not None
    if elements(member) == "rankings":
        assert "rankings, by their answers: " in through.stdout + through.stderr
        assert facts["pairs"] > 2 * facts["rankings"]

    # 3. One label in plain transformers, the same score; of attributes under a gate, what its files say they are; behind a
    #    critique, where the folder's causal model writes one.
    plain: Any = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": "list red"}, {"role": "assistant", "content": "blue cat"}]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
    is_gated = member == "gated"
    assert plain.config.num_labels == (2 if is_gated else 1)
    if member == "critique":
        asked_for = json.loads((model / CARD).read_text())["critiques"]["request"]
        texts = tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": asked_for}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        writer: Any = AutoModelForCausalLM.from_pretrained(model).eval()
        ids = writer.generate(
            texts["input_ids"],
            attention_mask=texts["attention_mask"],
            do_sample=False,
            max_new_tokens=6,
            pad_token_id=tokenizer.pad_token_id,
        )
    reward = load_reward_model(model)
    expected = plain_scores(model, [turns[:1]], ["blue cat"]) if is_gated else plain(input_ids=ids).logits[0].tolist()
    assert expected == pytest.approx(reward.score([turns[:1]], ["blue cat"]).tolist(), abs=1e-5)

    # 4. Certified, exported where one checkpoint can hold it, and served: each says what the model says.
    certify_model(str(model), None)
    if is_gated:
        with pytest.raises(UserError, match="a gate that reads the prompt weighs its attributes"):
            export_model(model, tmp_path / "exported")
    else:
        export_model(model, tmp_path / "exported")
    asked: dict[str, Any] = {
        "kind": None,
        "token": None,
        "model": None,
        "dtype": None,
        "timeout": 30.0,
        "say": lambda _: None,
    }
    with running(reward_app(reward, "member")) as url:
        for target in (url,) if is_gated else (str(tmp_path / "exported"), url):
            verdict = verify_target(target, against=str(model), **asked)
            assert verdict["held"], verdict["faults"]

    # 5. Evaluated on pairs that it has not seen.
    pairs = [{"prompt": f"name {word}", "chosen": f"yes {word}", "rejected": "no"} for word in WORDS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    result = evaluate_models([str(model)], [str(tmp_path / "pairs.jsonl")], tmp_path / "e.json", say=lambda _: None)
    asks = [[{"role": "user", "content": row["prompt"]}] for row in pairs]
    chosen, rejected = (reward.score(asks, [row[side] for row in pairs]) for side in ("chosen", "rejected"))
    assert result["data"]["pairs"]["accuracy"] == pytest.approx((chosen > rejected).double().mean().item())

    # 6. PPO is rewarded by it.
    args = PPOConfig(
        **cpu_arguments,
        total_episodes=8,
        per_device_train_batch_size=8,
        num_ppo_epochs=1,
        max_completion_length=4,
        logging_steps=1,
    )
    policy = load_policy(base_folder, model_settings({}))
    prompts = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:8]])
    trainer = PPOTrainer(
        policy, str(model), args, prompts, processing_class=load_tokenizer(base_folder, conversational=True)
    )
    trainer.train()
    assert next(row for row in trainer.state.log_history if "reward_proxy" in row)["episodes"] == 8


def test_what_a_term_can_not_do_is_refused_before_anything_is_made(
    base_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    for model, more, sentence in (
        (base_folder, ", meta: true", "reward.meta: MetaRM goes with the contrastive terms, and extra is text"),
        (encoder_folder, "", "is an encoder, which writes no text; leave reward.extra: text out."),
    ):
        write(tmp_path, model, "text", more)
        refused = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path)
        assert refused.returncode == 2
        assert sentence in refused.stderr
        assert not (tmp_path / "x").exists()
