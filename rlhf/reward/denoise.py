"""What is done about noisy labels: the named objectives, as columns that the general pair loss reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.data.rows import Pair
from rlhf.data.sources import pair_digest
from rlhf.errors import UserError
from rlhf.objectives.strength import (
    SmoothingMask,
    VoteStrength,
    flipped_strength,
    lowest_fraction,
    posterior_confidence,
    smoothing_confidence,
)
from rlhf.reward.noise import NoiseEstimate

Rows = list[dict[str, Any]]
TIE = 0.5  # the confidence of a pair that annotators called equal: no vote makes one of its answers the better one
# Which column an objective reads from the file itself.
OWN_COLUMN = {"margin": "margin", "scaled": "weight", "soft": "confidence"}


@dataclass(frozen=True)
class DenoiseConfig:
    """An objective and its numbers; the defaults are the paper's where it has one.

    Attributes:
        flip_by: which labels are turned round: `rank`, the weakest `flip_fraction`; `sign`, those with a strength below 0.
        smoothing: α, the share of a smoothed label given to the other side.
        smoothing_mask: which labels are smoothed by a vote; without a vote all are.
        margin_scale: nats per unit of strength, or of the ratings' gap.
        margin_clip: largest size of a margin, nats.
    """

    objective: str
    flip_by: Literal["rank", "sign"] = "rank"
    flip_fraction: float = 0.1
    smoothing: float = 0.2
    smoothing_mask: SmoothingMask = "negative"
    margin_scale: float = 1.0
    margin_clip: float | None = None

    def margins(self, values: Tensor) -> Tensor:
        """Scaled and clipped."""
        scaled = values * self.margin_scale
        return scaled if self.margin_clip is None else scaled.clamp(-self.margin_clip, self.margin_clip)

    def flips(self, strength: Tensor) -> Tensor:
        """Which labels are turned round or dropped, [n] bool."""
        return strength < 0 if self.flip_by == "sign" else lowest_fraction(strength, self.flip_fraction)


def denoised(
    rows: Rows, how: DenoiseConfig, strength: VoteStrength | None = None, noise: NoiseEstimate | None = None
) -> tuple[Rows, int | None]:
    """Pairs as an objective trains on them, with the columns `margin`, `confidence`, `weight` that it asks for.

    | objective | what it does |
    |---|---|
    | `bt` | nothing: Bradley-Terry |
    | `soft` | the file's own `confidence`, which every pair must have |
    | `margin` | the file's `margin`, or where it has ratings their gap times `margin_scale` (Llama 2) |
    | `scaled` | the ratings' gap as weight (scaled Bradley-Terry) |
    | `smoothing` | P(label) = 1 - α on all pairs |
    | `flip` | labels turned round, the weakest tenth (the paper's) or those of negative strength |
    | `adaptive_margin` | mean strength as margin (the paper's) |
    | `flip_margin` | both; a turned pair's margin changes sign with it (the paper's) |
    | `soft_margin` | smoothing where the mask says, margin everywhere (the paper's) |
    | `vote_soft` | the share of votes that agree, as P(label) |
    | `vote_sigmoid` | σ of the calibrated mean strength, as P(label) |
    | `posterior` | P(label) by Bayes: the vote, and the share of wrong labels that it proves |
    | `weight` | the posterior as weight |
    | `drop` | the weakest tenth, or those of negative strength, left out |

    Where the votes prove no noise (`noise.fitted` is 0: they are blunt, or the labels are right) `posterior`, `weight` and
    `vote_sigmoid` are plain Bradley-Terry.

    Args:
        strength, noise: of a vote on these rows, in their order; every objective from `flip` on needs both.

    Returns:
        the rows, and how many were turned round (None where the objective turns none).

    Raises:
        UserError: a pair lacks what the objective needs; all pairs would be dropped.
    """
    if how.objective == "bt":
        return rows, None
    if how.objective in OWN_COLUMN:
        return _from_the_file(rows, how), None
    if how.objective == "smoothing":
        return [{**row, "confidence": 1 - how.smoothing} for row in rows], None
    assert strength is not None, "the recipe plans a vote for every other objective"
    assert noise is not None, "which comes with the votes"
    mean, columns = strength.mean, dict[str, Tensor]()
    turns = how.objective in ("flip", "flip_margin")
    flips = how.flips(mean) if turns or how.objective == "drop" else torch.zeros_like(mean, dtype=torch.bool)
    knows = noise.fitted > 0
    match how.objective:
        case "drop":
            if flips.all():
                raise UserError(
                    f"reward.objective is drop, and flip_by: {how.flip_by} drops all {len(rows)} pairs; lower flip_fraction."
                )
            return [row for row, dropped in zip(rows, flips.tolist(), strict=True) if not dropped], None
        case "adaptive_margin" | "soft_margin":
            columns["margin"] = how.margins(mean)
        case "flip_margin":
            columns["margin"] = how.margins(flipped_strength(mean, flips))
        case "vote_soft":
            columns["confidence"] = strength.share
        case "vote_sigmoid" if knows:
            columns["confidence"] = torch.sigmoid(noise.scale * mean)
        case "posterior" if knows:
            columns["confidence"] = posterior_confidence(mean, flip_rate=noise.fitted, scale=noise.scale)
        case "weight" if knows:
            columns["weight"] = posterior_confidence(mean, flip_rate=noise.fitted, scale=noise.scale)
    if how.objective == "soft_margin":
        columns["confidence"] = smoothing_confidence(mean, alpha=how.smoothing, where=how.smoothing_mask)
    made = []
    for i, row in enumerate(rows):
        base = flip_pair(row) if flips[i] else row
        own = {} if row.get("confidence") == TIE else {name: float(values[i]) for name, values in columns.items()}
        made.append({**base, **own})
    return made, int(flips.sum()) if turns else None


def _from_the_file(rows: Rows, how: DenoiseConfig) -> Rows:
    """Rows with the column that the objective reads, where it is absent made of `rating_gap` (a confidence cannot be)."""
    column = OWN_COLUMN[how.objective]
    found, missing = [], []
    for number, row in enumerate(rows):
        if row.get(column) is not None:
            found.append(row)
        elif column == "confidence" or row.get("rating_gap") is None:
            missing.append(number)
        else:
            gap = float(row["rating_gap"])
            found.append({**row, column: float(how.margins(torch.tensor(gap))) if column == "margin" else gap})
    if missing:
        raise UserError(
            f"reward.objective is {how.objective}, but {len(missing)} of {len(rows)} pairs (the first is number {missing[0]}) "
            f"have no {column!r}{'' if column == 'confidence' else ' and no ratings'}; add it, or choose another objective."
        )
    return found


def flip_pair(row: dict[str, Any]) -> dict[str, Any]:
    """A pair with its label flipped: its own margin changes sign with it, and its confidence is the other side's."""
    turned = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    if row.get("margin") is not None:
        turned["margin"] = -row["margin"]
    if row.get("confidence") is not None:
        turned["confidence"] = 1 - row["confidence"]
    return turned


def attach_strength(rows: Sequence[Pair], voted: Rows) -> VoteStrength:
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
