"""Regression, then pairs: the first model is that of `objective: regression`, and the pairs go on from its very scores."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import tensor
from torch.nn.functional import softplus

from rlhf import load_reward_model
from rlhf.pipeline.first import FOR_PAIRS
from rlhf.recipe import load_recipe
from tests.command import rlhf
from tests.conftest import WORDS

RECIPE = """
name: small
backbone: {{model: {model}}}
data: {{preferences: rows.jsonl, test_fraction: 0.2}}
reward: {{{reward}, attributes: {{helpfulness: 1.0, verbosity: -0.5}}, learning_rate: 1.0e-3, per_device_train_batch_size: 200,
         num_train_epochs: 2, logging_steps: 1}}
ppo: {{max_completion_length: 8}}
"""


def write(folder: Path, model: Path, reward: str) -> None:
    folder.mkdir()
    (folder / "r.yaml").write_text(RECIPE.format(model=model, reward=reward), encoding="utf-8")
    rows = [
        {"prompt": f"list {word} {other}", "response": f"{text} {word}", "helpfulness": good, "verbosity": (i + j) % 5}
        for i, word in enumerate(WORDS[:8])
        for j, other in enumerate(WORDS[:5])
        for text, good in (("yes", 4), ("no", 1))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def losses(file: Path) -> list[float]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("peft", ["", ", use_peft: true, lora_r: 2"], ids=["full", "lora"])
def test_the_pairs_go_on_from_the_model_of_the_ratings(base_folder: Path, tmp_path: Path, peft: str) -> None:
    stages = {}
    for name, reward in (("regression", "objective: regression"), ("both", "ratings_first: true")):
        write(tmp_path / name, base_folder, reward + peft)
        done = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path / name)
        assert done.returncode == 0, done.stdout + done.stderr
        stages[name] = next((tmp_path / name / "x").glob("round-*/reward"))

    # 1. The first training is that of the objective alone, step by step.
    first = losses(stages["both"] / "first_metrics.jsonl")
    assert first == losses(stages["regression"] / "metrics.jsonl")

    # 2. The first step on pairs, all of them in one batch, has the Bradley-Terry loss of that model's scores.
    reward = load_reward_model(stages["regression"] / "model")
    data: list[Any] = [
        json.loads(line) for line in (tmp_path / "both/x/round-0/data/data/pairs.jsonl").read_text().splitlines()
    ]
    scores = [
        reward.score([row["prompt"] for row in data], [row[side][-1]["content"] for row in data])
        for side in ("chosen", "rejected")
    ]
    pair_losses = losses(stages["both"] / "metrics.jsonl")
    assert pair_losses[0] == pytest.approx(softplus(scores[1] - scores[0]).mean().item(), abs=1e-4)
    assert pair_losses[1] < pair_losses[0]
    assert tensor(scores[0] - scores[1]).std() > 0

    # 3. What was done is on record.
    facts = json.loads((stages["both"] / "manifest.json").read_text(encoding="utf-8"))["facts"]
    assert facts["pairs"] == len(data)
    assert facts["ratings"] == 2 * len(data)


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        ("objective: plackett_luce, ratings_first: true", "reward.ratings_first: it is for pairs"),
        ("ratings_first: true, members: 2", "reward.members: each of several models would start from the same first one"),
        ("ratings_first: true, extra: length", "reward.extra: length has a head or a first model of its own"),
        ("ratings_first: true, extra: critique", "reward.extra: critique has a head or a first model of its own"),
        ("ratings_first: true, rating_scale: [4, 0]", "reward.rating_scale: [4, 0] is no scale"),
        ("ratings_first: false", "reward.attributes is"),
    ],
)  # fmt: skip
def test_what_can_not_start_from_ratings_is_refused(
    base_folder: Path, tmp_path: Path, reward: str, sentence: str
) -> None:
    write(tmp_path / "x", base_folder, reward)
    done = rlhf("run", "r.yaml", "--out", "x", "--dry-run", cwd=tmp_path / "x")
    assert done.returncode == 2
    assert sentence in done.stderr


def test_centring_is_for_the_pairs(tmp_path: Path) -> None:
    """Ratings say where the scores lie: the first model's trainer refuses it, once SFT is paid for."""
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nlab: {}\nreward: {objective: bt, center_rewards_coefficient: 0.01}\n")
    reward = load_recipe(file).reward
    assert reward.trl_settings()["center_rewards_coefficient"] == 0.01
    first = reward.model_copy(update={"objective": "regression", **FOR_PAIRS})
    assert first.trl_settings()["center_rewards_coefficient"] is None
