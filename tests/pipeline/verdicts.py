"""Pairs, votes that agree with their labels, and what experts said of them."""

import math
from typing import Any

import torch
from torch import Tensor

from rlhf.data.rows import Pair, assistant_turn, user_turn
from rlhf.pipeline.looked import Looked

ERROR = 0.05
ODDS = math.log((1 - ERROR) / ERROR)


def pair(number: int, answer: str = "yes") -> Pair:
    sides = {side: assistant_turn(f"{text} {number}") for side, text in (("yes", answer), ("no", "no"))}
    made: Any = {"prompt": user_turn(f"q {number}"), "chosen": sides["yes"], "rejected": sides["no"]}
    return made


def looked(agree: list[int], contradict: list[int], *, equal: list[int] | None = None, repeats: int = 0) -> Looked:
    """Verdicts on rows, of which the last are further labels of the first pairs."""
    n = len(agree)
    counts = [torch.tensor(column, dtype=torch.float) for column in (agree, contradict, equal or [0] * n)]
    is_first = torch.arange(n) < n - repeats
    is_asked = torch.stack(counts).sum(dim=0) > 0
    return Looked(*counts, is_asked, is_first, [], int((is_asked & is_first).sum()), 0, 1)


def agreeing(n: int, seed: int = 0) -> Tensor:
    """Votes that agree with every label."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 3 + 0.2
