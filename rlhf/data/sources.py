"""Sources of any layout into canonical rows that remember where they were read; repeats, contradictions, fractions, caps."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rlhf.data.canonical import oddities
from rlhf.data.columns import PARTS, UNREAD_OF_LABEL, UNREAD_PART, unread_of_labels, unread_parts
from rlhf.data.conversations import conversation_keys
from rlhf.data.direction import example
from rlhf.data.layouts import find_layout
from rlhf.data.layouts.layout import Layout
from rlhf.data.rankings import Ranking, RatedAnswer, comparisons, group_rated
from rlhf.data.read import BadRow, ReadReport
from rlhf.data.repeats import deduplicated
from rlhf.data.rows import (
    PARTED,
    Compare,
    Demonstration,
    Messages,
    Pair,
    PromptRow,
    answer,
    completion,
    has_tools,
    parting_turn,
    prompt_key,
)
from rlhf.data.sides import Side
from rlhf.data.source_lines import Line, lines_of
from rlhf.errors import UserError

EARLIER_ANSWERS = "answers before the last of their conversations are read, and not learnt"
Canonical = TypeVar("Canonical", bound=PromptRow, covariant=True)


@dataclass(frozen=True)
class Source:
    """One file or hub dataset of a mixture.

    Attributes:
        fraction: of its conversations, by a seeded draw; all rows of one stay together.
        max_rows: at most so many rows, by a seeded draw.
        preference: what the values of its preference column mean, where the file itself does not say it.
        columns: our names → the file's own, dots leading into nested ones, where the file's layout is none that is known.
        label: the column that says which answer is better, where a layout has several.
        config, split: of a hub dataset; a folder that `datasets` reads has splits too.
    """

    source: str
    fraction: float = 1.0
    max_rows: int | None = None
    preference: Mapping[str, Side] | None = None
    columns: Mapping[str, str] | None = None
    label: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass
class Row(Generic[Canonical]):
    """A canonical row and where it was read.

    Attributes:
        makes_confidence: `confidence` comes from the layout, and may be missing in the rows beside.
        others: the numbers of the other rows that a pair was made of.
        conversation: the identity of the conversation that its prompt is of; empty until its whole source has been read.
    """

    values: Canonical
    number: int
    report: ReadReport
    is_test: bool = False
    makes_confidence: bool = False
    others: Sequence[int] = ()
    conversation: str = ""

    @property
    def key(self) -> str:
        """Return the identity of the row's prompt."""
        return prompt_key(self.values["prompt"])


@dataclass
class Rows(Generic[Canonical]):
    """Rows that were read: for training, and apart from them those that the files themselves call test rows."""

    train: list[Row[Canonical]] = field(default_factory=list)
    test: list[Row[Canonical]] = field(default_factory=list)


Convert = Callable[[Iterable[Line], ReadReport], Iterator[Row[Canonical]]]
# Takes a canonical row with tool calls or a tool's turns, and returns it as a model's chat template writes it; or BadRow.
Fit = Callable[[Any], Any]


def read_pairs(
    source: str | Source, *, split: str = "test", fit: Fit | None = None, compare: Compare = "answers"
) -> tuple[list[Pair], ReadReport]:
    """Read all pairs of one source, in any accepted layout, repeats and contradictions left out.

    Raises:
        UserError: there is none.
    """
    rows, report = read_pair_rows(source, split=split, fit=fit, compare=compare)
    return [row.values for row in rows], report


def read_pair_rows(
    source: str | Source, *, split: str = "train", fit: Fit | None = None, compare: Compare = "answers"
) -> tuple[list[Row[Pair]], ReadReport]:
    """Read all pairs of one source as `read_pairs`, each with its row's number; of a training split every annotator's labels.

    Args:
        fit, compare: as in `read_sources`.

    Raises:
        UserError: there is none.
    """
    source = Source(source) if isinstance(source, str) else source
    reports: list[ReadReport] = []
    read = read_sources([source], to_pairs, reports, "pairs", 0, split=split, fit=fit, compare=compare)
    rows = deduplicated(read.train + read.test, by_annotator=split == "train")
    count_kept(reports, [rows])
    if not rows:
        raise UserError([f"{source.source}: holds no usable pair.", *reports[0].sentences()])
    return rows, reports[0]


def read_rankings(source: str | Source, *, split: str = "test") -> list[Ranking]:
    """Read the rankings of three answers or more in one source; `read_pairs` reports what is wrong with other rows."""
    source = Source(source) if isinstance(source, str) else source
    rankings: list[Ranking] = []
    for line in lines_of(source, ReadReport(source.source), split):
        try:
            rankings += [r for r in find_layout(line.row).read_rankings(line.row) if len(r.answers) > 2]
        except BadRow:
            continue
    return rankings


