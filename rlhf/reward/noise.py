"""How many labels are wrong, from out-of-fold votes; and what is done about it: the named corrections."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.data.sources import pair_digest
from rlhf.errors import UserError
from rlhf.evaluation.statistics import best_temperature, clustered_mean
from rlhf.objectives.strength import (
    VoteStrength,
    flipped_strength,
    lowest_fraction,
    posterior_confidence,
    smoothing_confidence,
)

RATES, SCALES = 100, 61
CHI_SQUARE_95 = 3.841
FLIP_FRACTION, SMOOTHING = 0.1, 0.2


@dataclass(frozen=True)
class NoiseEstimate:
    """Share of wrong labels, and how much a vote is worth.

    Attributes:
        flip_rate: ε, by confident learning.
        scale: b, so that σ(b d) is how often a vote of d has the true order.
        low: what the sure votes alone prove: the lower end of ε's likelihood interval.
        high: the upper end of the share of contradicted labels, as if every contradiction were the label's fault.
    """

    flip_rate: float
    scale: float
    low: float
    high: float


def estimate_noise(differences: Tensor, clusters: Sequence[Hashable]) -> NoiseEstimate:
    """How many labels are wrong, as far as out-of-fold votes can tell.

    A vote contradicts a label because the label is wrong or because the vote is, and votes alone cannot say which, so
    `low` and `high` are bounds for both readings and not just for chance:

    - `low`: if a pair's true order is "chosen is better" with probability σ(b d), it has this label with probability
      (1 - ε) σ(b d) + ε σ(-b d): far from 0, where votes are sure, contradictions are ε. Profile likelihood on a grid,
      95 % (χ² of one degree); it misses noise that sits where votes are unsure. `scale` is the b of that fit.
    - `flip_rate`: confident learning (Northcutt et al., arXiv:1911.00068): among pairs on which the vote is at least as
      sure as it is of an average label, the share that it contradicts.
    - `high`: the share of all labels contradicted, upper end of its 95 % bootstrap.

    Pairs of one prompt are not independent, so prompts are what is counted and resampled. Votes that agree with labels
    no more than chance say nothing: then ε is 0 and the scale 0, which leaves every label as it is, and a warning.

    Args:
        differences: [n] mean difference of models that did not see the label.
    """
    contradicted = ((differences < 0).double() + 0.5 * (differences == 0).double()).tolist()
    high = clustered_mean(contradicted, clusters)[1][1]
    temperature = best_temperature(differences.tolist())
    if temperature is None:
        warnings.warn(
            "vote: the votes agree with the labels no more than chance, so they say nothing about them; every label is left "
            "as it is. Use a larger base model, more pairs, or another learning rate.",
            stacklevel=2,
        )
        return NoiseEstimate(0.0, 0.0, 0.0, high)
    agree = torch.sigmoid(differences.double() / temperature)
    average = agree.mean()
    against, with_it = int((1 - agree >= average).sum()), int((agree >= average).sum())
    low, scale = _fitted(differences, clusters)
    return NoiseEstimate(against / (against + with_it), scale, low, high)


def _fitted(differences: Tensor, clusters: Sequence[Hashable]) -> tuple[float, float]:
    """Smallest ε whose profile likelihood is within 1.92 of the best, and the b of the best fit."""
    values = differences.double()
    spread = values.abs().mean().clamp(min=1e-12)
    rates = torch.linspace(0.0, 0.495, RATES, dtype=torch.float64)
    table = torch.empty(SCALES, RATES, dtype=torch.float64)
    scales = torch.logspace(-1.5, 2, SCALES, dtype=torch.float64) / spread
    for i, scale in enumerate(scales):
        sure = torch.sigmoid(scale * values).clamp(1e-12, 1 - 1e-12)
        table[i] = torch.stack([((1 - 2 * rate) * sure + rate).log().mean() for rate in rates])
    profile = table.max(dim=0).values * len(set(clusters))
    best = scales[table.max(dim=1).values.argmax()].item()
    return rates[profile >= profile.max() - CHI_SQUARE_95 / 2].min().item(), best


def corrected(
    rows: list[dict[str, Any]], strength: VoteStrength, objective: str, *, noise: NoiseEstimate
) -> tuple[list[dict[str, Any]], int]:
    """Pairs as an objective trains on them, with the columns `margin` and `confidence` that it asks for.

    The paper's four are `flip` (the lowest tenth turned round), `adaptive_margin` (μ inside the sigmoid),
    `flip_margin` (both: a turned pair's margin changes sign with it) and `soft_margin` (smoothing where μ < 0, margin
    everywhere). `vote_soft` takes the share of votes as the label, `posterior` the probability by Bayes, `drop` leaves
    the lowest tenth out.

    Returns:
        the rows, and how many were turned round.
    """
    mean = strength.mean
    flips = lowest_fraction(mean, FLIP_FRACTION) if objective in ("flip", "flip_margin", "drop") else mean != mean
    columns: dict[str, Tensor] = {}
    if objective in ("adaptive_margin", "soft_margin"):
        columns["margin"] = mean
    elif objective == "flip_margin":
        columns["margin"] = flipped_strength(mean, flips)
    if objective == "soft_margin":
        columns["confidence"] = smoothing_confidence(mean, alpha=SMOOTHING)
    elif objective == "vote_soft":
        columns["confidence"] = strength.share
    elif objective == "posterior" and noise.flip_rate > 0:
        columns["confidence"] = posterior_confidence(mean, flip_rate=noise.flip_rate, scale=noise.scale)
    made = []
    for i, row in enumerate(rows):
        if objective == "drop" and flips[i]:
            continue
        turned = objective != "drop" and bool(flips[i])
        base = turned_round(row) if turned else row
        made.append({**base, **{name: float(values[i]) for name, values in columns.items()}})
    return made, int(flips.sum()) if objective != "drop" else 0


def turned_round(row: dict[str, Any]) -> dict[str, Any]:
    """A pair with its label flipped: its own margin changes sign with it, and its confidence is the other side's."""
    turned = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    if "margin" in row:
        turned["margin"] = -row["margin"]
    if "confidence" in row:
        turned["confidence"] = 1 - row["confidence"]
    return turned


def attach_strength(rows: list[dict[str, Any]], voted: list[dict[str, Any]]) -> VoteStrength:
    """The votes of exactly these pairs, in their order.

    Args:
        voted: rows of `strength.jsonl`: `pair` (its digest), `strength_mean`, `strength_std`, `strength_share`, `strength_votes`.

    Raises:
        UserError: the votes are of other pairs.
    """
    by_pair = {vote["pair"]: vote for vote in voted}
    digests = [pair_digest(row) for row in rows]
    missing = sum(digest not in by_pair for digest in digests)
    if missing:
        raise UserError(
            f"reward: {missing} of {len(rows)} pairs have no vote; the vote was made on other data than these. Vote again."
        )
    names = ("strength_mean", "strength_std", "strength_share", "strength_votes")
    return VoteStrength(*(torch.tensor([by_pair[digest][name] for digest in digests]) for name in names))
