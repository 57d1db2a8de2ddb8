"""Read what a recipe names, split it by conversation, and write the files that the stages read."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.data.leakage import JudgedConversations, Leakage, Parts, without_leaks
from rlhf.data.order import in_drawn_order
from rlhf.data.ratings import RatingReader, RatingScale
from rlhf.data.read import ReadReport, is_local
from rlhf.data.repeats import deduplicated, say_same_names
from rlhf.data.rows import CRITIQUES, TIE, Compare, Messages, Pair, PromptRow, Rated
from rlhf.data.sources import (
    Canonical,
    Fit,
    Row,
    Rows,
    Source,
    capped,
    count_kept,
    drop_rows,
    keep_only,
    read_sources,
    share_of,
    to_demonstrations,
    to_pairs,
    to_prompts,
)
from rlhf.data.tables import folder_splits
from rlhf.errors import UserError
from rlhf.files import write_jsonl

HELD_OUT = "held out: its prompt, or another of its conversation, is on the test side"
NO_TEST = (
    "Held out is data.test_fraction of the prompts, drawn by their texts and the seed. A few rows, pairs that a run of the same "
    "seed trained on, and answers of which no two share a prompt leave nothing to test on; name a file under data.test."
)
UNTESTABLE = "a tie, which nothing can be tested on"


@dataclass(frozen=True)
class DataSources:
    """Sources of a run. Without `preferences` there must be `prompts`; their answers are sampled and labelled later.

    With `shuffle`, rows are written in an order drawn at random: sources lie one behind the other, and files are often sorted, so
    the first rows, on which policies are evaluated and scores put on their scale, would be of one kind.

    With `ratings`, the answers of `preferences` are read with their ratings too, and need not make pairs. With `critiques`, some
    pairs must have critiques of both answers.
    """

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
    max_characters: int | None = None
    leakage: Leakage = "refuse"
    compare: Compare = "answers"
    shuffle: bool = True
    ratings: RatingScale | None = None
    critiques: bool = False


def prepare_data(folder: Path, sources: DataSources, *, seed: int, fit: Fit | None = None) -> dict[str, Any]:
    """Write `sft.jsonl`, `pairs.jsonl`, `test_pairs.jsonl`, `prompts.jsonl`, `test_prompts.jsonl`, and `ratings.jsonl` if wanted.

    Splits are by conversation: all rows of one prompt, and of the turns that follow it, lie on one side. The test side is what
    `data.test`, rows that say `split: test` or a hub dataset's own test split give; a source that gives none has a share
    `test_fraction` of its conversations held out. No prompt of the test side is practised on in SFT, reward training or PPO:
    where we hold out, the training rows of that conversation are left out; where the files put a prompt on both sides, that is
    refused, unless `leakage` says to drop those training rows or to allow them. Other prompts of one conversation on both sides
    are told of, and `drop` drops them too.

    Args:
        fit: writes tool calls as the model's chat template does (`rlhf.models.tools`); without it, their rows are left out.

    Returns:
        `rows`, how many were written by file; `read`, what every reader kept and dropped; `sentences`, the same in words.

    Raises:
        UserError: a source holds nothing that can be used; the given test side leaks into the training side; no pair has
            critiques, where some are wanted.
    """
    reports: list[ReadReport] = []

    # 1. Pairs, rated answers, prompts, demonstrations; and which prompts are held out.
    pairs, held_out, split = _read_pairs(sources, reports, seed, fit)
    pairs = _short_enough(pairs, sources.max_characters)
    rated, rated_and_held_out = _read_ratings(sources, split, reports, seed, fit)
    rated = _short_enough(rated, sources.max_characters)
    prompts, prompts_held_out = _read_prompts(sources, [*pairs.train, *rated.train], pairs.test, reports, seed, fit)
    prompts = _short_enough(prompts, sources.max_characters)
    held_out |= rated_and_held_out | prompts_held_out
    sft = read_sources(sources.sft, to_demonstrations, reports, "demonstrations", seed, fit=fit)
    drop_rows(sft.test, "marked as test")
    sft = _short_enough(sft, sources.max_characters)

    # 2. Nothing of the test side stays on the training side.
    parts: Parts = {"pairs": pairs.train, "prompts": prompts.train, "demonstrations": sft.train}
    parts = {**parts, "ratings": rated.train} if sources.ratings is not None else parts
    derived = () if sources.prompts else ("prompts",)
    test = [*pairs.test, *prompts.test]
    ours = JudgedConversations(held_out, test, parts)
    parts = {
        name: keep_only(rows, [row for row in rows if not ours.hold(row)], HELD_OUT) for name, rows in parts.items()
    }
    parts = without_leaks(parts, test, sources.leakage, held_out=held_out, derived=derived)

    # 3. Caps, by a seeded draw, and files.
    rng = random.Random(seed)
    balanced = _per_prompt(parts["pairs"], sources.max_pairs_per_prompt, rng)
    written: Parts = {
        "sft": capped(parts["demonstrations"], sources.max_sft, rng, "over data.max_sft"),
        "pairs": capped(balanced, sources.max_pairs, rng, "over data.max_pairs"),
        "test_pairs": pairs.test,
        "prompts": capped(_unique(parts["prompts"]), sources.max_prompts, rng, "over data.max_prompts"),
        "test_prompts": prompts.test,
        "ratings": parts.get("ratings", ()),
    }
    absent = {"sft": not sources.sft, "pairs": not sources.preferences, "ratings": sources.ratings is None}
    absent["test_pairs"] = absent["pairs"] and not sources.test
    absent["pairs"] = absent["pairs"] or (sources.ratings is not None and not balanced)
    written = {name: rows for name, rows in written.items() if not absent.get(name)}
    count_kept(reports, written.values())
    if sources.critiques:
        _check_critiques(written.get("pairs", []))
    if sources.shuffle:
        written = {name: in_drawn_order(rows, name, seed) for name, rows in written.items()}
    _write(folder, written, reports)
    return {
        "rows": {name: len(rows) for name, rows in written.items()},
        "read": [report.as_dict() for report in reports],
        "sentences": [sentence for report in reports for sentence in report.sentences()],
    }


# ---- Reading ----


def _read_pairs(
    sources: DataSources, reports: list[ReadReport], seed: int, fit: Fit | None
) -> tuple[Rows[Pair], set[str], list[Source]]:
    """Read all pairs.

    Returns:
        the pairs, each once; the conversations (`Row.conversation`) that are held out from sources without a test side; these
        sources.
    """
    pairs: Rows[Pair] = Rows()
    held_out: set[str] = set()
    split: list[Source] = []
    for source in sources.preferences:
        read = read_sources([source], to_pairs, reports, "pairs", seed, fit=fit, compare=sources.compare)
        if len(sources.preferences) > 1:
            for row in read.train + read.test:
                row.values.setdefault("source", source.source)
        if not sources.test and not read.test and _may_have_test_side(source):
            read.test = _own_test_side(source, reports, seed, fit, sources.compare)
        if not sources.test and not read.test:
            split.append(source)
            read.test = [row for row in read.train if _is_held_out(row, sources.test_fraction, seed)]
            held_out |= {row.conversation for row in read.test}
            read.train = [row for row in read.train if row.conversation not in held_out]
        say_same_names(source, pairs, read, reports)
        pairs = Rows(pairs.train + read.train, pairs.test + read.test)
    if sources.test:
        drop_rows(pairs.test, "marked as test, but data.test is given")
        given = read_sources(
            sources.test, to_pairs, reports, "pairs, test", seed, split="test", fit=fit, compare=sources.compare
        )
        pairs.test = given.train  # of a split that is asked for as the test side no row is apart
    decided = [row for row in pairs.test if row.values.get("confidence") != TIE]
    train, test = deduplicated(pairs.train, by_annotator=True), keep_only(pairs.test, decided, UNTESTABLE)
    return Rows(train, deduplicated(test)), held_out, split


def _read_ratings(
    sources: DataSources, split: Sequence[Source], reports: list[ReadReport], seed: int, fit: Fit | None
) -> tuple[Rows[Rated], set[str]]:
    """Read the answers of the preferences with their ratings, where they are wanted.

    Args:
        split: those of the preferences that have no test side of their own.

    Returns:
        those to train on, and the conversations that are held out from sources without a test side.

    Raises:
        UserError: a rating outside its scale, an attribute that nobody rated.
    """
    rated: Rows[Rated] = Rows()
    if sources.ratings is None:
        return rated, set()
    reader = RatingReader(sources.ratings)
    held_out: set[str] = set()
    for source in sources.preferences:
        read = read_sources([source], reader.read, reports, "ratings", seed, fit=fit)
        drop_rows(read.test, "marked as test")
        if source in split and not read.test:
            held_out |= {row.conversation for row in read.train if _is_held_out(row, sources.test_fraction, seed)}
        rated.train += read.train
    reader.check()
    return rated, held_out


def _read_prompts(
    sources: DataSources,
    answered: Sequence[Row[PromptRow]],
    compared: Sequence[Row[Pair]],
    reports: list[ReadReport],
    seed: int,
    fit: Fit | None,
) -> tuple[Rows[PromptRow], set[str]]:
    """Read the prompts of their own file, or else take those of the answers.

    Args:
        answered: the rows that are trained on.
        compared: the pairs of the test side.

    Returns:
        the prompts, those of the test side each once, and the conversations that are held out from a file without a test side.
    """
    prompts = read_sources(sources.prompts, to_prompts, reports, "prompts", seed, fit=fit)
    held_out: set[str] = set()
    if not sources.prompts:  # what is left out of these is no loss to report
        derived = ReadReport("the pairs' prompts")
        prompts.train = [_prompt_of(row, derived) for row in answered]
    if sources.test_prompts:
        given = read_sources(sources.test_prompts, to_prompts, reports, "prompts, test", seed, split="test", fit=fit)
        prompts.test = given.train
    elif sources.prompts and not prompts.test:
        prompts.test = [row for row in prompts.train if _is_held_out(row, sources.test_fraction, seed)]
        held_out = {row.conversation for row in prompts.test}
    elif not sources.prompts:
        prompts.test = [_prompt_of(row, row.report) for row in compared]
    return Rows(prompts.train, _unique(prompts.test)), held_out


def _prompt_of(row: Row[Any], report: ReadReport) -> Row[PromptRow]:
    return Row({"prompt": row.values["prompt"]}, row.number, report, conversation=row.conversation)


def _may_have_test_side(source: Source) -> bool:
    """Tell whether a source may have a test split of its own, and was not asked for another than its training split."""
    if source.split not in (None, "train"):
        return False
    return not is_local(source.source) or "test" in folder_splits(source.source, source.config)


def _own_test_side(
    source: Source, reports: list[ReadReport], seed: int, fit: Fit | None, compare: Compare
) -> list[Row[Pair]]:
    """Read the test split of a hub dataset or a folder; return no row if it has none."""
    before = len(reports)
    whole = replace(source, split="test", fraction=1.0, max_rows=None)
    try:
        return read_sources(
            [whole], to_pairs, reports, "pairs, test", seed, split="test", fit=fit, compare=compare
        ).train
    except UserError as error:
        if isinstance(error.__cause__, ValueError) and "split" in str(error.__cause__).lower():
            del reports[before:]
            return []
        raise


# ---- Splitting, cleaning, capping ----


def _short_enough(rows: Rows[Canonical], most: int | None) -> Rows[Canonical]:
    """Leave out the conversations of more than so many characters, the longest answer counted; all stay where `most` is None."""
    if most is None:
        return rows
    reason = f"over data.max_characters={most}"
    kept = (
        keep_only(side, [row for row in side if _characters(row.values) <= most], reason)
        for side in (rows.train, rows.test)
    )
    return Rows(*kept)


def _characters(row: Mapping[str, Any]) -> int:
    """Return the characters of a row's prompt and its longest answer."""

    def length(messages: Messages) -> int:
        return sum(len(message["content"]) for message in messages)

    answers = [length(row[name]) for name in ("chosen", "rejected", "completion") if name in row]
    return length(row["prompt"]) + max(answers, default=0)


