"""Pairs that stand in a file more than once: which label of one person on one pair counts."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rlhf.data.rows import TIE, Pair, told

if TYPE_CHECKING:
    from rlhf.data.sources import Row

BOTH_ORDERS, REPEATED = "stands in both orders", "repeats another pair"
TIE_BESIDE = "a tie, and the same pair is decided in another row"


class _Label(NamedTuple):
    """A label of a pair: what it is of, and the better answer, or None for a tie."""

    pair: tuple[object, ...]
    better: str | None


def deduplicated(rows: "Sequence[Row[Pair]]", *, by_annotator: bool = False) -> "list[Row[Pair]]":
    """Keep each pair once; drop a pair that stands in both orders both times, for nobody knows which is right.

    A tie says the same in both orders, and gives way to a row that decides.

    Args:
        by_annotator: labels of one pair that name different annotators are all kept, whatever they say.
    """
    labels = [_label(row, by_annotator=by_annotator) for row in rows]
    better: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
    for label in labels:
        if label.better is not None:
            better[label.pair].add(label.better)
    kept = []
    seen: set[tuple[object, ...]] = set()
    for row, label in zip(rows, labels, strict=True):
        if label.better is None and better[label.pair]:
            row.report.drop(row.number, TIE_BESIDE)
        elif len(better[label.pair]) > 1:
            row.report.drop(row.number, BOTH_ORDERS)
        elif label.pair in seen:
            row.report.drop(row.number, REPEATED)
        else:
            seen.add(label.pair)
            kept.append(row)
    return kept


def _label(row: "Row[Pair]", *, by_annotator: bool) -> _Label:
    chosen, rejected = told(row.values, "chosen").strip(), told(row.values, "rejected").strip()
    annotator = row.values.get("annotator") if by_annotator else None
    pair = (row.key, annotator, frozenset((chosen, rejected)))
    return _Label(pair, None if row.values.get("confidence") == TIE else chosen)
