"""Read what a recipe names, split it by prompt, and write the five files that the stages read."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.data.canonical import demonstration, oddities, pair, prompt_key, prompt_only
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
from rlhf.data.read import BadRow, ReadReport, is_local, read_rows
from rlhf.errors import UserError

Convert = Callable[[Any, ReadReport, int], list[dict[str, Any]]]
OURS = "held out: its prompt is on the test side"
LEAK = "its prompt is on the test side that was given"


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


@dataclass(frozen=True)
class DataSources:
    """What to read; all but `preferences` may be absent."""

    preferences: Sequence[Source]
    sft: Sequence[Source] = ()
    prompts: Sequence[Source] = ()
    test: Sequence[Source] = ()
    test_prompts: Sequence[Source] = ()
    test_fraction: float = 0.1
    max_sft: int | None = None
    max_pairs: int | None = None
    max_prompts: int | None = None
    max_pairs_per_prompt: int | None = None
    leakage: Literal["refuse", "drop", "allow"] = "refuse"


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


def prepare_data(folder: Path, sources: DataSources, *, seed: int) -> dict[str, Any]:
    """Write `sft.jsonl`, `pairs.jsonl`, `test_pairs.jsonl`, `prompts.jsonl` and `test_prompts.jsonl`.

    Splits are by prompt: all rows of one prompt lie on one side. The test side is what `data.test`, rows that say
    `split: test` or a hub dataset's own test split give; a source that gives none has a share `test_fraction` of its
    prompts held out. No prompt of the test side is practised on in SFT, reward training or PPO: where we hold out, the
    training rows of that prompt are left out; where the files themselves put a prompt on both sides, that is refused,
    unless `leakage` says to drop those training rows or to allow them.

    Returns:
        rows written by file, and what every reader kept and dropped.

    Raises:
        UserError: a source holds nothing that can be used; the given test side leaks into the training side.
    """
    reports: list[ReadReport] = []

    # 1. Pairs, and which prompts are held out.
    pairs = Rows()
    held_out: set[str] = set()
    for source in sources.preferences:
        read = _read([source], _pairs, reports, "pairs", seed)
        if not sources.test and not read.test and not is_local(source.source):
            read.test = _hub_test_side(source, reports, seed)
        if not sources.test and not read.test:
            read.test = [row for row in read.train if _is_held_out(row, sources.test_fraction, seed)]
            held_out |= {row.key for row in read.test}
            read.train = [row for row in read.train if row.key not in held_out]
        pairs += read
    if sources.test:
        _drop(pairs.test, "marked as test, but data.test is given")
        given = _read(sources.test, _pairs, reports, "pairs, test", seed, split="test")
        pairs.test = given.train + given.test
    pairs = Rows(_deduplicated(pairs.train), _deduplicated(pairs.test))

    # 2. Prompts: their own file, or those of the pairs.
    prompts = _read(sources.prompts, _prompts, reports, "prompts", seed)
    if not sources.prompts:  # what is left out of these is no loss to report
        derived = ReadReport("the pairs' prompts")
        prompts.train = [Row({"prompt": row.values["prompt"]}, row.number, derived) for row in pairs.train]
    if sources.test_prompts:
        given = _read(sources.test_prompts, _prompts, reports, "prompts, test", seed, split="test")
        prompts.test = given.train + given.test
    elif sources.prompts and not prompts.test:
        prompts.test = [row for row in prompts.train if _is_held_out(row, sources.test_fraction, seed)]
        held_out |= {row.key for row in prompts.test}
    elif not sources.prompts:
        prompts.test = [Row({"prompt": row.values["prompt"]}, row.number, row.report) for row in pairs.test]
    prompts.test = _unique(prompts.test)

    # 3. Demonstrations.
    sft = _read(sources.sft, _demonstrations, reports, "demonstrations", seed)
    _drop(sft.test, "marked as test")

    # 4. Nothing of the test side stays on the training side.
    given_keys = {row.key for row in pairs.test + prompts.test} - held_out
    parts = {"pairs": pairs.train, "prompts": prompts.train, "demonstrations": sft.train}
    parts = {name: _without(rows, held_out, OURS) for name, rows in parts.items()}
    _check_leakage(
        {n: rows for n, rows in parts.items() if n != "prompts" or sources.prompts}, given_keys, sources.leakage
    )
    if sources.leakage == "drop":
        parts = {name: _without(rows, given_keys, LEAK) for name, rows in parts.items()}

    # 5. Caps, by a seeded draw, and files.
    rng = random.Random(seed)
    balanced = _per_prompt(parts["pairs"], sources.max_pairs_per_prompt, rng)
    written = {
        "sft": _capped(parts["demonstrations"], sources.max_sft, rng, "over data.max_sft"),
        "pairs": _capped(balanced, sources.max_pairs, rng, "over data.max_pairs"),
        "test_pairs": pairs.test,
        "prompts": _capped(_unique(parts["prompts"]), sources.max_prompts, rng, "over data.max_prompts"),
        "test_prompts": prompts.test,
    }
    if not sources.sft:
        del written["sft"]
    _count_kept(reports, written.values())
    empty = [name for name, rows in written.items() if not rows]
    if empty:
        details = [sentence for report in reports for sentence in report.sentences()]
        raise UserError([f"data: nothing is left for {', '.join(empty)}.", *details])
    _same_columns([row.values for row in written["pairs"]])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in written.items():
        lines = (json.dumps(row.values, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "rows": {name: len(rows) for name, rows in written.items()},
        "read": [report.as_dict() for report in reports],
        "sentences": [sentence for report in reports for sentence in report.sentences()],
    }


def read_pairs(source: str, *, split: str = "test") -> tuple[list[dict[str, Any]], ReadReport]:
    """All canonical pairs of one source, in any accepted form, repeats and contradictions left out.

    Raises:
        UserError: there is none.
    """
    reports: list[ReadReport] = []
    read = _read([Source(source)], _pairs, reports, "pairs", 0, split=split)
    rows = _deduplicated(read.train + read.test)
    _count_kept(reports, [rows])
    if not rows:
        raise UserError([f"{source}: holds no usable pair.", *reports[0].sentences()])
    return [row.values for row in rows], reports[0]


def read_rankings(source: str, *, split: str = "test") -> list[Ranking]:
    """The rankings of three answers or more in one source; what is wrong with other rows `read_pairs` has said."""
    found: list[Ranking] = []
    for _, row in read_rows(source, ReadReport(source), split=split):
        try:
            found += [r for r in (rankings(row) if is_ranking(row) else []) if len(r.answers) > 2]
        except BadRow:
            continue
    return found


# ---- Reading ----


def _pairs(row: Any, report: ReadReport, number: int) -> list[dict[str, Any]]:
    if not is_ranking(row):
        return [pair(row)]
    found = [canonical for ranking in rankings(row) for canonical in comparisons(ranking)]
    report.note(number, "pairs made of rankings", count=len(found))
    return found


def _demonstrations(row: Any, report: ReadReport, number: int) -> list[dict[str, Any]]:
    if not is_ranking(row):
        return [demonstration(row)]
    return [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": content}]}
        for prompt, content in best_answers(row)
    ]


def _prompts(row: Any, report: ReadReport, number: int) -> list[dict[str, Any]]:
    if not is_ranking(row):
        return [prompt_only(row)]
    return [{"prompt": prompt} for prompt, _ in best_answers(row)]


def _read(
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
                if convert is _pairs and is_rated(row):
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
            kept = [row for row in found.train if _share(row, f"{seed}:fraction") < source.fraction]
            found.train = _only(found.train, kept, f"outside the fraction {source.fraction}")
        rng = random.Random(f"{seed}:{source.source}")
        found.train = _capped(found.train, source.max_rows, rng, f"over max_rows {source.max_rows}")
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


def _hub_test_side(source: Source, reports: list[ReadReport], seed: int) -> list[Row]:
    """A hub dataset's own test split, if it has one."""
    before = len(reports)
    try:
        return _read([Source(source.source)], _pairs, reports, "pairs, test", seed, split="test").train
    except UserError as error:
        if isinstance(error.__cause__, ValueError) and "split" in str(error.__cause__).lower():
            del reports[before:]
            return []
        raise


