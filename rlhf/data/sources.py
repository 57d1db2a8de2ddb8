"""Sources of any form into canonical rows that remember where they were read; repeats, contradictions, fractions, caps."""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.canonical import demonstration, oddities, pair, prompt_only
from rlhf.data.rankings import (
    Ranking,
    best_answers,
    comparisons,
    group_rated,
    is_ranking,
    is_rated,
    rankings,
    rated_answers,
)
from rlhf.data.read import BadRow, ReadReport, read_rows
from rlhf.data.rows import prompt_key
from rlhf.errors import UserError

Convert = Callable[[Any, ReadReport, int], list[dict[str, Any]]]


@dataclass(frozen=True)
class Source:
    """One file or hub dataset of a mixture.

    Attributes:
        fraction: of its prompts, by a seeded draw; all rows of a prompt stay together.
        max_rows: at most so many rows, by a seeded draw.
    """

    source: str
    fraction: float = 1.0
    max_rows: int | None = None


@dataclass
class Row:
    """A canonical row and where it was read."""

    values: dict[str, Any]
    number: int
    report: ReadReport

    @property
    def key(self) -> str:
        """Of its prompt."""
        return prompt_key(self.values["prompt"])


@dataclass
class Rows:
    """What was read: for training, and apart from it what the files themselves give as their test side."""

    train: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(self.train + other.train, self.test + other.test)


def pair_digest(row: dict[str, Any]) -> str:
    """What identifies a pair, whichever of its answers is called the chosen one."""
    answers = sorted(row[side][0]["content"] for side in ("chosen", "rejected"))
    text = "\x1f".join((prompt_key(row["prompt"]), *answers))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_pairs(source: str, *, split: str = "test") -> tuple[list[dict[str, Any]], ReadReport]:
    """All canonical pairs of one source, in any accepted form, repeats and contradictions left out.

    Raises:
        UserError: there is none.
    """
    rows, report = read_pair_rows(source, split=split)
    return [row.values for row in rows], report


def read_pair_rows(source: str, *, split: str = "train") -> tuple[list[Row], ReadReport]:
    """The same with the number of the row that each pair was read from.

    Raises:
        UserError: there is none.
    """
    reports: list[ReadReport] = []
    read = read_sources([Source(source)], to_pairs, reports, "pairs", 0, split=split)
    rows = deduplicated(read.train + read.test)
    count_kept(reports, [rows])
    if not rows:
        raise UserError([f"{source}: holds no usable pair.", *reports[0].sentences()])
    return rows, reports[0]


def read_rankings(source: str, *, split: str = "test") -> list[Ranking]:
    """The rankings of three answers or more in one source; what is wrong with other rows `read_pairs` has said."""
    found: list[Ranking] = []
    for _, row in read_rows(source, ReadReport(source), split=split):
        try:
            found += [r for r in (rankings(row) if is_ranking(row) else []) if len(r.answers) > 2]
        except BadRow:
            continue
    return found


def to_pairs(row: Any, report: ReadReport, number: int) -> list[dict[str, Any]]:
    """The pairs in a row: one, or those of its rankings."""
    if not is_ranking(row):
        return [pair(row)]
    found = [canonical for ranking in rankings(row) for canonical in comparisons(ranking)]
    report.note(number, "pairs made of rankings", count=len(found))
    return found


def to_demonstrations(row: Any, report: ReadReport, number: int) -> list[dict[str, Any]]:
    """The demonstrations in a row: one, or the best answer to each prompt of its rankings."""
    if not is_ranking(row):
        return [demonstration(row)]
    return [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": content}]}
        for prompt, content in best_answers(row)
    ]


def to_prompts(row: Any, report: ReadReport, number: int) -> list[dict[str, Any]]:
    """The prompts in a row."""
    if not is_ranking(row):
        return [prompt_only(row)]
    return [{"prompt": prompt} for prompt, _ in best_answers(row)]


