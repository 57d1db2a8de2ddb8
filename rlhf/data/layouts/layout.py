"""What a layout says about itself, and what follows for the rows that have it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.data.canonical import LIKED
from rlhf.data.rankings import Ranking, RatedAnswer, best_demonstration, comparisons, usable
from rlhf.data.read import BadRow
from rlhf.data.rows import TIE, Demonstration, Pair, PromptRow, asked
from rlhf.data.sides import WORDS_FOR, Side, code_of

# What may stand beside the answers under the same name in every layout.
BESIDE = (
    "system",
    "tools",
    "margin",
    "confidence",
    "soft_label",
    "weight",
    "agree",
    "annotator",
    "source",
    "subset",
    "id",
    "split",
)


class PlainRow(NamedTuple):
    """A row of a public layout in the columns of `pair or conversation`, and how its label was read.

    Attributes:
        columns: `prompt`, `chosen`, `rejected` and what stands beside them; or `prompt` and `completion`; or `messages`.
        meaning: what its label says, for a person; None where the columns' names say it.
        is_tie: its label calls the answers equal.
    """

    columns: Mapping[str, object]
    meaning: str | None = None
    is_tie: bool = False


class Comparison(NamedTuple):
    """Two answers to a prompt, and which of them is better.

    Attributes:
        label: the column that says it, and its value.
        beside: other canonical columns.
    """

    prompt: object
    first: object
    second: object
    better: Side
    label: tuple[str, object]
    beside: Mapping[str, object] = {}


@dataclass(frozen=True)
class Layout:
    """One layout of a row: by which columns it is recognised, and what it holds.

    Every function is given the row as it was read, and raises BadRow with the reason why a row can't be used. One of
    `compares`, `renames`, `pairs`, `rankings` and `ratings` is there. The rows of the first two are rewritten first, and then
    read as `pair or conversation`; they are public layouts, and a file that has one has no other.

    Attributes:
        name: what people call it.
        summary: the columns by which it is recognised, and how its answers are scored.
        columns: all of them are there, dots leading into nested ones; how a row is recognised where `matches` is None.
        matches: whether a row has this layout, asked if no layout before it matched; the rows are mappings, but for the
            first layout's, which may be lists.
        compares: the row's two answers and which is better, by the column that is named.
        labels: the columns that may be named, the first by default.
        renames: the row in the columns of `pair or conversation`.
        pairs: the row's pairs.
        rankings: the row's rankings, which are checked and turned into pairs by the methods below.
        ratings: the row's answers with a rating of their own; they are compared with those of other rows with their prompt.
        demonstrations: the row's demonstrations, if they are not the chosen or best answers.
        prompts: the row's prompts, if they are not those of its demonstrations.
        direction: which answer is the better one, as a sentence for a person; None where the columns' names say it.
    """

    name: str
    summary: str
    columns: tuple[str, ...] = ()
    matches: Callable[[Any], bool] | None = None
    compares: Callable[[Any, str], Comparison] | None = None
    labels: tuple[str, ...] = ()
    renames: Callable[[Any], Mapping[str, object]] | None = None
    pairs: Callable[[Any], list[Pair]] | None = None
    rankings: Callable[[Any], list[Ranking]] | None = None
    ratings: Callable[[Any], list[RatedAnswer]] | None = None
    demonstrations: Callable[[Any], list[Demonstration]] | None = None
    prompts: Callable[[Any], list[PromptRow]] | None = None
    direction: str | None = None

    @property
    def is_public(self) -> bool:
        """Return whether rows are rewritten before they are read."""
        return self.compares is not None or self.renames is not None

    def has(self, row: object) -> bool:
        """Return whether a row has this layout."""
        if self.matches is not None:
            return self.matches(row)
        return all(has_column(row, path) for path in self.columns) and isinstance(row, Mapping)

    def lacks(self, row: Mapping[str, object]) -> list[str]:
        """Return the columns of this layout that a row has not."""
        return [path for path in self.columns if not has_column(row, path)]

    def plain(self, row: Mapping[str, object], label: str | None = None) -> PlainRow:
        """Return a row of a public layout in plain columns.

        Args:
            label: the column that says which answer is better; None for the layout's usual one.

        Raises:
            BadRow: with the reason.
        """
        if self.renames is not None:
            return PlainRow(self.renames(row))
        assert self.compares is not None, "a public layout compares or renames"
        return as_pair(self.compares(row, label or (self.labels[0] if self.labels else "")), beside(row))

    def read_pairs(self, row: object) -> list[Pair]:
        """Return a row's pairs; none where answers are compared across rows (`ratings`)."""
        if self.pairs is not None:
            return self.pairs(row)
        return [canonical for ranking in self.read_rankings(row) for canonical in comparisons(ranking)]

    def read_rankings(self, row: object) -> list[Ranking]:
        """Return a row's rankings in which two answers differ in score; none where a layout has no rankings.

        Raises:
            BadRow: a ranking has nothing to say, or a prompt or an answer is none.
        """
        return [] if self.rankings is None else usable(self.rankings(row))

    def read_demonstrations(self, row: object) -> list[Demonstration]:
        """Return a row's demonstrations."""
        if self.demonstrations is not None:
            return self.demonstrations(row)
        if self.rankings is not None:
            return [best_demonstration(ranking) for ranking in self.read_rankings(row)]
        return [{"prompt": asked(pair, "chosen"), "completion": pair["chosen"][-1:]} for pair in self.read_pairs(row)]

    def read_prompts(self, row: object) -> list[PromptRow]:
        """Return a row's prompts."""
        if self.prompts is not None:
            return self.prompts(row)
        return [{"prompt": row["prompt"]} for row in self.read_demonstrations(row)]