def to_pairs(lines: Iterable[Line], report: ReadReport) -> Iterator[Row[Pair]]:
    """Convert rows to pairs; rated answers are compared with one another after the last row."""
    rated: list[tuple[Line, RatedAnswer]] = []

    def pairs_of(line: Line) -> list[Pair]:
        layout = find_layout(line.row)
        if layout.ratings is not None:
            entries = layout.ratings(line.row)
            rated.extend((line, entry) for entry in entries)
            _note_unread_parts(line, [entry.prompt for entry in entries], report)
        pairs = layout.read_pairs(line.row)
        if layout.rankings is not None:
            report.note(line.number, "pairs made of rankings", count=len(pairs))
        if pairs:
            _say_direction(line, layout, answer(pairs[0], "chosen"), report)
            for name in unread_of_labels(line.parts, pairs):
                report.note(line.number, UNREAD_OF_LABEL.format(name))
        elif layout.ratings is None:  # those are compared with other rows'
            raise BadRow("holds no two different answers of which one is better")
        return pairs

    yield from _converted(lines, report, pairs_of)
    yield from _pairs_of_rated(rated, report)


def _say_direction(line: Line, layout: Layout, better: str, report: ReadReport) -> None:
    name, sentence = line.direction or (layout.name, layout.direction or "`chosen` and `rejected`")
    evident = line.direction is None and layout.direction is None
    report.direct(name, example(sentence, better or "(a tool call)"), evident=evident)


def to_demonstrations(lines: Iterable[Line], report: ReadReport) -> Iterator[Row[Demonstration]]:
    """Convert rows to demonstrations; where they are the better answers, say which these are."""

    def demonstrations_of(line: Line) -> list[Demonstration]:
        layout = find_layout(line.row)
        demonstrations = layout.read_demonstrations(line.row)
        if demonstrations and line.direction is not None and line.row.get("chosen") is None:
            report.direct(*line.direction)
        elif demonstrations and (line.direction is not None or layout.rankings is not None):
            _say_direction(line, layout, completion(demonstrations[0]), report)
        if count := _answers_before(demonstrations):
            report.note(line.number, EARLIER_ANSWERS, count=count)
        return demonstrations

    return _converted(lines, report, demonstrations_of)


def _answers_before(demonstrations: Sequence[Demonstration]) -> int:
    """Return how many answers stand in the prompts of a row's demonstrations and are in none of them the one to learn.

    In a tree, an answer in one prompt may be the best answer to another.
    """
    learnt = {(len(row["prompt"]), completion(row)) for row in demonstrations}
    turns = {
        (place, turn["content"])
        for row in demonstrations
        for place, turn in enumerate(row["prompt"])
        if turn["role"] == "assistant"
    }
    return len(turns - learnt)


def to_prompts(lines: Iterable[Line], report: ReadReport) -> Iterator[Row[PromptRow]]:
    """Convert rows to prompts."""
    return _converted(lines, report, lambda line: find_layout(line.row).read_prompts(line.row))


def _converted(
    lines: Iterable[Line], report: ReadReport, read: Callable[[Line], list[Canonical]]
) -> Iterator[Row[Canonical]]:
    """Convert row by row; report bad rows and odd ones."""
    for line in lines:
        try:
            canonicals = read(line)
        except BadRow as reason:
            report.drop(line.number, str(reason))
            continue
        if canonicals:  # rated answers are compared later
            _note_unread_parts(line, [canonical["prompt"] for canonical in canonicals], report)
        for canonical in canonicals:
            for oddity in oddities(canonical):
                report.note(line.number, f"kept, though {oddity}")
        for canonical in canonicals:
            yield Row(canonical, line.number, report, line.is_test, line.makes_confidence)


def _note_unread_parts(line: Line, prompts: Iterable[Messages], report: ReadReport) -> None:
    parts = {name: line.parts[name] for name in PARTS if name in line.parts}
    for name in unread_parts(parts, [turn["content"] for prompt in prompts for turn in prompt]):
        report.note(line.number, UNREAD_PART.format(name))


def _pairs_of_rated(rated: Sequence[tuple[Line, RatedAnswer]], report: ReadReport) -> Iterator[Row[Pair]]:
    """Compare what one annotator, or nobody by name, rated of a prompt's answers; a pair has the number of the first row."""
    groups: dict[tuple[str, object], list[tuple[Line, RatedAnswer]]] = {}
    for line, rated_answer in rated:
        groups.setdefault(rated_answer.group, []).append((line, rated_answer))
    for group in groups.values():
        line, *others = lines = [line for line, _ in group]
        pairs = [
            pair
            for ranking in group_rated([rated_answer for _, rated_answer in group])
            for pair in comparisons(ranking)
        ]
        if not pairs:
            for alone in lines:
                report.note(alone.number, "rated answers have no other answer to their prompt to be compared with")
            continue
        report.note(line.number, "pairs made of rated answers", count=len(pairs))
        _say_direction(line, find_layout(line.row), answer(pairs[0], "chosen"), report)
        numbers = [other.number for other in others]
        for canonical in pairs:
            yield Row(canonical, line.number, report, line.is_test, others=numbers)


