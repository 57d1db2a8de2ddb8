"""Pairs that stand in a file more than once: which label of one person on one pair counts."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rlhf.data.rows import TIE, Pair, told, wording

if TYPE_CHECKING:
    from rlhf.data.read import ReadReport
    from rlhf.data.sources import Row, Rows, Source

BOTH_ORDERS, REPEATED = "stands in both orders", "repeats another pair"
SHOWN_NAMES = 5
OUTVOTED = "most annotators of this pair say the opposite"
TIE_BESIDE = "a tie, and the same pair is decided in another row"


class _Label(NamedTuple):
    """A label of a pair: what it is of, whose it is, and the better answer, or None for a tie."""

    pair: tuple[object, ...]
    annotator: str | None
    better: str | None


def deduplicated(rows: "Sequence[Row[Pair]]", *, by_annotator: bool = False) -> "list[Row[Pair]]":
    """Keep each pair once, as most of its named annotators label it; drop a pair that stands in both orders both times where
    they are as many, or have no names, for nobody knows which is right.

    A tie says the same in both orders, and gives way to a row that decides.

    Args:
        by_annotator: labels of one pair that name different annotators are all kept, whatever they say.
    """
    labels = [_label(row, by_annotator=by_annotator) for row in rows]
    better: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
    for label in labels:
        if label.better is not None:
            better[label.pair].add(label.better)
    contested: defaultdict[tuple[object, ...], list[_Label]] = defaultdict(list)
    for label in labels:
        if len(better[label.pair]) > 1:
            contested[label.pair].append(label)
    most = {pair: _majority(of_pair) for pair, of_pair in contested.items()}
    kept = []
    seen: set[tuple[object, ...]] = set()
    for row, label in zip(rows, labels, strict=True):
        if label.better is None and better[label.pair]:
            row.report.drop(row.number, TIE_BESIDE)
        elif len(better[label.pair]) > 1 and label.better != most[label.pair]:
            row.report.drop(row.number, BOTH_ORDERS if most[label.pair] is None else OUTVOTED)
        elif label.pair in seen:
            row.report.drop(row.number, REPEATED)
        else:
            seen.add(label.pair)
            kept.append(row)
    return kept


def _label(row: "Row[Pair]", *, by_annotator: bool) -> _Label:
    chosen, rejected = told(row.values, "chosen").strip(), told(row.values, "rejected").strip()
    annotator = row.values.get("annotator")
    pair = (wording(row.values["prompt"]), annotator if by_annotator else None, frozenset((chosen, rejected)))
    return _Label(pair, annotator, None if row.values.get("confidence") == TIE else chosen)


def _majority(labels: Sequence[_Label]) -> str | None:
    """Return the answer that most annotators of a pair call the better one; None where no named ones are more than the others.

    Who says both has said nothing; ties are votes for neither. A row without a name may be of anybody, so none may contradict.
    """
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for label in labels:
        if label.annotator is not None and label.better is not None:
            answers[label.annotator].add(label.better)
    votes = Counter(better for each in answers.values() if len(each) == 1 for better in each).most_common(2)
    if not votes or (len(votes) == 2 and votes[0][1] == votes[1][1]):
        return None
    others = {label.better for label in labels if label.annotator is None} - {None, votes[0][0]}
    return None if others else votes[0][0]


def say_same_names(source: "Source", before: "Rows[Pair]", read: "Rows[Pair]", reports: Sequence["ReadReport"]) -> None:
    """Say where annotators of a source have the names of others': numbers of two tools may be two people."""
    known, names = (
        {row.values.get("annotator") for row in [*rows.train, *rows.test]} - {None} for rows in (before, read)
    )
    if known & names:
        shown = ", ".join(sorted(map(str, known & names))[:SHOWN_NAMES])
        reports[-1].direct(
            "annotator",
            f"{len(known & names)} names of {source.source} stand in an earlier source too ({shown}), and are taken for the same "
            "people; rename them if they are not",
        )
