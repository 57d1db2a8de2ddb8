"""What is done about noisy labels: for each objective, the columns that its loss reads.

One function for each `apply` of the table (`rlhf.recipe.objectives`). A pair with `confidence` 0.5 was called equal by its
annotators: no vote makes one of its answers the better one, so no column of a vote is set there.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from rlhf.data.rows import TIE, Pair, label_digest
from rlhf.errors import UserError
from rlhf.objectives.strength import (
    STRENGTH_COLUMNS,
    SmoothingMask,
    VoteStrength,
    flipped_strength,
    lowest_fraction,
    posterior_confidence,
    smoothing_confidence,
)
from rlhf.recipe.objectives import OBJECTIVES, Objective, resolve
from rlhf.reward.annotators import LabelPosterior, posterior_by_annotator
from rlhf.reward.noise import NoiseEstimate
from rlhf.reward.overwritten import gaps_of_other_units, overwritten_confidence, overwritten_margin


@dataclass(frozen=True)
class DenoiseConfig:
    """An objective and its numbers; the defaults are the paper's where it has one.

    Attributes:
        objective: its name in the table.
        flip_by: which labels are flipped: `rank`, the weakest `flip_fraction`; `sign`, those with a strength below 0.
        smoothing: α, the share of a smoothed label given to the other side.
        smoothing_mask: which labels are smoothed by a vote; without a vote all are.
        margin_scale: nats per unit of strength, or of the ratings' gap; a file's own margins are nats already.
        margin_clip: largest size of any margin, nats.

    Raises:
        UserError: the table has no such objective; smoothing would turn labels round.
    """

    objective: str
    flip_by: Literal["rank", "sign"] = "rank"
    flip_fraction: float = 0.1
    smoothing: float = 0.2
    smoothing_mask: SmoothingMask = "negative"
    margin_scale: float = 1.0
    margin_clip: float | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UserError(f"reward.objective: {self.objective!r} is none of {', '.join(OBJECTIVES)}.")
        if not 0 <= self.smoothing < 0.5:
            raise UserError(
                f"reward.smoothing is {self.smoothing}: the share of a label that the other side gets, in [0, 0.5)."
            )

    def margins(self, values: Tensor) -> Tensor:
        """Scale and clip values to margins, nats."""
        scaled = values * self.margin_scale
        return scaled if self.margin_clip is None else scaled.clamp(-self.margin_clip, self.margin_clip)

    def flips(self, strength: Tensor) -> Tensor:
        """Choose the labels that are flipped or dropped, [n] bool."""
        return strength < 0 if self.flip_by == "sign" else lowest_fraction(strength, self.flip_fraction)


class Denoised(NamedTuple):
    """Pairs as an objective trains on them, and how many were flipped (None where the objective flips none)."""

    rows: list[Pair]
    flipped: int | None = None


def denoised(
    rows: list[Pair], config: DenoiseConfig, strength: VoteStrength | None = None, noise: NoiseEstimate | None = None
) -> Denoised:
    """Return pairs as an objective trains on them, with the columns `margin`, `confidence`, `weight` that it sets.

    Args:
        strength, noise: of a vote on these rows, in their order; every objective that needs a vote needs both.

    Raises:
        UserError: a pair lacks what the objective needs; all pairs would be dropped.
    """
    objective = OBJECTIVES[config.objective]
    check_needs(rows, objective)
    for sentence in (gaps_of_other_units(rows, objective), overwritten_margin(rows, objective)):
        if sentence is not None:
            warnings.warn(sentence, stacklevel=2)
    if objective.apply is None:
        return Denoised(rows)
    apply = resolve(objective.apply)
    result: Denoised
    if objective.needs.vote:
        assert strength is not None, "the recipe plans a vote for this objective"
        assert noise is not None, "which comes with the votes"
        result = apply(rows, config, strength, noise)
    else:
        result = apply(rows, config)
    if (sentence := overwritten_confidence(rows, result.rows, objective)) is not None:
        warnings.warn(sentence, stacklevel=2)
    return result


def check_needs(rows: Sequence[Mapping[str, object]], objective: Objective) -> None:
    """Refuse pairs without the column that an objective needs of the file.

    Raises:
        UserError: with the number of such pairs, and the first.
    """
    needs = objective.needs
    if needs.column is None:
        return
    sources = (needs.column, "rating_gap") if needs.or_rating_gap else (needs.column,)
    missing = [number for number, row in enumerate(rows) if all(row.get(source) is None for source in sources)]
    if missing:
        raise UserError(
            f"reward.objective is {objective.name}, but {len(missing)} of {len(rows)} pairs (the first is number {missing[0] + 1}) "
            f"have no {needs.column!r}{' and no ratings' if needs.or_rating_gap else ''}; add it, or choose another objective."
        )


def check_scale(rows: Sequence[Mapping[str, object]], objective: str, margin_scale: float) -> None:
    """Refuse a scale of ratings where pairs bring their margins, which are nats already.

    Raises:
        UserError: with the number of such pairs.
    """
    is_for_ratings = OBJECTIVES[objective].needs.or_rating_gap and margin_scale != 1.0
    if is_for_ratings and rows and all(row.get("margin") is not None for row in rows):
        raise UserError(
            f"reward.margin_scale is for ratings, and all {len(rows)} pairs bring a margin in nats; leave it out."
        )


# ---- Without a vote ----


def margin_of_ratings(rows: list[Pair], config: DenoiseConfig) -> Denoised:
    """Set the margin, where the file has none, to the gap g of its ratings: m = clip(margin_scale · g), nats.

    A margin of the file is clipped too; answers that were called equal have none.

    Raises:
        UserError: there is a `margin_scale`, and no ratings that it could scale.

    >>> pair: Pair = {"prompt": [], "chosen": [], "rejected": [], "rating_gap": 2.0}
    >>> given: Pair = {"prompt": [], "chosen": [], "rejected": [], "margin": 50.0}
    >>> made = margin_of_ratings([pair, given], DenoiseConfig("margin", margin_scale=0.5, margin_clip=3.0))
    >>> [row["margin"] for row in made.rows]
    [1.0, 3.0]
    """
    check_scale(rows, config.objective, config.margin_scale)
    most = inf if config.margin_clip is None else config.margin_clip

    def margin(row: Pair) -> float:
        if row.get("confidence") == TIE:
            return 0.0
        given = row.get("margin")
        if given is not None:
            return max(-most, min(most, given))
        return float(config.margins(torch.tensor(float(row["rating_gap"]))))

    return Denoised([{**row, "margin": margin(row)} for row in rows])


def weight_of_ratings(rows: list[Pair], config: DenoiseConfig) -> Denoised:
    """Set the weight, where the file has none, to the gap of its ratings: w = max(g, 0) (scaled Bradley-Terry).

    A pair whose ratings contradict its label (g < 0) has no weight: a negative one would teach the label turned round.

    >>> pair: Pair = {"prompt": [], "chosen": [], "rejected": [], "rating_gap": 2.0}
    >>> weight_of_ratings([pair], DenoiseConfig("scaled")).rows[0]["weight"]
    2.0
    """
    return Denoised(
        [
            row if row.get("weight") is not None else {**row, "weight": max(0.0, float(row["rating_gap"]))}
            for row in rows
        ]
    )


def smooth_all(rows: list[Pair], config: DenoiseConfig) -> Denoised:
    """Set the confidence of every pair but ties: p = 1 - α.

    >>> pair: Pair = {"prompt": [], "chosen": [], "rejected": []}
    >>> rows = smooth_all([pair, {**pair, "confidence": 0.5}], DenoiseConfig("smoothing", smoothing=0.25)).rows
    >>> [row["confidence"] for row in rows]
    [0.75, 0.5]
    """
    return Denoised(
        [row if row.get("confidence") == TIE else {**row, "confidence": 1 - config.smoothing} for row in rows]
    )


# ---- By a vote: μ the mean strength of a pair, ε the share of wrong labels (`NoiseEstimate.fitted`), b what a vote is worth ----


def flip(rows: list[Pair], config: DenoiseConfig, strength: VoteStrength, noise: NoiseEstimate) -> Denoised:
    """Flip the labels that the votes contradict most."""
    flips = _flips(rows, config, strength)
    return Denoised(_flip_pairs(rows, flips), int(flips.sum()))


def adaptive_margin(rows: list[Pair], config: DenoiseConfig, strength: VoteStrength, noise: NoiseEstimate) -> Denoised:
    """Set the margin to the mean strength: m = clip(margin_scale · μ), nats."""
    return Denoised(_with_columns(rows, margin=config.margins(strength.mean)))


def flip_with_margin(rows: list[Pair], config: DenoiseConfig, strength: VoteStrength, noise: NoiseEstimate) -> Denoised:
    """Flip as `flip` does and set margins as `adaptive_margin` does; a flipped pair has -μ in place of μ."""
    flips = _flips(rows, config, strength)
    margins = config.margins(flipped_strength(strength.mean, flips))
    return Denoised(_with_columns(_flip_pairs(rows, flips), margin=margins), int(flips.sum()))


def smooth_with_margin(
    rows: list[Pair], config: DenoiseConfig, strength: VoteStrength, noise: NoiseEstimate
) -> Denoised:
    """Set margins as `adaptive_margin` does, and the confidence to 1 - α where `smoothing_mask` says, 1 elsewhere."""
    confidence = smoothing_confidence(strength.mean, alpha=config.smoothing, mask=config.smoothing_mask)
    return Denoised(_with_columns(rows, margin=config.margins(strength.mean), confidence=confidence))


def share_as_confidence(
    rows: list[Pair], config: DenoiseConfig, strength: VoteStrength, noise: NoiseEstimate
) -> Denoised:
    """Set the confidence to the share of votes that agree with the label."""
    return Denoised(_with_columns(rows, confidence=strength.share))


def strength_as_confidence(
    rows: list[Pair], config: DenoiseConfig, strength: VoteStrength, noise: NoiseEstimate
) -> Denoised:
    """Set the confidence to p = σ(b μ); where the votes prove no noise, nothing is set (Bradley-Terry)."""
    if noise.low <= 0:
        return Denoised(rows)
    return Denoised(_with_columns(rows, confidence=torch.sigmoid(noise.scale * strength.mean)))


def posterior_as_confidence(
    rows: list[Pair], config: DenoiseConfig, strength: VoteStrength, noise: NoiseEstimate
) -> Denoised:
    """Set the confidence by Bayes: p = σ(b μ + log((1 - ε) / ε)); where the votes say nothing, nothing is set.

    Where the rows name annotators, ε is the annotator's own, and a pair that several labelled becomes one row, with what all its
    labels say (`rlhf.reward.annotators.posterior_by_annotator`).
    """
    posterior = _posterior(rows, strength, noise)
    if posterior is None:
        return Denoised(rows)
    made = _with_columns(rows, confidence=posterior.right)
    return Denoised([made[i] for i in posterior.rows])


def posterior_as_weight(
    rows: list[Pair], config: DenoiseConfig, strength: VoteStrength, noise: NoiseEstimate
) -> Denoised:
    """Set the weight to its product with the confidence of `posterior_as_confidence`; nothing, where the votes say nothing."""
    posterior = _posterior(rows, strength, noise)
    if posterior is None:
        return Denoised(rows)
    weights = torch.tensor([1.0 if row.get("weight") is None else float(row["weight"]) for row in rows])
    return Denoised(_with_columns(rows, weight=weights * posterior.right))


def drop(rows: list[Pair], config: DenoiseConfig, strength: VoteStrength, noise: NoiseEstimate) -> Denoised:
    """Leave out the pairs that `flip` would flip.

    Raises:
        UserError: that is all of them.
    """
    drops = _flips(rows, config, strength)
    if drops.all():
        raise UserError(
            f"reward.objective is drop, and flip_by: {config.flip_by} drops all {len(rows)} pairs; lower flip_fraction."
        )
    return Denoised([row for row, dropped in zip(rows, drops.tolist(), strict=True) if not dropped])


def _posterior(rows: Sequence[Pair], strength: VoteStrength, noise: NoiseEstimate) -> LabelPosterior | None:
    """Return what is known of each label; None where the votes say nothing, or take no label to be wrong."""
    if noise.scale == 0 or noise.fitted == 0:
        return None
    by_annotator = posterior_by_annotator(rows, strength.mean, noise)
    if by_annotator is not None:
        return by_annotator
    right = posterior_confidence(strength.mean, flip_rate=noise.fitted, scale=noise.scale)
    return LabelPosterior(right, list(range(len(rows))))


def _with_columns(rows: list[Pair], **columns: Tensor) -> list[Pair]:
    """Set columns [n] of a vote; a pair that annotators called equal keeps its own.

    Where a confidence p is set and no margin, the file's margin m becomes (2p - 1) m: it is that of the order that is likelier.
    """
    lists = {name: values.tolist() for name, values in columns.items()}
    made = []
    for i, row in enumerate(rows):
        values = {name: column[i] for name, column in lists.items()}
        if "confidence" in values and "margin" not in values and row.get("margin") is not None:
            values["margin"] = (2 * values["confidence"] - 1) * float(row["margin"])
        made.append(row if row.get("confidence") == TIE else cast(Pair, {**row, **values}))
    return made


def _flips(rows: Sequence[Pair], config: DenoiseConfig, strength: VoteStrength) -> Tensor:
    """Choose the labels that are flipped or dropped, [n] bool; a tie is no label that could be wrong, and counts as none."""
    decided = torch.tensor([row.get("confidence") != TIE for row in rows])
    flips = torch.zeros_like(decided)
    flips[decided] = config.flips(strength.mean[decided])
    return flips


def _flip_pairs(rows: list[Pair], flips: Tensor) -> list[Pair]:
    return [_contradicted(row) if flipped else row for row, flipped in zip(rows, flips.tolist(), strict=True)]


def _contradicted(row: Pair) -> Pair:
    """Return a pair whose votes say that the rejected answer is the better one: it is the chosen one, as surely as either was.

    With 1 - p for the confidence p of a label, the pair would say what it said before.
    """
    if row.get("confidence") is None:
        return flip_pair(row)
    return {**flip_pair(row), "confidence": max(row["confidence"], 1 - row["confidence"])}


def flip_pair(row: Pair) -> Pair:
    """Return a pair the other way round: margin and rating gap change sign, confidence is the other side's, critiques follow."""
    flipped: Pair = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    if "critique_chosen" in row and "critique_rejected" in row:
        flipped["critique_chosen"], flipped["critique_rejected"] = row["critique_rejected"], row["critique_chosen"]
    if row.get("margin") is not None:
        flipped["margin"] = -row["margin"]
    if row.get("rating_gap") is not None:
        flipped["rating_gap"] = -row["rating_gap"]
    if row.get("confidence") is not None:
        flipped["confidence"] = 1 - row["confidence"]
    return flipped


def attach_strength(rows: Sequence[Pair], votes: Sequence[Mapping[str, Any]]) -> VoteStrength:
    """Find the votes of exactly these pairs, in their order.

    Args:
        votes: rows of `strength.jsonl`: `pair` (the digest of its label) and `STRENGTH_COLUMNS`.

    Raises:
        UserError: the votes are of other pairs.
    """
    by_pair = {vote["pair"]: vote for vote in votes}
    digests = [label_digest(row) for row in rows]
    missing = sum(digest not in by_pair for digest in digests)
    if missing:
        raise UserError(
            f"reward: {missing} of {len(rows)} pairs have no vote; the vote was made on other data than these. Vote again."
        )
    return VoteStrength(*(torch.tensor([by_pair[digest][name] for digest in digests]) for name in STRENGTH_COLUMNS))
