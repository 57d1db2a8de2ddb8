"""Read what a recipe names, split it by prompt, and write the five files that the stages read."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.data.read import ReadReport, is_local
from rlhf.data.sources import (
    Row,
    Rows,
    Source,
    capped,
    count_kept,
    deduplicated,
    drop_rows,
    keep_only,
    read_sources,
    share_of,
    to_demonstrations,
    to_pairs,
    to_prompts,
)
from rlhf.errors import UserError

OURS = "held out: its prompt is on the test side"
LEAK = "its prompt is on the test side that was given"


@dataclass(frozen=True)
class DataSources:
    """What to read. Without `preferences` there must be `prompts`; their answers are sampled and labelled later."""

    preferences: Sequence[Source] = ()
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
        read = read_sources([source], to_pairs, reports, "pairs", seed)
        if len(sources.preferences) > 1:
            for row in read.train + read.test:
                row.values.setdefault("source", source.source)
        if not sources.test and not read.test and not is_local(source.source):
            read.test = _hub_test_side(source, reports, seed)
        if not sources.test and not read.test:
            read.test = [row for row in read.train if _is_held_out(row, sources.test_fraction, seed)]
            held_out |= {row.key for row in read.test}
            read.train = [row for row in read.train if row.key not in held_out]
        pairs += read
    if sources.test:
        drop_rows(pairs.test, "marked as test, but data.test is given")
        given = read_sources(sources.test, to_pairs, reports, "pairs, test", seed, split="test")
        pairs.test = given.train + given.test
    pairs = Rows(deduplicated(pairs.train), deduplicated(pairs.test))

    # 2. Prompts: their own file, or those of the pairs.
    prompts = read_sources(sources.prompts, to_prompts, reports, "prompts", seed)
    if not sources.prompts:  # what is left out of these is no loss to report
        derived = ReadReport("the pairs' prompts")
        prompts.train = [Row({"prompt": row.values["prompt"]}, row.number, derived) for row in pairs.train]
    if sources.test_prompts:
        given = read_sources(sources.test_prompts, to_prompts, reports, "prompts, test", seed, split="test")
        prompts.test = given.train + given.test
    elif sources.prompts and not prompts.test:
        prompts.test = [row for row in prompts.train if _is_held_out(row, sources.test_fraction, seed)]
        held_out |= {row.key for row in prompts.test}
    elif not sources.prompts:
        prompts.test = [Row({"prompt": row.values["prompt"]}, row.number, row.report) for row in pairs.test]
    prompts.test = _unique(prompts.test)

    # 3. Demonstrations.
    sft = read_sources(sources.sft, to_demonstrations, reports, "demonstrations", seed)
    drop_rows(sft.test, "marked as test")

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
        "sft": capped(parts["demonstrations"], sources.max_sft, rng, "over data.max_sft"),
        "pairs": capped(balanced, sources.max_pairs, rng, "over data.max_pairs"),
        "test_pairs": pairs.test,
        "prompts": capped(_unique(parts["prompts"]), sources.max_prompts, rng, "over data.max_prompts"),
        "test_prompts": prompts.test,
    }
    absent = {"sft": not sources.sft, "pairs": not sources.preferences}
    absent["test_pairs"] = absent["pairs"] and not sources.test
    written = {name: rows for name, rows in written.items() if not absent.get(name)}
    count_kept(reports, written.values())
    empty = [name for name, rows in written.items() if not rows]
    if empty:
        details = [sentence for report in reports for sentence in report.sentences()]
        raise UserError([f"data: nothing is left for {', '.join(empty)}.", *details])
    _same_columns([row.values for row in written.get("pairs", [])])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in written.items():
        lines = (json.dumps(row.values, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "rows": {name: len(rows) for name, rows in written.items()},
        "read": [report.as_dict() for report in reports],
        "sentences": [sentence for report in reports for sentence in report.sentences()],
    }


def _hub_test_side(source: Source, reports: list[ReadReport], seed: int) -> list[Row]:
    """A hub dataset's own test split, if it has one."""
    before = len(reports)
    try:
        return read_sources([Source(source.source)], to_pairs, reports, "pairs, test", seed, split="test").train
    except UserError as error:
        if isinstance(error.__cause__, ValueError) and "split" in str(error.__cause__).lower():
            del reports[before:]
            return []
        raise


# ---- Splitting, cleaning, capping ----


def _is_held_out(row: Row, fraction: float, seed: int) -> bool:
    return share_of(row, str(seed)) < fraction


def _without(rows: list[Row], keys: set[str], reason: str) -> list[Row]:
    return keep_only(rows, [row for row in rows if row.key not in keys], reason)


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


def _unique(rows: list[Row]) -> list[Row]:
    return list({row.key: row for row in reversed(rows)}.values())[::-1]


def _per_prompt(rows: list[Row], most: int | None, rng: random.Random) -> list[Row]:
    """At most so many pairs of one prompt, so that a long ranking does not outvote the rest."""
    if most is None:
        return rows
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row.key, []).append(index)
    chosen = {i for group in places.values() for i in (group if len(group) <= most else rng.sample(group, most))}
    return keep_only(rows, [row for i, row in enumerate(rows) if i in chosen], f"over data.max_pairs_per_prompt {most}")


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
