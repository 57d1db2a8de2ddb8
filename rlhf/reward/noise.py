"""How many labels are wrong, from out-of-fold votes; and what is done about it: the named corrections."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.data.sources import pair_digest
from rlhf.errors import UserError
from rlhf.objectives.strength import (
    VoteStrength,
    flipped_strength,
    lowest_fraction,
    posterior_confidence,
    smoothing_confidence,
)

LOWEST_RATE, HIGHEST_RATE, RATES, SCALES = 0.005, 0.495, 99, 61
CHI_SQUARE_95 = 3.841
FLIP_FRACTION, SMOOTHING = 0.1, 0.2


@dataclass(frozen=True)
class NoiseEstimate:
    """Share of wrong labels ε with its 95 % interval, and the scale a that calibrates the votes."""

    flip_rate: float
    scale: float
    low: float
    high: float


def estimate_noise(differences: Tensor, clusters: Sequence[Hashable]) -> NoiseEstimate:
    """Fit label noise to out-of-fold differences.

    A pair whose true order is "chosen is better" with probability σ(a d) has this label with probability

        L(a, ε) = (1 - ε) σ(a d) + ε σ(-a d)

    so far from 0, where the votes are sure, the share of contradicted labels is ε. Maximum likelihood on a grid of
    (a, ε); the interval holds every ε whose profile likelihood is within 1.92 of the best (χ² of one degree). Pairs of
    one prompt are not independent, so n counts as the number of prompts. Votes that are worth nothing cannot tell noise
    from their own ignorance, and then the interval is wide.

    Args:
        differences: [n] mean difference of models that did not see the label.
    """
    values = differences.double()
    spread = values.abs().mean().clamp(min=1e-12)
    rates = torch.linspace(LOWEST_RATE, HIGHEST_RATE, RATES, dtype=torch.float64)
    scales = torch.logspace(-1.5, 2, SCALES, dtype=torch.float64) / spread
    table = torch.empty(SCALES, RATES, dtype=torch.float64)
    for i, scale in enumerate(scales):
        sure = torch.sigmoid(scale * values)
        table[i] = torch.stack([((1 - 2 * rate) * sure + rate).log().mean() for rate in rates])
    table *= len(set(clusters))
    profile, best_scales = table.max(dim=0)
    best = int(profile.argmax())
    inside = rates[profile >= profile[best] - CHI_SQUARE_95 / 2]
    return NoiseEstimate(rates[best].item(), scales[best_scales[best]].item(), inside.min().item(), inside.max().item())


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
    elif objective == "posterior":
        columns["confidence"] = posterior_confidence(mean, flip_rate=noise.flip_rate, scale=noise.scale)
    made = []
    for i, row in enumerate(rows):
        if objective == "drop" and flips[i]:
            continue
        turned = objective != "drop" and bool(flips[i])
        sides = {"chosen": row["rejected"], "rejected": row["chosen"]} if turned else {}
        made.append({**row, **sides, **{name: float(values[i]) for name, values in columns.items()}})
    return made, int(flips.sum()) if objective != "drop" else 0


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
