"""Several reward models of the same pairs, judged as one: PPO combines them by `reward_ensemble`, everybody else by their mean."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf.data.rows import Prompt
from rlhf.reward.load import RewardModel, load_reward_model


def member_name(number: int) -> str:
    """The folder of a member beside the others; the first is where a single reward model is, and stands for them all where only
    one can be used."""
    return "model" if number == 0 else f"member-{number}"


def member_folders(stage: Path) -> list[Path]:
    """The folders of a reward stage's models, the first one first."""
    folders, number = [stage / member_name(0)], 1
    while (stage / member_name(number)).is_dir():
        folders.append(stage / member_name(number))
        number += 1
    return folders


class RewardEnsemble:
    """The mean of several reward models, each counted from its own mean on SFT samples; differences stay in nats.

    Attributes:
        members: the models.
    """

    def __init__(self, members: Sequence[RewardModel]):
        self.members = list(members)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """(1/M) Σ_m (r_m(x, y) - mean_m), [n], float32 on the CPU, in the order given."""
        scores = [member.score(prompts, responses, ended=ended) - member.mean for member in self.members]
        return torch.stack(scores).mean(dim=0)


def load_scorer_of(stage: Path, *, device: str | None = None) -> RewardModel | RewardEnsemble:
    """What a reward stage made: its model, or all members as one.

    Raises:
        UserError: as `load_reward_model`.
    """
    members = [load_reward_model(folder, device=device) for folder in member_folders(stage)]
    return members[0] if len(members) == 1 else RewardEnsemble(members)
