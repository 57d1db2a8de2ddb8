"""What a stage function may look at, and the files that stages hand each other."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from rlhf.evaluation.gold import GoldFunction, load_gold
from rlhf.evaluation.pairs import ScoredPairs
from rlhf.files import read_jsonl
from rlhf.lab.world import gold as lab_gold
from rlhf.ppo.config import PPOConfig
from rlhf.recipe.schema import Recipe

STRENGTH, PAIRS, TEST_PAIRS = "strength.jsonl", "pairs.jsonl", "test_pairs.jsonl"


@dataclass
class StageContext:
    """What a stage function may look at.

    Attributes:
        folder: to write into.
        parents: role → folder of a finished stage.
        own: the stage's settings as they stand in its key.
        say: tell the person at the terminal.
        is_main: whether this process writes files (with several processes, one does).
    """

    recipe: Recipe
    folder: Path
    parents: dict[str, Path]
    say: Callable[[str], None]
    is_main: bool = True
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder.parents[1]

    @property
    def round(self) -> int:
        """In which round this stage is."""
        return int(self.folder.parent.name.rpartition("-")[2])

    @property
    def device(self) -> str:
        """Where models outside of trainers live."""
        on_cpu = self.settings("reward").get("use_cpu", not torch.cuda.is_available())
        return "cpu" if on_cpu else "cuda"

    @property
    def pairs(self) -> Path:
        """The preferences that this round trains on: those of all labels so far, or of the data."""
        return self.parents["label"] / PAIRS if "label" in self.parents else self.data / PAIRS

    @property
    def test_pairs(self) -> Path:
        """The preferences that this round is judged on: the data's, or, where it has none, labels that were held out."""
        given = self.data / TEST_PAIRS
        return given if given.is_file() else self.parents["label"] / TEST_PAIRS

    @property
    def data(self) -> Path:
        """Folder of the canonical data files."""
        return self.parents["data"] / "data"

    @property
    def sft_model(self) -> str | Path:
        """The policy that reward model and PPO start from: what SFT made, or the backbone where there is no SFT."""
        return self.parents["sft"] / "model" if "sft" in self.parents else base_model(self)

    def settings(self, section: str) -> dict[str, Any]:
        """TRL's keys of a stage, and the revision of the backbone, which is a setting of its own here."""
        recipe = self.recipe
        keys = recipe.vote_settings() if section == "vote" else getattr(recipe, section).trl_settings()
        revision = recipe.backbone.revision
        return keys if revision is None else {**keys, "model_revision": revision}

    @property
    def sampling(self) -> dict[str, Any]:
        """How answers are sampled outside PPO: lengths as in PPO, and twice a rollout at once (no backward pass follows)."""
        settings = self.recipe.ppo.trl_settings()
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
        lengths = ("max_completion_length", "max_prompt_length")
        batch_size = 2 * math.prod(settings.get(name, getattr(PPOConfig, name)) for name in sizes)
        answer, prompt = (settings.get(name, getattr(PPOConfig, name)) for name in lengths)
        return {"batch_size": batch_size, "max_new_tokens": answer, "max_prompt_length": prompt}

    def gold(self) -> GoldFunction | None:
        """The true reward, where there is one."""
        if self.recipe.evaluate.gold is not None:
            return load_gold(self.recipe.evaluate.gold)
        return lab_gold if self.recipe.lab is not None else None


def base_model(context: StageContext) -> str | Path:
    """The base model's folder if this run made it, else the recipe's hub id or folder."""
    for role in ("base", "lab"):
        if role in context.parents:
            return context.parents[role] / "model"
    assert context.recipe.backbone.model is not None, "the recipe's check wants a backbone, a lab or from_scratch"
    return context.recipe.backbone.model


def gold_differences(judged: ScoredPairs, gold: GoldFunction | None) -> list[float] | None:
    """True reward of each chosen answer minus that of the rejected one."""
    if gold is None:
        return None
    sides = [[row[side][0]["content"] for row in judged.rows] for side in ("chosen", "rejected")]
    return [a - b for a, b in zip(*(gold(judged.prompts, texts) for texts in sides), strict=True)]


def held_out(context: StageContext, file: Path) -> Dataset:
    """Rows for evaluation during training, as many as are judged at the end."""
    rows = read_jsonl(file)[: context.recipe.evaluate.prompts]
    kept = [{key: row[key] for key in ("prompt", "chosen", "rejected") if key in row} for row in rows]
    return Dataset.from_list(kept)