def read_sources(
    sources: Sequence[Source],
    convert: Convert,
    reports: list[ReadReport],
    what: str,
    seed: int,
    *,
    split: str = "train",
) -> Rows:
    """Canonical rows of all sources, fractions and caps applied."""
    everything = Rows()
    for source in sources:
        report = ReadReport(f"{source.source} ({what})")
        reports.append(report)
        found = Rows()
        rated: list[tuple[int, bool, Any]] = []
        for number, row in read_rows(source.source, report, split=split):
            is_test = isinstance(row, dict) and row.get("split") == "test" and split == "train"
            side = found.test if is_test else found.train
            try:
                if convert is to_pairs and is_rated(row):
                    rated += [(number, is_test, answer) for answer in rated_answers(row)]
                    continue
                canonicals = convert(row, report, number)
            except BadRow as reason:
                report.drop(number, str(reason))
                continue
            for canonical in canonicals:
                for oddity in oddities(canonical):
                    report.note(number, f"kept, though {oddity}")
            side += [Row(canonical, number, report) for canonical in canonicals]
        found += _pairs_of_rated(rated, report)
        if source.fraction < 1:
            kept = [row for row in found.train if share_of(row, f"{seed}:fraction") < source.fraction]
            found.train = keep_only(found.train, kept, f"outside the fraction {source.fraction}")
        rng = random.Random(f"{seed}:{source.source}")
        found.train = capped(found.train, source.max_rows, rng, f"over max_rows {source.max_rows}")
        everything += found
    return everything


def _pairs_of_rated(rated: list[tuple[int, bool, Any]], report: ReadReport) -> Rows:
    """Pairs between rated answers to one prompt that stand in different rows."""
    if not rated:
        return Rows()
    where = {prompt_key(prompt): (number, is_test) for number, is_test, (prompt, _) in reversed(rated)}
    found, alone = group_rated([answer for _, _, answer in rated])
    if alone:
        report.note(rated[0][0], "rated answers have no other answer to their prompt to be compared with", count=alone)
    rows = Rows()
    for ranking in found:
        number, is_test = where[prompt_key(ranking.prompt)]
        made = [Row(canonical, number, report) for canonical in comparisons(ranking)]
        report.note(number, "pairs made of rated answers", count=len(made))
        (rows.test if is_test else rows.train).extend(made)
    return rows


def share_of(row: Row, salt: str) -> float:
    """A number in [0, 1) that is the same for all rows of a prompt."""
    return share_of_text(row.key, salt)


def share_of_text(text: str, salt: str) -> float:
    """A number in [0, 1) that follows from a text."""
    digest = hashlib.sha256(f"{salt}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def drop_rows(rows: Iterable[Row], reason: str) -> None:
    """Count rows that are left out."""
    for row in rows:
        row.report.drop(row.number, reason)


def keep_only(rows: list[Row], kept: list[Row], reason: str) -> list[Row]:
    """The rows kept, the others counted."""
    stay = {id(row) for row in kept}
    drop_rows((row for row in rows if id(row) not in stay), reason)
    return kept


def deduplicated(rows: list[Row]) -> list[Row]:
    """Each pair once; a pair that stands in both orders is left out both times, for nobody knows which is right."""

    def identity(row: Row) -> tuple[str, frozenset[str], str]:
        chosen, rejected = (row.values[side][0]["content"].strip() for side in ("chosen", "rejected"))
        return row.key, frozenset((chosen, rejected)), chosen

    orders: dict[tuple[str, frozenset[str]], set[str]] = {}
    for row in rows:
        key, answers, chosen = identity(row)
        orders.setdefault((key, answers), set()).add(chosen)
    kept: list[Row] = []
    seen: set[tuple[str, frozenset[str]]] = set()
    for row in rows:
        key, answers, _ = identity(row)
        if len(orders[key, answers]) > 1:
            row.report.drop(row.number, "stands in both orders")
        elif (key, answers) in seen:
            row.report.drop(row.number, "repeats another pair")
        else:
            seen.add((key, answers))
            kept.append(row)
    return kept


def capped(rows: list[Row], most: int | None, rng: random.Random, reason: str) -> list[Row]:
    """At most so many rows, in their order, by a seeded draw; the others are counted."""
    if most is None or len(rows) <= most:
        return rows
    chosen = sorted(rng.sample(range(len(rows)), most))
    return keep_only(rows, [rows[index] for index in chosen], reason)


def count_kept(reports: list[ReadReport], written: Iterable[list[Row]]) -> None:
    """Say in every report how many of its rows ended up somewhere."""
    kept: dict[int, set[int]] = {}
    for rows in written:
        for row in rows:
            kept.setdefault(id(row.report), set()).add(row.number)
    for report in reports:
        report.kept = len(kept.get(id(report), ()))
