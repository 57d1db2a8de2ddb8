"""Several reward models of the same pairs as one: PPO combines them by `reward_ensemble`, everybody else by their mean."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf.data.rows import Prompt
from rlhf.reward.load import load_reward_model
from rlhf.reward.model import RewardModel


def member_name(number: int) -> str:
    """Return the name of a member's folder.

    The first member lies where a single reward model would, and stands for all where only one can be used.

    >>> member_name(0), member_name(1)
    ('model', 'member-1')
    """
    return "model" if number == 0 else f"member-{number}"


def member_folders(stage: Path) -> list[Path]:
    """Return the folders of a reward stage's models, the first one first."""
    folders, number = [stage / member_name(0)], 1
    while (stage / member_name(number)).is_dir():
        folders.append(stage / member_name(number))
        number += 1
    return folders


class RewardEnsemble:
    """The mean of several reward models, each counted from its own mean on SFT samples; differences stay in nats.

    Attributes:
        members: the models; each knows its mean.
    """

    def __init__(self, members: Sequence[RewardModel]):
        self.members = list(members)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Return (1/M) Σ_m (r_m(x, y) - mean_m), [n], float32 on the CPU, in the order given."""
        scores = [member.score(prompts, responses, ended=ended) - member.mean for member in self.members]
        return torch.stack(scores).mean(dim=0)

    def cuts(self, name: str) -> list[str]:
        """Return a sentence for each way in which texts were too long for a member.

        Args:
            name: of the ensemble, for the sentences.
        """
        return [
            sentence
            for number, member in enumerate(self.members)
            for sentence in member.cuts(f"{name} ({member_name(number)})")
        ]


def load_scorer_of(stage: Path, *, device: str | None = None) -> RewardModel | RewardEnsemble:
    """Load the reward model of a reward stage, or all of its members as one.

    Raises:
        UserError: as `load_reward_model`.
    """
    members = [load_reward_model(folder, device=device) for folder in member_folders(stage)]
    return members[0] if len(members) == 1 else RewardEnsemble(members)
