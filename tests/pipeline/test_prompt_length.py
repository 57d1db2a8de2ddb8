"""The stages that sample outside PPO cut prompts as PPO does, count those that they cut, and say so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rlhf.files import read_jsonl
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.sampling import run_sample, sampling_settings
from rlhf.pipeline.stages import run_evaluate
from rlhf.recipe.schema import Recipe
from tests.conftest import PROMPTS, WORDS

LONG = [{"role": "user", "content": " ".join(WORDS * 20)}]
RECIPE = Recipe(
    name="x",
    backbone={"model": "nowhere"},
    data={"preferences": "p.jsonl", "prompts": "q.jsonl"},
    ppo={"max_completion_length": 100, "per_device_train_batch_size": 4, "use_cpu": True},
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

    def start(name: str, **settings: Any) -> tuple[StageContext, list[str]]:
        folder, lines = tmp_path / "round-1" / name, []
        folder.mkdir(parents=True)
        parents = {role: tmp_path / "round-0" / role for role in ("data", "sft", "reward")}
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
    assert len(read_jsonl(context.folder / "samples.jsonl")) == 4
    assert [line for line in lines if line.startswith("evaluate" + SENTENCE)]


def test_a_run_that_ends_before_ppo_need_not_name_the_length_of_an_answer(base_folder: Path) -> None:
    """The default, 256 tokens, leaves no room in 128; in a longer context it is what it is."""
    config = AutoConfig.from_pretrained(base_folder)
    unnamed = Recipe(name="x", backbone={"model": "nowhere"}, data={"preferences": "p.jsonl"})
    assert sampling_settings(unnamed, config)["max_new_tokens"] == 64
    assert sampling_settings(RECIPE, config)["max_new_tokens"] == 100
    config.max_position_embeddings = 257
    assert sampling_settings(unnamed, config)["max_new_tokens"] == 256
