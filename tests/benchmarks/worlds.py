"""What the lab's benchmarks share: a world with its SFT model and pairs in true order, planted flips, one training run; planted
features, where training takes no time."""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from datasets import Dataset
from scipy.stats import t
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed
from trl import RewardConfig

from rlhf import PairRewardTrainer, PPOConfig, PPOTrainer, load_reward_model
from rlhf.lab.world import gold
from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.models.text import plain
from rlhf.reward.denoise import flip_pair
from rlhf.reward.model import RewardModel
from rlhf.reward.trainer import training_columns

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
FLIP_RATE = 0.25
# A world that is made in half a minute, and one to see whether something runs.
SMALL = {"pairs": 800, "test_pairs": 400, "demonstrations": 600, "hidden_size": 32, "num_hidden_layers": 2}
SMALL_QUICK = {"pairs": 150, "test_pairs": 60, "demonstrations": 200, "hidden_size": 32, "num_hidden_layers": 1}
Rows = list[Any]  # canonical rows, and columns that a benchmark adds


def world(out: Path, seed: int, **sizes: int | str) -> tuple[Path, Rows, Rows]:
    """The SFT model, and training and held-out pairs as the crowd labelled them; pairs of equal true reward are left out.

    Args:
        sizes: the lab's settings, such as pairs=6000.
    """
    command = [sys.executable, "-m", "rlhf", "sft", str(RECIPE), "--out", str(out), f"seed={seed}"]
    command += [f"lab.{name}={value}" for name, value in sizes.items()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    files = [out / "round-0/data/data" / f"{name}.jsonl" for name in ("pairs", "test_pairs")]
    pairs, test = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return out / "round-0/sft/model", decided(pairs), decided(test)


def true_differences(rows: Rows) -> list[float]:
    """True reward of the chosen answer minus that of the rejected one."""
    prompts = [plain(row["prompt"]) for row in rows]
    sides = [gold(prompts, [row[side][0]["content"] for row in rows]) for side in ("chosen", "rejected")]
    return [a - b for a, b in zip(*sides, strict=True)]


def decided(rows: Rows) -> Rows:
    """Pairs whose true rewards differ."""
    return [row for row, d in zip(rows, true_differences(rows), strict=True) if d != 0]


def in_true_order(rows: Rows) -> Rows:
    """The same pairs without a wrong label."""
    return [row if d > 0 else flip_pair(row) for row, d in zip(rows, true_differences(rows), strict=True)]


def planted(rows: Rows, seed: int, rate: float = FLIP_RATE) -> Rows:
    """Pairs in true order, of which a share, drawn at random, is turned round."""
    rng = random.Random(seed)
    return [flip_pair(row) if rng.random() < rate else row for row in in_true_order(rows)]


def is_wrong(rows: Rows) -> list[bool]:
    """Which labels contradict the true reward."""
    return [d < 0 for d in true_differences(rows)]


class Line(NamedTuple):
    """A world without text: a true reward that is linear in planted features, but for what they can't express.

    Attributes:
        right: [n, h] features of the better answer minus those of the other.
        wrong: [n] whether the label contradicts the true reward.
    """

    right: Tensor
    wrong: Tensor


def planted_line(seed: int, pairs: int, *, crowd: bool = False) -> Line:
    """Draw how many features there are, how unequal, how much they can't express, and whether 10 % or 25 % of labels are wrong.

    Args:
        crowd: labels are wrong on close pairs (Bradley-Terry in the true reward) and by a taste for one direction that all who
            label share, as strong as half of the true reward; in place of random ones.
    """
    rng = np.random.default_rng(seed)
    width, noise, rate = int(rng.choice([20, 60, 150])), rng.choice([0.0, 1.2]), rng.choice([0.1, 0.25])
    sizes = np.arange(1, width + 1) ** -rng.choice([0.0, 0.5, 1.0])
    features = rng.normal(size=(pairs, width)) * sizes / np.sqrt((sizes**2).mean())
    rewards = features @ rng.normal(size=width)
    rewards = 2 * rewards / rewards.std() + noise * rng.normal(size=len(rewards))
    right, wrong = torch.tensor(features * np.sign(rewards)[:, None]), torch.tensor(rng.random(pairs) < rate)
    if crowd:
        taste = features @ rng.normal(size=width)
        liked = rewards + taste / taste.std()
        first = rng.random(pairs) < 1 / (1 + np.exp(-liked))
        wrong = torch.tensor(first != (rewards > 0))
    return Line(right, wrong)


def fitted_line(features: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Weights [h] of a linear reward on differences of features [n, h], with a standard normal prior.

    Args:
        loss: of chosen and rejected rewards, [n] each.
    """
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=40, line_search_fn="strong_wolfe")
    zero = torch.zeros(len(features), dtype=torch.float64)

    def closure() -> Tensor:
        search.zero_grad()
        total: Tensor = loss(features @ weights, zero).sum() + 0.5 * weights.square().sum()
        total.backward()
        return total

    search.step(closure)
    return weights.detach()


def reward_settings(learning_rate: float, epochs: float) -> dict[str, Any]:
    """The quickstart's reward stage but for rate and epochs."""
    return {
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
    }


def fitted(
    base: Path,
    rows: Rows,
    *,
    learning_rate: float,
    epochs: float,
    seed: int,
    flip_rate: float = 0.0,
    batch_size: int = 32,
) -> RewardModel:
    """A reward model trained on some rows."""
    set_seed(seed)
    tokenizer = load_tokenizer(base, conversational=True)
    model: Any = build_reward_model(base, pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(
        "unused",
        **(reward_settings(learning_rate, epochs) | {"per_device_train_batch_size": batch_size}),
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = Dataset.from_list(training_columns(rows))
    trained = PairRewardTrainer(model, args, train_dataset=data, processing_class=tokenizer, flip_rate=flip_rate)
    trained.train()
    return RewardModel(trained.model.eval(), tokenizer, conversational=True)


def ppo_curve(world: Path, seed: int, rewards: Any, **settings: Any) -> list[tuple[float, float, float]]:
    """KL, true reward and raw score of every rollout of `ppo_log`."""
    rows = ppo_log(world, seed, rewards, **settings)
    return [(row["kl"], row["reward_gold"], row["reward_proxy"]) for row in rows]


def ppo_log(world: Path, seed: int, rewards: Any, **settings: Any) -> list[dict[str, float]]:
    """The log of every rollout of PPO from a world's SFT model, with the quickstart's settings.

    The critic starts as a copy of the world's own reward model whatever the rewards are, so that only those differ.

    Args:
        settings: in place of the quickstart's.
    """
    base = world / "round-0/sft/model"
    prompts = [json.loads(line) for line in (world / "round-0/data/data/prompts.jsonl").read_text().splitlines()]
    sft = (world / "round-0/data/data/sft.jsonl").read_text().splitlines()
    demonstrations = Dataset.from_list([json.loads(line) for line in sft])
    critic: Any = load_reward_model(world / "round-1/reward/model").model.requires_grad_(True)
    with tempfile.TemporaryDirectory() as work:
        args = PPOConfig(
            work, **{**yaml.safe_load(RECIPE.read_text())["ppo"], **settings}, seed=seed, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = PPOTrainer(
            AutoModelForCausalLM.from_pretrained(base),
            rewards,
            args,
            Dataset.from_list(prompts),
            processing_class=load_tokenizer(base, conversational=True),
            critic=critic,
            monitor_funcs={"gold": gold},
            ptx_dataset=demonstrations if args.reads_demonstrations else None,
        )
        trainer.train()
    return [row for row in trainer.state.log_history if "reward_gold" in row]


def differences(reward: RewardModel, rows: Rows) -> Tensor:
    """Score of the chosen answer minus that of the rejected one."""
    prompts = [row["prompt"] for row in rows]
    sides = [reward.score(prompts, [row[side][0]["content"] for row in rows]) for side in ("chosen", "rejected")]
    return sides[0] - sides[1]


def interval(values: list[float]) -> list[float]:
    """Mean and its 95 % interval by t over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return [mean, float("nan"), float("nan")]
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return [mean, mean - half, mean + half]