def as_pair(comparison: Comparison, others: Mapping[str, object]) -> PlainRow:
    """Return two compared answers as a pair; equal ones as a pair with `confidence` 0.5, the first being called the chosen one."""
    chosen, rejected = comparison.first, comparison.second
    if comparison.better == "second":
        chosen, rejected = rejected, chosen
    is_tie = comparison.better == "tie"
    columns = {**others, **comparison.beside, "prompt": comparison.prompt, "chosen": chosen, "rejected": rejected}
    if is_tie:
        columns["confidence"] = TIE
    column, value = comparison.label
    meaning = f"`{column}` {code_of(value)}: {WORDS_FOR[comparison.better]}"
    return PlainRow(columns, f"{meaning}, kept with confidence {TIE}" if is_tie else meaning, is_tie)


def beside(row: Mapping[str, object]) -> dict[str, object]:
    """Return what stands beside a row's answers under the same name in every layout."""
    return {name: row[name] for name in BESIDE if row.get(name) is not None}


def liked(row: Mapping[str, object]) -> dict[str, object]:
    """Return what a row of unpaired preferences says of its one answer: whether it is a good one."""
    return {name: row[name] for name in LIKED if row.get(name) is not None}


def has_column(row: object, path: str) -> bool:
    """Return whether a row has a column, dots leading into nested ones."""
    if type(row) is dict and "." not in path:  # most rows and most columns: asked of every row for every layout
        return path in row
    for name in path.split("."):
        if not isinstance(row, Mapping) or name not in row:
            return False
        row = row[name]
    return True


def better_of(value: object, column: str) -> Side:
    """Return which answer an index calls better: 0 the first, 1 the second.

    Raises:
        BadRow: it is neither.
    """
    if isinstance(value, bool) or code_of(value) not in ("0", "1"):
        raise BadRow(f"{column} is {'missing' if value is None else repr(value)}, neither 0 nor 1")
    return "second" if code_of(value) == "1" else "first"


def number(value: object, column: str) -> float:
    """Return a number, which a table may have as text.

    Raises:
        BadRow: it is none.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        result = float(value)
        if result - result != 0:
            raise ValueError
    except ValueError:
        raise BadRow(f"{column} is not a finite number") from None
    return result
