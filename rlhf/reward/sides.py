"""What a reward model says of one side of labelled pairs: each answer behind its own conversation, ended or cut as it is."""

from collections.abc import Sequence

from torch import Tensor

from rlhf.data.rows import Messages, Pair, Side, answer, asked, has_ended
from rlhf.models.score import Scorer
from rlhf.reward.model import RewardModel


def side_texts(rows: Sequence[Pair], side: Side) -> tuple[list[Messages], list[str], list[bool]]:
    """Return what one side of each pair answers, its text, and whether it came to its end."""
    prompts, texts = [asked(row, side) for row in rows], [answer(row, side) for row in rows]
    return prompts, texts, [has_ended(row[side]) for row in rows]


def side_scores(reward: Scorer, rows: Sequence[Pair], side: Side) -> Tensor:
    """Return the raw score of one side of each pair, [n]."""
    prompts, texts, ended = side_texts(rows, side)
    return reward.score(prompts, texts, ended=ended)


def side_features(reward: RewardModel, rows: Sequence[Pair], side: Side) -> Tensor:
    """Return what the linear head reads of one side of each pair, [n, h]."""
    prompts, texts, ended = side_texts(rows, side)
    return reward.features(prompts, texts, ended=ended)
