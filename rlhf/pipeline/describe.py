"""`rlhf data`: what a file is taken for, and how a model will read it."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from rlhf.data.canonical import EXTRAS
from rlhf.data.columns import unread_parts
from rlhf.data.layouts import find_layout
from rlhf.data.rankings import second_response
from rlhf.data.read import BadRow, ReadReport, read_rows
from rlhf.data.repeats import deduplicated
from rlhf.data.rows import Compare, Pair, Side, asked, has_ended, has_tools, sure_where_unsaid, told
from rlhf.data.sources import (
    Row,
    Rows,
    Source,
    count_kept,
    read_sources,
    to_demonstrations,
    to_pairs,
    to_prompts,
)
from rlhf.errors import UserError
from rlhf.files import json_lines, write_text
from rlhf.models.generate import encode_prompts
from rlhf.models.load import find_source, load_tokenizer
from rlhf.models.text import encode_answers, plain
from rlhf.models.tools import ToolTemplate
from rlhf.pipeline.training import quiet_libraries
from rlhf.report.result_file import check_result_file

SHOWN_ROWS = 3
SIDES: tuple[Any, ...] = ("chosen", "rejected", "completion")  # of pairs and of demonstrations
# What canonical rows are called, and what reads them, in the order in which a file is tried.
KINDS: tuple[tuple[str, Callable[..., Iterator[Row[Any]]]], ...] = (
    ("pairs", to_pairs),
    ("demonstrations", to_demonstrations),
    ("prompts", to_prompts),
)


class ReadFile(NamedTuple):
    """A file as it was read.

    Attributes:
        kind: what its rows are.
        no_pairs: where it is a file of preferences none of which can be used: what is said of them.
    """

    kind: str
    rows: list[Row[Any]]
    report: ReadReport
    no_pairs: list[str]


def describe_data(
    source: Source, *, model: str | None, out: Path | None, say: Callable[[str], None], compare_as: Compare = "answers"
) -> None:
    """Say what a source is taken for: layout, columns, direction, three rows, lengths, what is left out and why.

    Args:
        model: whose template and tokenizer the rows are shown with; None for the texts alone.
        out: where to write all canonical rows, as JSON lines.
        compare_as: whether pairs that part before their last turn are left out, or compared as whole conversations.

    Raises:
        UserError: no usable row; the file to be written is there already.
    """
    quiet_libraries()
    if out is not None:
        check_result_file(out, "--out")
    tokenizer = None if model is None else load_tokenizer(find_source(model).base, conversational=True, pads=False)

    # 1. What it is taken for.
    read = _read(source, compare_as)
    say(f"{source.source}: {_columns(source)}")
    say(f"layout: {_layout(source)}; read as {read.kind}")
    for sentence in (*read.no_pairs, *_unread(source, read)):
        say(sentence)
    kept, fitted = read.rows, [row for row in read.rows if not has_tools(row.values)]
    if tokenizer is not None:
        kept, fitted = _fitted(read, tokenizer, str(model))
    count_kept([read.report], [kept])
    for sentence in (*read.report.directions.values(), *read.report.sentences()):
        if not sentence.startswith("  ") or sentence.strip() not in read.report.directions.values():
            say(sentence)

    # 2. Rows as they are read, and lengths.
    for row in fitted[:SHOWN_ROWS]:
        for line in _shown(row, tokenizer):
            say(line)
    for line in _lengths([row.values for row in fitted], tokenizer):
        say(line)

    # 3. The canonical rows.
    if out is not None:
        may_lack = all(row.makes_confidence or "confidence" in row.values for row in kept)
        values = [row.values for row in kept]
        values = sure_where_unsaid(values) if may_lack else values
        rows = [{**x, "split": "test"} if row.is_test else x for x, row in zip(values, kept, strict=True)]
        write_text(out, json_lines(rows))
        say(f"{out}: {len(rows)} {read.kind}")


def _read(source: Source, compare_as: Compare) -> ReadFile:
    """Read a source as pairs; where there are none, as demonstrations; else as prompts.

    Raises:
        UserError: none of them.
    """
    reports: list[ReadReport] = []
    for kind, convert in KINDS:
        read: Rows[Any] = read_sources([source], convert, reports, kind, 0, fit=lambda row: row, compare=compare_as)
        rows = read.train + read.test
        rows = deduplicated(rows, by_annotator=True) if kind == "pairs" else rows
        if rows:
            row = _first_row(source)
            compares = kind != "pairs" and isinstance(row, Mapping) and {"chosen", "rejected"} <= row.keys()
            return ReadFile(kind, rows, reports[-1], reports[0].sentences() if compares else [])
    hint, row = [], _first_row(source)
    if source.columns is None and isinstance(row, Mapping):
        is_undecided = second_response(row) is not None  # which of the two is better, another column says
        names = "prompt=…,preference=…" if is_undecided else "prompt=…,chosen=…,rejected=…"
        hint = [
            f"Its {_columns(source)}. Where these are pairs, say which is which: --columns {names}; where they are "
            "demonstrations: --columns prompt=…,completion=… (in a recipe `columns:` beside the source)."
        ]
    raise UserError([f"{source.source}: holds no usable row.", *reports[0].sentences(), *hint])


def _unread(source: Source, read: ReadFile) -> list[str]:
    """Say which columns of a file of bare prompts hold something else, which may be the answers; nothing where none does."""
    if read.kind != "prompts" or read.no_pairs:
        return []
    row = _first_row(source, read.rows[0].number)
    if not isinstance(row, Mapping):
        return []
    texts = [turn["content"] for turn in read.rows[0].values["prompt"]]
    columns = [name for name in row if name not in (*EXTRAS, "split")]
    numbers = [name for name in columns if isinstance(row[name], int | float)]
    answers = unread_parts({name: row[name] for name in columns}, texts)
    if not answers:
        return []
    names = ", ".join(f"`{name}`" for name in columns if name in (*numbers, *answers))
    hint = f"completion={answers[0] if len(answers) == 1 else '…'}"
    return [
        f"Of each row the prompt alone is read, and not {names}. Where one of them is the answer to learn, say so: "
        f"--columns {hint}; where two are the answers of a pair: --columns chosen=…,rejected=… or "
        "response_1=…,response_2=…,preference=… (in a recipe `columns:` beside the source)."
    ]


def _first_row(source: Source, least_number: int = 1) -> object:
    """Return the first row as it stands in the source; of those behind it, where a number is given."""
    is_named = source.split is not None
    rows = read_rows(
        source.source, ReadReport(""), split=source.split or "train", config=source.config, is_named=is_named
    )
    return next((row for number, row in rows if number >= least_number), None)


def _columns(source: Source) -> str:
    row = _first_row(source)
    return f"columns {', '.join(row)}" if isinstance(row, Mapping) else "rows are lists of messages"


def _layout(source: Source) -> str:
    """Name the layout of the first row and its columns; those of a mapping, where one is given."""
    if source.columns:
        return f"columns that were named ({', '.join(f'{name} = {path}' for name, path in source.columns.items())})"
    layout = find_layout(_first_row(source) or {})
    return f"{layout.name} ({layout.summary})"


def _fitted(read: ReadFile, tokenizer: PreTrainedTokenizerBase, model: str) -> tuple[list[Row[Any]], list[Row[Any]]]:
    """Return the rows that the model's template can write, and as it writes their tool calls; count the others."""
    template = ToolTemplate(lambda: tokenizer, model)
    kept, fitted = list[Row[Any]](), list[Row[Any]]()
    for row in read.rows:
        try:
            values: Any = template(row.values) if has_tools(row.values) else row.values
        except BadRow as reason:
            row.report.drop(row.number, str(reason))
        else:
            kept.append(row)
            fitted.append(Row(values, row.number, row.report, row.is_test))
    return kept, fitted