def _is_held_out(row: Row[Canonical], fraction: float, seed: int) -> bool:
    return share_of(row, str(seed)) < fraction


def _unique(rows: Sequence[Row[Canonical]]) -> list[Row[Canonical]]:
    return list({row.key: row for row in reversed(rows)}.values())[::-1]


def _per_prompt(rows: Sequence[Row[Canonical]], most: int | None, rng: random.Random) -> list[Row[Canonical]]:
    """Keep at most so many pairs of one prompt, so that a long ranking does not outvote the rest."""
    if most is None:
        return list(rows)
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row.key, []).append(index)
    chosen = {i for group in places.values() for i in (group if len(group) <= most else rng.sample(group, most))}
    return keep_only(rows, [row for i, row in enumerate(rows) if i in chosen], f"over data.max_pairs_per_prompt {most}")


# ---- Writing ----


def _write(folder: Path, written: Parts, reports: Sequence[ReadReport]) -> None:
    """Write a file a part.

    Raises:
        UserError: a part is empty; a column stands in some of the pairs only.
    """
    empty = [name for name, rows in written.items() if not rows]
    if empty:
        details = [sentence for report in reports for sentence in report.sentences()]
        if any(name.startswith("test") for name in empty):
            details.insert(0, NO_TEST)
        raise UserError([f"data: nothing is left for {', '.join(empty)}.", *details])
    _check_columns(written.get("pairs", []))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in written.items():
        write_jsonl(folder / f"{name}.jsonl", [row.values for row in rows])


def _check_critiques(pairs: Sequence[Row[PromptRow]]) -> None:
    """Refuse pairs of which none has critiques: nobody could learn from them how a critique is written."""
    if not any(name in row.values for row in pairs for name in CRITIQUES):
        raise UserError(
            f"data.preferences: none of {len(pairs)} pairs has critiques, which reward.extra: critique learns to write; give some "
            f"pairs the columns {' and '.join(CRITIQUES)}, texts that say what is good and bad about each answer."
        )


def _check_columns(pairs: Sequence[Row[PromptRow]]) -> None:
    """Refuse a column that only some pairs have: it can't be trained on, and nothing is filled in.

    A confidence that a layout makes says that annotators called the answers equal, or did not agree: pairs without are certain.
    """
    columns = {name for row in pairs for name in row.values if name != "confidence" or not row.makes_confidence}
    problems = [
        f"data.preferences: {missing} of {len(pairs)} pairs have no {name!r}; give it to all or to none."
        for name in sorted(columns & {"margin", "confidence", "weight"})
        if (
            missing := sum(
                name not in row.values and not (name == "confidence" and row.makes_confidence) for row in pairs
            )
        )
    ]
    if problems:
        raise UserError(problems)
