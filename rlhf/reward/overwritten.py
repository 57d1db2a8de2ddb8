"""What pairs bring that an objective reads otherwise than it is meant: gaps of ratings in several units, a confidence."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf.data.rows import TIE
from rlhf.recipe.objectives import Objective

# Mean rating gaps of this many pairs that differ by more than this are in other units.
ENOUGH_GAPS, OTHER_UNIT = 30, 2.5
OF_VOTES = ("adaptive_margin", "flip_margin", "soft_margin")  # objectives whose margins are of votes


def gaps_of_other_units(rows: Sequence[Mapping[str, Any]], objective: Objective) -> str | None:
    """Return a sentence where the rating gaps of two sources differ so much in size that their units can't be the same.

    Ratings of 1 to 10 beside those of 0 to 4 have margins and weights that are as much larger. Sources with fewer than
    `ENOUGH_GAPS` gaps are not looked at.
    """
    if not objective.needs.or_rating_gap:
        return None
    column = objective.needs.column
    gaps: dict[str, list[float]] = {}
    for row in rows:
        if row.get("rating_gap") and row.get(column or "") is None:
            gaps.setdefault(row.get("source") or "no source", []).append(abs(float(row["rating_gap"])))
    means = sorted((fmean(of_source), name) for name, of_source in gaps.items() if len(of_source) >= ENOUGH_GAPS)
    if not means or means[-1][0] <= OTHER_UNIT * means[0][0]:
        return None
    (least, first), (most, last) = means[0], means[-1]
    return (
        f"reward.objective {objective.name}: the rating gaps of {last!r} are {most:.3g} on average and those of {first!r} "
        f"{least:.3g}, and they are taken for one unit, so the former count {most / least:.1f} times as much. Give the files a "
        f"{column!r} on one scale if the ratings are on two."
    )


def overwritten_confidence(
    rows: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]], objective: Objective
) -> str | None:
    """Return a sentence where an objective has said how likely each label is right, and pairs said so themselves.

    Args:
        rows: pairs as they came.
        made: as the objective trains on them; where votes say nothing these are the pairs as they came.
    """
    count = sum(row.get("confidence") not in (None, TIE, 1.0) for row in rows)
    if not count or not objective.sets_confidence or made == rows:
        return None
    return (
        f"reward.objective {objective.name} says how likely each label is right, and {count} of {len(rows)} pairs bring a "
        "`confidence` (a share of annotators, a soft label), which is not used then. To train on it, set reward.objective: bt."
    )


def overwritten_margin(rows: Sequence[Mapping[str, Any]], objective: Objective) -> str | None:
    """Return a sentence where an objective makes margins of votes, and pairs bring margins of their own."""
    count = sum(bool(row.get("margin")) and row.get("confidence") != TIE for row in rows)
    if not count or objective.name not in OF_VOTES:
        return None
    return (
        f"reward.objective {objective.name} makes margins of the votes, and {count} of {len(rows)} pairs bring a `margin`, which "
        "is not used then. To train on it, set reward.objective: margin."
    )