# ---- What a person sees ----


def _shown(row: Row[Any], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Yield the lines of one row: its number, its other columns, and each side as it is read."""
    others = {name: value for name, value in row.values.items() if name not in ("prompt", *SIDES)}
    yield f"--- row {row.number}{''.join(f' · {name} {value}' for name, value in others.items())}"
    prompt = row.values["prompt"]
    sides = [side for side in SIDES if side in row.values]
    if tokenizer is None:
        yield f"prompt: {plain(prompt)}"
        for side in sides:
            yield f"{side}: {told(row.values, side)}"
        return
    (prompt_ids,) = encode_prompts(tokenizer, [prompt], max_prompt_length=None)
    yield f"prompt: {visible(tokenizer, prompt_ids)}"
    prompts = [asked(row.values, side) for side in sides]
    texts = [row.values[side][-1]["content"] for side in sides]
    ended = [has_ended(row.values[side]) for side in sides]
    for side, ids in zip(sides, encode_answers(tokenizer, prompts, texts, ended=ended)[0], strict=True):
        # Else the answer's first letters share a token with the prompt's last ones.
        is_behind = ids[: len(prompt_ids)] == prompt_ids
        yield f"{side}: {visible(tokenizer, ids[len(prompt_ids) :] if is_behind else ids)}"


def visible(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return token ids as text in which every special token stands between ⟦ and ⟧, so that it can't be taken for words."""
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = []
    for is_special, run in itertools.groupby(ids, key=lambda number: number in special):
        if is_special:
            pieces += [f"⟦{tokenizer.convert_ids_to_tokens(number)}⟧" for number in run]
        else:
            pieces.append(str(tokenizer.decode(list(run), clean_up_tokenization_spaces=False)))
    return "".join(pieces)


def _lengths(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Yield one line for each part of the rows: half of them are no longer than …, 95 % …, the longest …"""

    def length(text: str) -> int:
        return len(text) if tokenizer is None else len(tokenizer(text, add_special_tokens=False)["input_ids"])

    unit = "characters" if tokenizer is None else "tokens"
    for part in ("prompt", *SIDES):
        texts = [
            plain(row["prompt"]) if part == "prompt" else told(cast(Pair, row), cast(Side, part))
            for row in rows
            if part in row
        ]
        if texts:
            counts = sorted(length(text) for text in texts)
            middle, most = statistics.median_low(counts), counts[min(len(counts) - 1, int(0.95 * len(counts)))]
            yield f"{part}: {middle} {unit} in the middle, 95 % up to {most}, the longest {counts[-1]}"
