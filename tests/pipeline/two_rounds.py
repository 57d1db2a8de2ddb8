"""A recipe of two small rounds, and what tests do with a finished run of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from rlhf.pipeline.run import run as run_recipe
from rlhf.recipe import Recipe, load_recipe

RECIPE = """
name: small
lab: {demonstrations: 300, pairs: 120, test_pairs: 60, hidden_size: 32, num_hidden_layers: 1}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 16, num_train_epochs: 1, logging_steps: 2}
vote: {members: 2, folds: 2}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, logging_steps: 2, objective: posterior, meta: true, meta_pool: 12}
ppo: {total_episodes: 32, per_device_train_batch_size: 8, num_ppo_epochs: 1, learning_rate: 1.0e-3, max_completion_length: 12,
      save_steps: 1, kl_target: 4.0, kl_horizon: 100}
rounds: {count: 2, prompts: 16, labels: 24, select: information, start: previous, age_weight: 0.5, stop_when_worse: false}
evaluate: {prompts: 24}
"""
ROUND_1 = ["sample", "vote", "reward", "ppo", "evaluate"]
ROUND_2 = ["sample", "select", "label", "vote", "reward", "ppo", "evaluate"]


def recipe(folder: Path, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    file.write_text(RECIPE)
    return load_recipe(file, list(overrides))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def again(two_rounds: Path, folder: Path, *, keep: tuple[str, ...] = ("round-0", "round-1")) -> Path:
    """A copy of a run from which later stages, and the recipe that asked for them, are gone."""
    run = folder / "x"
    for name in keep:
        shutil.copytree(two_rounds / "x" / name, run / name)
    return run


def start(made: Recipe, run: Path, **arguments: Any) -> list[str]:
    """Run with a recipe that differs in what comes after the copied stages."""
    said: list[str] = []
    (run / "recipe.yaml").unlink(missing_ok=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(made.resolved(), sort_keys=False))
    run_recipe(made, run, say=said.append, **arguments)
    return said