def read_sources(
    sources: Sequence[Source],
    convert: Convert[Canonical],
    reports: list[ReadReport],
    content: str,
    seed: int,
    *,
    split: str = "train",
    fit: Fit | None = None,
    compare: Compare = "answers",
) -> Rows[Canonical]:
    """Read the canonical rows of all sources, fractions and caps applied.

    Args:
        convert: `to_pairs`, `to_demonstrations` or `to_prompts`.
        reports: a report of each source is added here.
        content: what is read, in the report's words.
        split: of a hub dataset that names none.
        fit: writes tool calls and tools' turns as the chat template does; without it, rows that have them are left out.
        compare: whether pairs whose sides part before the last turn are compared as whole conversations, or left out.
    """
    rows: Rows[Canonical] = Rows()
    for source in sources:
        report = ReadReport(f"{source.source} ({content})")
        reports.append(report)
        read = _fitted(convert(lines_of(source, report, split), report), fit)
        if compare == "answers":
            turns = [parting_turn(row.values) for row in read]
            for row, turn in zip(read, turns, strict=True):
                if turn is not None:
                    row.report.drop(row.number, PARTED.format(turn))
            read = [row for row, turn in zip(read, turns, strict=True) if turn is None]
        for row, key in zip(read, conversation_keys([row.values["prompt"] for row in read]), strict=True):
            row.conversation = key
        train = [row for row in read if not row.is_test]
        if source.fraction < 1:
            kept = [row for row in train if share_of(row, f"{seed}:fraction") < source.fraction]
            train = keep_only(train, kept, f"outside the fraction {source.fraction}")
        rng = random.Random(f"{seed}:{source.source}")
        rows.train += capped(train, source.max_rows, rng, f"over max_rows {source.max_rows}")
        rows.test += [row for row in read if row.is_test]
    return rows


def _fitted(rows: Iterable[Row[Canonical]], fit: Fit | None) -> list[Row[Canonical]]:
    """Return the rows with tool calls as the chat template writes them; leave out those that it can't write."""
    fitted = []
    for row in rows:
        if has_tools(row.values):
            try:
                if fit is None:
                    raise BadRow(
                        "tool calls or a tool's turn, which only a model's chat template can write; name the model"
                    )
                row.values = fit(row.values)
            except BadRow as reason:
                row.report.drop(row.number, str(reason))
                continue
        fitted.append(row)
    return fitted


def share_of(row: Row[Canonical], salt: str) -> float:
    """Return a number in [0, 1) that is the same for all rows of a conversation.

    Prompts of one conversation or tree have each other's answers in them, so they stay together.
    """
    return share_of_text(row.conversation, salt)


def share_of_text(text: str, salt: str) -> float:
    """Return a number in [0, 1) that follows from a text."""
    digest = hashlib.sha256(f"{salt}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def drop_rows(rows: Iterable[Row[Canonical]], reason: str) -> None:
    """Count rows that are left out."""
    for row in rows:
        row.report.drop(row.number, reason)


def keep_only(rows: Sequence[Row[Canonical]], kept: list[Row[Canonical]], reason: str) -> list[Row[Canonical]]:
    """Return the rows that are kept; count the others in their reports."""
    kept_ids = {id(row) for row in kept}
    drop_rows((row for row in rows if id(row) not in kept_ids), reason)
    return kept


def capped(rows: Sequence[Row[Canonical]], most: int | None, rng: random.Random, reason: str) -> list[Row[Canonical]]:
    """Keep at most so many rows, in their order, by a seeded draw; count the others in their reports."""
    if most is None or len(rows) <= most:
        return list(rows)
    chosen = sorted(rng.sample(range(len(rows)), most))
    return keep_only(rows, [rows[index] for index in chosen], reason)


def count_kept(reports: list[ReadReport], written: Iterable[Sequence[Row[PromptRow]]]) -> None:
    """Record in every report how many of its rows ended up in a file: all those that what is written was made of."""
    kept: dict[int, set[int]] = {}
    for rows in written:
        for row in rows:
            kept.setdefault(id(row.report), set()).update((row.number, *row.others))
    for report in reports:
        report.kept = len(kept.get(id(report), ()))
