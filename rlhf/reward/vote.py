"""Preference strength by voting: M reward models; those that were not trained on a pair vote on it."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import Prompt
from rlhf.errors import TrainingError, UserError

Train = Callable[[int, list[int], list[int]], Tensor]


@dataclass(frozen=True)
class VotePlan:
    """Which pairs each member trains on, and which it votes on.

    Attributes:
        folds: [n] fold of each pair; all pairs of a prompt are in one.
        left_out: member → the fold that it does not see, or None where all vote in-sample.
    """

    folds: list[int]
    left_out: list[int | None]

    def trains_on(self, member: int) -> list[int]:
        """List the pairs that a member is trained on."""
        return [i for i, fold in enumerate(self.folds) if fold != self.left_out[member]]

    def votes_on(self, member: int) -> list[int]:
        """List the pairs that a member votes on."""
        if self.left_out[member] is None:
            return list(range(len(self.folds)))
        return [i for i, fold in enumerate(self.folds) if fold == self.left_out[member]]


def plan_vote(prompts: Sequence[Prompt], *, members: int, folds: int, in_sample: bool, seed: int) -> VotePlan:
    """Deal pairs to folds, and folds to members: member m = 0…M-1 leaves out fold m modulo `folds`.

    So a pair gets M / folds votes, none of them of a member that was trained on its prompt; `in_sample` gives it all M.

    Args:
        prompts: [n] of each pair.

    Raises:
        UserError: one member out of fold, fewer members than folds, fewer pairs or prompts than members.
    """
    if in_sample:
        return VotePlan([0] * len(prompts), [None] * members)
    keys = conversation_keys(prompts)
    problems = []
    if members < 2:
        problems.append(
            f"vote.members is {members}: out-of-fold votes need two members or more (or set vote.in_sample)."
        )
    if members < folds:
        problems.append(f"vote: {members} members can't vote on {folds} folds; each fold needs one. Lower vote.folds.")
    if len(set(keys)) < max(members, folds):
        problems.append(f"vote: {len(prompts)} pairs of {len(set(keys))} prompts are too few for {members} members.")
    if problems:
        raise UserError(problems)
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())
    fold = {key: place % folds for place, key in enumerate(ranked)}  # equally many prompts in each
    return VotePlan([fold[key] for key in keys], [member % folds for member in range(members)])


def collect_votes(plan: VotePlan, train: Train) -> Tensor:
    """Train the members and collect their reward differences [M, n], not a number where a member has no vote.

    Args:
        train: (member, pairs to train on, pairs to vote on) → differences of that member on the latter.

    Raises:
        TrainingError: a member diverged.
    """
    differences = torch.full((len(plan.left_out), len(plan.folds)), math.nan)
    for member in range(len(plan.left_out)):
        voted = plan.votes_on(member)
        votes = train(member, plan.trains_on(member), voted)
        if not torch.isfinite(votes).all():
            raise TrainingError(
                f"vote: member {member} diverged (a difference that is not finite); lower learning_rate."
            )
        differences[member, voted] = votes
    return differences
