"""Pairs by the source that they come from, each of which has an expert of its own."""

from collections.abc import Mapping, Sequence

from rlhf.data.rows import Pair
from rlhf.errors import UserError


def by_source(rows: Sequence[Pair], weights: Mapping[str, float] | None) -> dict[str, list[Pair]]:
    """Group pairs by their `source`, in alphabetical order.

    Raises:
        UserError: a pair has none, or all have the same; fixed weights are for other sources.
    """
    grouped: dict[str, list[Pair]] = {}
    for row in rows:
        grouped.setdefault(str(row.get("source") or ""), []).append(row)
    if "" in grouped or len(grouped) < 2:
        raise UserError(
            f"reward.experts: an expert is trained on the pairs of one `source`; here {len(grouped.get('', []))} of {len(rows)} "
            f"pairs have none, the others {len(set(grouped) - {''})} different ones. Name several files under data.preferences, "
            "or give the rows a column `source`."
        )
    if weights is not None and set(weights) != set(grouped):
        raise UserError(f"reward.expert_weights: names {sorted(weights)}, but the pairs come from {sorted(grouped)}.")
    return dict(sorted(grouped.items()))
