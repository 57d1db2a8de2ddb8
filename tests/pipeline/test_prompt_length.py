"""The stages cut prompts alike wherever they sample, count those that they cut and the texts that are scored cut, and say so."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rlhf.files import read_jsonl
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.reward import run_reward
from rlhf.pipeline.sampling import SAMPLES, run_sample, run_select, sampling_settings
from rlhf.pipeline.stages import run_evaluate, run_ppo
from rlhf.recipe.schema import Recipe
from tests.conftest import PROMPTS, WORDS

LONG = [{"role": "user", "content": " ".join(WORDS * 20)}]
RECIPE = Recipe(
    name="x",
    backbone={"model": "nowhere"},
    data={"preferences": "p.jsonl", "prompts": "q.jsonl"},
    reward={"num_train_epochs": 1, "per_device_train_batch_size": 4, "use_cpu": True},
    ppo={"max_completion_length": 100, "per_device_train_batch_size": 4, "total_episodes": 4, "use_cpu": True},
    rounds={"labels_from": "people"},
    evaluate={"prompts": 4},
)
SENTENCE = (
    ": 1 of the 4 prompts that were looked at are longer than the 28 tokens that are read of one (the longest has 5"
)


@pytest.fixture
def stage(base_folder: Path, reward_folder: Path, tmp_path: Path) -> Callable[..., tuple[StageContext, list[str]]]:
    """A function from a stage's name to what it is given, and to what it will say; one of four prompts is too long."""
    for parent, model in (("sft", base_folder), ("reward", reward_folder)):
        shutil.copytree(model, tmp_path / "round-0" / parent / "model")
    data = tmp_path / "round-0" / "data" / "data"
    data.mkdir(parents=True)
    (tmp_path / "round-0/sft/samples.jsonl").touch()
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in [LONG, *PROMPTS[:3]])
    for name in ("prompts", "test_prompts"):
        (data / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    sides = {"chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}]}
    for name, prompts in (("pairs", PROMPTS[:8]), ("test_pairs", [LONG, *PROMPTS[:3]])):
        pairs = "".join(json.dumps({"prompt": prompt, **sides}) + "\n" for prompt in prompts)
        (data / f"{name}.jsonl").write_text(pairs, encoding="utf-8")

    def start(name: str, **settings: Any) -> tuple[StageContext, list[str]]:
        lines: list[str] = []
        folder = tmp_path / "round-1" / name
        folder.mkdir(parents=True)
        parents = {role: tmp_path / "round-0" / role for role in ("data", "sft", "reward")}
        parents["sample"] = tmp_path / "round-1" / "sample"
        if name == "evaluate":
            parents["policy"] = parents["sft"]
        return StageContext(RECIPE, folder, parents, lines.append, settings=settings), lines

    return start


def test_samples_of_a_round(stage: Any) -> None:
    context, lines = stage("sample", prompts=4, responses=2)
    facts = run_sample(context)
    assert (facts["prompts"], facts["prompts_cut"], facts["samples"]) == (4, 1, 8)
    (line,) = lines
    assert line.startswith("sample" + SENTENCE)


def test_an_evaluation(stage: Any) -> None:
    context, lines = stage("evaluate")
    facts = run_evaluate(context)
    assert facts["prompts_cut"] == 1
    assert_told_of_cut_texts("evaluate: the reward model", facts, lines)
    assert len(read_jsonl(context.folder / "samples.jsonl")) == 4
    assert [line for line in lines if line.startswith("evaluate" + SENTENCE)]


def assert_told_of_cut_texts(who: str, facts: dict[str, Any], lines: list[str]) -> None:
    """The long prompt does not fit in the reward model's context with any answer."""
    sentence, *of_answers = facts["reward_cuts"]
    assert re.fullmatch(
        rf"{who}: \d+ texts are longer than 128 tokens and lost the beginning of their prompt\.", sentence
    )
    assert all("answers alone are longer than that" in line for line in of_answers), (
        "an untrained policy's, of rare bytes"
    )
    assert [line for line in lines if line in facts["reward_cuts"]] == facts["reward_cuts"]


def test_the_training_of_a_policy(stage: Any) -> None:
    context, lines = stage("ppo")
    assert_told_of_cut_texts("ppo: reward model 1", run_ppo(context), lines)


def test_pairs_that_a_round_selects(stage: Any) -> None:
    context, lines = stage("select", labels=2)
    sampled = context.parent("sample") / SAMPLES
    sampled.parent.mkdir()
    rows = [
        {"prompt": prompt, "completion": text, "ended": True} for prompt in (LONG, PROMPTS[0]) for text in ("yes", "no")
    ]
    sampled.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    facts = run_select(context)
    assert facts["questions"] == 2
    assert_told_of_cut_texts("select: the reward model", facts, lines)


def test_a_reward_model_on_held_out_pairs(stage: Any) -> None:
    context, lines = stage("reward")
    facts = run_reward(context)
    assert facts["prompts_cut"] == 1
    assert_told_of_cut_texts("reward: the reward model", facts, lines)
    assert [line for line in lines if line.startswith("reward, answers for the scale" + SENTENCE)]


def test_a_run_that_ends_before_ppo_need_not_name_the_length_of_an_answer(base_folder: Path) -> None:
    """The default, 256 tokens, leaves no room in 128; in a longer context it is what it is."""
    config = AutoConfig.from_pretrained(base_folder)
    unnamed = Recipe(name="x", backbone={"model": "nowhere"}, data={"preferences": "p.jsonl"})
    assert sampling_settings(unnamed, config)["max_new_tokens"] == 64
    assert sampling_settings(RECIPE, config)["max_new_tokens"] == 100
    config.max_position_embeddings = 257
    assert sampling_settings(unnamed, config)["max_new_tokens"] == 256