# ---- Splitting, cleaning, capping ----


def _share(row: Row, salt: str) -> float:
    digest = hashlib.sha256(f"{salt}:{row.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _is_held_out(row: Row, fraction: float, seed: int) -> bool:
    return _share(row, str(seed)) < fraction


def _drop(rows: Iterable[Row], reason: str) -> None:
    for row in rows:
        row.report.drop(row.number, reason)


def _only(rows: list[Row], kept: list[Row], reason: str) -> list[Row]:
    """The rows kept, the others counted."""
    stay = {id(row) for row in kept}
    _drop((row for row in rows if id(row) not in stay), reason)
    return kept


def _without(rows: list[Row], keys: set[str], reason: str) -> list[Row]:
    return _only(rows, [row for row in rows if row.key not in keys], reason)


def _check_leakage(parts: dict[str, list[Row]], given: set[str], leakage: str) -> None:
    """Refuse training rows whose prompt was given as a test prompt, or note them where they are allowed."""
    leaks = [(name, row) for name, rows in parts.items() for row in rows if row.key in given]
    if not leaks or leakage == "drop":
        return
    if leakage == "allow":
        for _, row in leaks:
            row.report.note(row.number, f"trained on, though {LEAK}")
        return
    counts = {name: count for name in parts if (count := sum(where == name for where, _ in leaks))}
    first = leaks[0][1]
    raise UserError(
        f"data: {len(leaks)} training rows ({', '.join(f'{n} of {name}' for name, n in counts.items())}) have a prompt that is "
        f"also on the given test side, first {first.report.source}, row {first.number}; results on it would be too good. Take "
        "them out, or set data.leakage: drop (they are left out of training) or allow."
    )


def _deduplicated(rows: list[Row]) -> list[Row]:
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


def _unique(rows: list[Row]) -> list[Row]:
    return list({row.key: row for row in reversed(rows)}.values())[::-1]


def _capped(rows: list[Row], most: int | None, rng: random.Random, reason: str) -> list[Row]:
    if most is None or len(rows) <= most:
        return rows
    chosen = sorted(rng.sample(range(len(rows)), most))
    return _only(rows, [rows[index] for index in chosen], reason)


def _per_prompt(rows: list[Row], most: int | None, rng: random.Random) -> list[Row]:
    """At most so many pairs of one prompt, so that a long ranking does not outvote the rest."""
    if most is None:
        return rows
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row.key, []).append(index)
    chosen = {i for group in places.values() for i in (group if len(group) <= most else rng.sample(group, most))}
    return _only(rows, [row for i, row in enumerate(rows) if i in chosen], f"over data.max_pairs_per_prompt {most}")


def _count_kept(reports: list[ReadReport], written: Iterable[list[Row]]) -> None:
    kept: dict[int, set[int]] = {}
    for rows in written:
        for row in rows:
            kept.setdefault(id(row.report), set()).add(row.number)
    for report in reports:
        report.kept = len(kept.get(id(report), ()))


def _same_columns(rows: list[dict[str, Any]]) -> None:
    """A column that only some pairs have can't be trained on; nothing is filled in."""
    columns = {name for row in rows for name in row} & {"margin", "confidence", "weight"}
    problems = [
        f"data.preferences: {missing} of {len(rows)} pairs have no {name!r}; give it to all or to none."
        for name in sorted(columns)
        if (missing := sum(name not in row for row in rows))
    ]
    if problems:
        raise UserError(problems)
