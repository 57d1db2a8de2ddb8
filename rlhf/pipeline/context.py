"""What a stage function is given: recipe and settings, a folder to write into, and the folders of the stages before."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf.pipeline.precision import precision_of_stage
from rlhf.pipeline.stage_table import STAGES
from rlhf.pipeline.store import CHECKPOINTS
from rlhf.recipe.schema import Recipe

PAIRS, TEST_PAIRS, RATINGS = "pairs.jsonl", "test_pairs.jsonl", "ratings.jsonl"
Section = Literal["sft", "vote", "reward", "ppo"]


@dataclass(frozen=True)
class StageContext:
    """What a stage function may look at.

    Attributes:
        recipe: the whole recipe.
        folder: to write into, RUN/round-N/STAGE.
        parents: role → folder of a finished stage; read them by `parent` and `find_parent`.
        say: tell the person at the terminal.
        is_main: whether this process writes files (with several processes, one does).
        settings: the stage's settings as they stand in its key.
    """

    recipe: Recipe
    folder: Path
    parents: Mapping[str, Path]
    say: Callable[[str], None]
    is_main: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def parent(self, role: str) -> Path:
        """Return the folder of a parent.

        Raises:
            LookupError: the plan gives this stage no such parent, or the table of stages does not declare that it reads one.
        """
        folder = self.find_parent(role)
        if folder is None:
            raise LookupError(f"{self.folder}: the plan gives this stage no parent {role!r}.")
        return folder

    def find_parent(self, role: str) -> Path | None:
        """Return the folder of a parent that only some plans give, or None.

        Raises:
            LookupError: the table of stages does not declare that this stage reads such a parent.
        """
        stage = self.folder.name
        if role not in (*STAGES[stage].reads, *STAGES[stage].may_read):
            raise LookupError(f"rlhf.pipeline.stage_table does not declare that {stage} reads a parent {role!r}.")
        return self.parents.get(role)

    @property
    def run(self) -> Path:
        """Return the run's folder."""
        return self.folder.parents[1]

    @property
    def round(self) -> int:
        """Return the number of the round that this stage is in, 0 before the first."""
        return int(self.folder.parent.name.rpartition("-")[2])

    @property
    def data(self) -> Path:
        """Return the folder of the canonical data files."""
        return self.parent("data") / "data"

    @property
    def pairs(self) -> Path:
        """Return the file of the preferences that this round trains on: all labels so far, or those of the data.

        Where a round looks again at some of them, its second look takes the place of its labels.
        """
        label = self.find_parent("label")
        return (self.data if label is None else label) / PAIRS

    @property
    def ratings(self) -> Path:
        """Return the file of the rated answers, which there is where the objective needs them."""
        return self.data / RATINGS

    @property
    def test_pairs(self) -> Path:
        """Return the file of the held-out preferences: the data's, or, where it has none, labels that were held out."""
        of_data = self.data / TEST_PAIRS
        return of_data if of_data.is_file() else self.parent("label") / TEST_PAIRS

    @property
    def sft_model(self) -> str | Path:
        """Return the policy that reward model and PPO start from: what SFT made, or the backbone where there is no SFT."""
        made = self.find_parent("sft") or self.find_parent("base")  # base: the backbone was a GGUF file
        return backbone_model(self.recipe) if made is None else made / "model"

    @property
    def start_name(self) -> str:
        """Return what people call the policy that reward model and PPO start from."""
        return "the backbone" if self.find_parent("sft") is None else "SFT"

    @property
    def device(self) -> str:
        """Return where models outside of trainers live."""
        on_cpu = self.trl_settings("reward").get("use_cpu", not torch.cuda.is_available())
        return "cpu" if on_cpu else "cuda"

    def trl_settings(self, section: Section) -> dict[str, Any]:
        """Return TRL's keys of a section, and the revision of the backbone, which is a setting of its own in a recipe."""
        recipe = self.recipe
        keys = recipe.vote_settings() if section == "vote" else getattr(recipe, section).trl_settings()
        revision = recipe.backbone.revision
        return keys if revision is None else {**keys, "model_revision": revision}

    def training_settings(self, section: Section) -> dict[str, Any]:
        """Return TRL's keys of a section for what this stage trains: in the precision that it began in."""
        keys = self.trl_settings(section)
        if section == "vote" and self.recipe.vote.trunk is not None:
            return keys  # float32, whatever they say
        return precision_of_stage(keys, self.folder / CHECKPOINTS, decides=self.is_main)


def backbone_model(recipe: Recipe) -> str:
    """Return the hub id or folder that a recipe names as its backbone."""
    model = recipe.backbone.model
    assert model is not None, "the recipe's check wants a backbone, a lab or from_scratch"
    return model
