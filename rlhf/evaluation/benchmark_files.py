"""Files of published benchmarks, recognised by their columns: RewardBench 1 and 2, RM-Bench, PPE, JudgeBench, LLMBar.

A benchmark's figure means something only on all of its rows, so a file with missing parts or a row that can't be read is refused.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.data.messages import messages
from rlhf.data.read import BadRow, ReadReport, is_local, read_rows
from rlhf.data.rows import Messages, user_turn
from rlhf.data.sides import named_side
from rlhf.data.sources import Source
from rlhf.data.tables import folder_splits, is_folder, is_folder_of_files
from rlhf.errors import UserError
from rlhf.evaluation.benchmarks import (
    REWARD_BENCH,
    REWARD_BENCH_2,
    RM_BENCH,
    STYLES,
    TIES,
    Arithmetic,
    Item,
    by_pairs,
    ppe_correctness,
    reward_bench,
    reward_bench_2,
    rm_bench,
)

Row = Mapping[str, Any]
# Names of splits that hold a benchmark, in this order; RewardBench calls the cleaned rows "filtered".
SPLITS = ("test", "filtered")
SHOWN_ROWS = 5
REWARD_BENCH_SUBSETS = [name for names in REWARD_BENCH.values() for name in names]
JUDGE_BENCH = {
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}
PPE_TAGS = {
    "hard_prompt": "hard",
    "easy_prompt": "easy",
    "if_prompt": "instruction following",
    "math_prompt": "math",
    "is_code": "code",
}


class NoLabel(Exception):
    """A row without a better answer, which the benchmark itself leaves out, with the reason."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that was read.

    Attributes:
        sentence: what was recognised, by which columns, for a person.
        report: which rows were read and left out.
    """

    name: str
    sentence: str
    items: list[Item]
    arithmetic: Arithmetic
    report: ReadReport


@dataclass(frozen=True)
class _Format:
    """The file format of a benchmark.

    Attributes:
        columns: by which it is recognised.
        says: what its columns mean, for a person.
        read: makes an item of a row, or raises BadRow or NoLabel.
        arithmetic: of all items.
        matches: what else rows must have, beside the columns.
        subsets: those that must all be there, or None.
        parts_are_published: whether one subset alone is a file too, or rows without a subset.
    """

    name: str
    columns: tuple[str, ...]
    says: str
    read: Callable[[Row], Item]
    arithmetic: Callable[[Sequence[Item]], Arithmetic]
    matches: Callable[[Sequence[Row]], bool] = lambda rows: True
    subsets: Sequence[str] | None = None
    parts_are_published: bool = False


def read_benchmark(source: str | Source) -> Benchmark | None:
    """Read a file or hub dataset if it has a published benchmark's columns; otherwise return None.

    Args:
        source: a file, a hub dataset, or a hub dataset with a split behind a colon, "org/name:split".

    Raises:
        UserError: a subset is missing or unknown, or a row can't be read; no such file, dataset or split.
    """
    given = Source(source) if isinstance(source, str) else source
    name, part = given.source, named_split(given)
    report = ReadReport(name)
    split, is_named = part.split or SPLITS[0], part.split is not None
    numbered = list(read_rows(part.source, report, split=split, config=part.config, is_named=is_named))
    rows = [row for _, row in numbered if isinstance(row, dict)]
    columns = _common_columns(rows)
    form = next((form for form in FORMATS if columns >= set(form.columns) and form.matches(rows)), None)
    if form is None:
        return None
    bad = {reason: list(report.examples[reason]) for reason in report.dropped}
    items = _items(form, numbered, report, bad)
    problems = [
        f"row {_shown(rows)}: {reason}. Its figures need every row; take the published file."
        for reason, rows in bad.items()
    ]
    problems += _subset_problems(form, items)
    if problems:
        raise UserError([f"{name}: {form.name}: {problem}" for problem in problems])
    report.kept = len(items)
    named = ", ".join(f"`{column}`" for column in form.columns)
    sentence = f"{name}: read as {form.name}, for it has the columns {named}; {form.says}; {len(items)} rows."
    return Benchmark(form.name, sentence, items, form.arithmetic(items), report)


def named_split(source: Source) -> Source:
    """Return a source with its split, where it is a hub dataset's or a folder's and names none: as `choose_split` has it."""
    if source.split is not None:
        return source
    name, split = choose_split(source.source, config=source.config)
    stays = name == source.source and is_local(name) and not is_folder_of_files(name)
    return source if stays else replace(source, source=name, split=split)


def choose_split(source: str, *, config: str | None = None) -> tuple[str, str]:
    """Return the name of a source and the split to read: the one behind its colon, else the one that holds the benchmark.

    Args:
        config: of a hub dataset.

    Raises:
        UserError: a dataset with several splits, of which none is known to be the one; a folder that can't be read.
    """
    name, colon, split = source.partition(":")
    if is_local(source) and not is_folder_of_files(name) and not (colon and is_folder(name)):
        return source, SPLITS[0]
    if colon:
        return name, split
    from datasets import get_dataset_split_names

    if is_folder(name):
        splits = folder_splits(name, config)
    else:
        try:
            splits = get_dataset_split_names(name, config)
        except Exception:  # no network or no such dataset: reading it says so
            return name, SPLITS[0]
    chosen = [known for known in SPLITS if known in splits] or (splits if len(splits) == 1 else [])
    if not chosen:
        raise UserError(f"{source}: it has the splits {', '.join(splits)}; name one, such as {name}:{splits[0]}.")
    return name, chosen[0]


def _items(
    form: _Format, numbered: Iterable[tuple[int, object]], report: ReadReport, bad: dict[str, list[int]]
) -> list[Item]:
    """Make items of rows; enter rows that can't be read in `bad`, by reason, and count those without a label."""
    items: list[Item] = []
    for number, row in numbered:
        try:
            if not isinstance(row, dict):
                raise BadRow("no object")
            items.append(form.read(row))
        except BadRow as reason:
            bad.setdefault(str(reason), []).append(number)
        except NoLabel as reason:
            report.drop(number, str(reason))
    return items


def _shown(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return ", ".join(map(str, rows[:SHOWN_ROWS])) + more


def _subset_problems(form: _Format, items: Sequence[Item]) -> list[str]:
    """Return a sentence about subsets that are unknown, and one about those that are missing."""
    if form.subsets is None:
        return []
    names = {item.subset for item in items}
    if form.parts_are_published and names == {""}:
        return []
    problems = []
    for unknown in sorted(names - set(form.subsets)):
        close = difflib.get_close_matches(unknown, form.subsets, n=1)
        problems.append(f"unknown subset {unknown!r}" + (f"; did you mean {close[0]!r}?" if close else "."))
    missing = [name for name in form.subsets if name not in names]
    if missing and not (form.parts_are_published and len(names) == 1):
        problems.append(
            f"no rows of {len(missing)} of its {len(form.subsets)} subsets ({', '.join(missing)}); its figures need all of "
            "them. Take the published file; without its column `subset` the rows are evaluated as ordinary pairs."
        )
    return problems


def _common_columns(rows: Sequence[Row]) -> set[str]:
    """Return the columns that at least half of the rows have."""
    counts: dict[str, int] = {}
    for row in rows:
        for name in row:
            counts[name] = counts.get(name, 0) + 1
    return {name for name, count in counts.items() if 2 * count >= len(rows)}


# ---- What a row of each format holds ----


def _reward_bench(row: Row) -> Item:
    answers = [_text(row, "chosen", "chosen answer"), _text(row, "rejected", "rejected answer")]
    return Item(_prompt(row, "prompt"), answers, [1, 0], [(0, 1)], subset=str(row.get("subset")))


def _reward_bench_2(row: Row) -> Item:
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    subset, identity = str(row.get("subset")), str(row.get("id"))
    subset = TIES if subset.lower() == TIES.lower() else subset
    if subset == TIES and identity.partition(":")[0] not in ("ref", "tied"):
        raise BadRow(f"the `id` of a row of the Ties subset is ref:… or tied:…, not {identity}")
    pairs = [(i, len(chosen) + j) for i in range(len(chosen)) for j in range(len(rejected))]
    labels = [1] * len(chosen) + [0] * len(rejected)
    return Item(_prompt(row, "prompt"), chosen + rejected, labels, pairs, subset=subset, identity=identity)


def _rm_bench(row: Row) -> Item:
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    if (len(chosen), len(rejected)) != (STYLES, STYLES):
        raise BadRow(f"{len(chosen)} chosen and {len(rejected)} rejected answers, not {STYLES} of each (a style each)")
    domain = str(row.get("domain", ""))
    known = next((name for name in RM_BENCH if domain.startswith(name)), domain)  # safety-refuse, safety-response
    pairs = [(i, STYLES + j) for i in range(STYLES) for j in range(STYLES)]
    labels = [1] * STYLES + [0] * STYLES
    return Item(_prompt(row, "prompt"), chosen + rejected, labels, pairs, subset=known)


def _ppe_human(row: Row) -> Item:
    answers = [_text(row, "response_1", "first response"), _text(row, "response_2", "second response")]
    winner = str(row.get("winner"))
    side = named_side(winner)
    if side is None and winner.startswith("tie"):
        raise NoLabel("a tie of the voter, which has no better answer")
    if side is None:
        raise BadRow(f"`winner` is {winner!r}, neither model_a, model_b nor a tie")
    tags = [name for column, name in PPE_TAGS.items() if row.get(column)]
    return _pair(_prompt(row, "prompt"), answers, first_is_better=side == "first", tags=tags)


def _ppe_correctness(row: Row) -> Item:
    scores = row["scores"]
    answers = [_text(row, f"response_{i + 1}", f"response_{i + 1}") for i in range(len(scores))]
    pairs = []
    for first, second in row["sampled_conflict_pairs"]:
        if not (0 <= first < len(scores) and 0 <= second < len(scores)) or scores[first] == scores[second]:
            raise BadRow(f"`sampled_conflict_pairs` names {first} and {second}, which are no right and wrong response")
        pairs.append((first, second) if scores[first] > scores[second] else (second, first))
    return Item(_prompt(row, "prompt"), answers, [float(score) for score in scores], pairs)


def _judge_bench(row: Row) -> Item:
    answers = [_text(row, "response_A", "response_A"), _text(row, "response_B", "response_B")]
    label = str(row.get("label")).replace(" ", "")
    if label == "A=B":
        raise NoLabel("a tie, which has no better answer")
    if label not in ("A>B", "B>A"):
        raise BadRow(f"`label` is {label!r}, neither A>B nor B>A")
    source = str(row.get("source", ""))
    subset = next((name for name, start in JUDGE_BENCH.items() if source.startswith(start)), source)
    return _pair(_prompt(row, "question"), answers, first_is_better=label == "A>B", subset=subset)


def _llmbar(row: Row) -> Item:
    answers = [_text(row, "output_1", "output_1"), _text(row, "output_2", "output_2")]
    if row.get("label") not in (1, 2):
        raise BadRow(f"`label` is {row.get('label')!r}, neither 1 nor 2")
    return _pair(_prompt(row, "input"), answers, first_is_better=row["label"] == 1)


def _pair(
    prompt: Messages, answers: list[str], *, first_is_better: bool, subset: str = "", tags: Sequence[str] = ()
) -> Item:
    ordered = answers if first_is_better else answers[::-1]
    return Item(prompt, ordered, [1, 0], [(0, 1)], subset=subset, tags=tags)


def _prompt(row: Row, column: str) -> Messages:
    """Return a prompt; a text is one user turn, whatever it looks like."""
    value = row.get(column)
    turns = user_turn(value) if isinstance(value, str) else messages(value, column)
    if not turns or turns[-1]["role"] != "user":
        raise BadRow(f"{column} does not end with a user's turn")
    return turns


def _text(row: Row, column: str, name: str) -> str:
    value = row.get(column)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise BadRow(f"no {name}")
    return value


def _texts(row: Row, column: str) -> list[str]:
    value = row.get(column)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise BadRow(f"no {column} answer")
    return value


def _names_subsets(names: Sequence[str]) -> Callable[[Sequence[Row]], bool]:
    """Return a test of whether rows name one of these subsets."""
    known = {name.lower() for name in names}
    return lambda rows: any(str(row.get("subset")).lower() in known for row in rows)


def _share(rows: Sequence[Row], holds: Callable[[Row], bool]) -> float:
    return sum(map(holds, rows)) / max(1, len(rows))


def _has_lists(row: Row) -> bool:
    return isinstance(row.get("chosen"), list) and all(isinstance(text, str) for text in row["chosen"])


def _has_styles(row: Row) -> bool:
    return _has_lists(row) and len(row["chosen"]) == STYLES


FORMATS = (
    _Format(
        "RewardBench 2",
        ("prompt", "chosen", "rejected", "subset"),
        "lists of right and wrong answers, best of 4, the Ties subset by its own rule",
        _reward_bench_2,
        reward_bench_2,
        lambda rows: _share(rows, _has_lists) >= 0.5 and _names_subsets(REWARD_BENCH_2)(rows),
        REWARD_BENCH_2,
    ),
    _Format(
        "RM-Bench",
        ("prompt", "chosen", "rejected"),
        "three answers a side: concise, detailed, with markdown",
        _rm_bench,
        rm_bench,
        lambda rows: _share(rows, _has_styles) >= 0.5 and any("domain" in row or "subset" in row for row in rows),
        RM_BENCH,
        parts_are_published=True,
    ),
    _Format(
        "RewardBench",
        ("prompt", "chosen", "subset"),
        "four sections of 23 subsets",
        _reward_bench,
        reward_bench,
        _names_subsets(REWARD_BENCH_SUBSETS),
        REWARD_BENCH_SUBSETS,
    ),
    _Format(
        "PPE correctness",
        ("prompt", "response_1", "scores", "sampled_conflict_pairs"),
        "verified answers, compared as its sampled pairs say",
        _ppe_correctness,
        ppe_correctness,
    ),
    _Format(
        "PPE human preference",
        ("prompt", "response_1", "response_2", "winner"),
        "`winner` model_a is the first response",
        _ppe_human,
        lambda items: by_pairs(items, {name: [name] for name in PPE_TAGS.values()}),
    ),
    _Format(
        "JudgeBench",
        ("question", "response_A", "response_B", "label"),
        "`label` A>B says that response_A is better",
        _judge_bench,
        lambda items: by_pairs(items, {name: [name] for name in JUDGE_BENCH}),
    ),
    _Format(
        "LLMBar",
        ("input", "output_1", "output_2", "label"),
        "`label` is the number of the better output",
        _llmbar,
        by_pairs,
    ),
)
