"""Answers with a rating in each of several attributes, as HelpSteer publishes them: what attribute regression is trained on.

An answer needs no other one to be compared with, so these rows are read beside pairs (`rlhf.data.rankings`), and not from them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf.data.canonical import check_answer, check_prompt, extras_of
from rlhf.data.messages import ended_of
from rlhf.data.rankings import LISTS, TEXTS, RatedEntry, is_k_wise, is_rated, k_wise_prompt, rated_entries
from rlhf.data.read import BadRow, ReadReport
from rlhf.data.rows import Rated, assistant_turn
from rlhf.data.source_lines import Line
from rlhf.data.sources import Row
from rlhf.errors import UserError


@dataclass(frozen=True)
class RatingScale:
    """Which attributes are read, and the lowest and highest rating that there may be."""

    names: tuple[str, ...]
    low: float
    high: float


@dataclass
class RatingReader:
    """Reads rated answers, and remembers what was rated.

    Attributes:
        scale: which attributes are read.
        counts: how many ratings each attribute has, also those that are not read.
        outside: the first rating outside the scale, in words, and how many there are.
    """

    scale: RatingScale
    counts: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)

    def read(self, lines: Iterable[Line], report: ReadReport) -> Iterator[Row[Rated]]:
        """Convert rows to rated answers; count those that have none."""
        for line in lines:
            try:
                rows = self._rated(line, report.source)
            except BadRow as reason:
                report.drop(line.number, str(reason))
                continue
            for row in rows:
                yield Row(row, line.number, report, line.is_test)

    def check(self) -> None:
        """Refuse ratings outside the scale, and attributes that nobody rated, when everything is read.

        Raises:
            UserError: as it says.
        """
        problems = []
        if self.outside:
            problems.append(
                f"{next(iter(self.outside))} ({self.outside.total()} such ratings); reward.rating_scale says {self.scale.low:g} to "
                f"{self.scale.high:g}. Set it to the file's own scale, or take these rows out."
            )
        missing = [name for name in self.scale.names if not self.counts[name]]
        if missing:
            have = ", ".join(sorted(self.counts)) or "nothing"
            problems.append(
                f"reward.attributes: nobody rated {', '.join(missing)}; what is rated in data.preferences is {have}."
            )
        if problems:
            raise UserError(problems)

    def _rated(self, line: Line, source: str) -> list[Rated]:
        """Return the rated answers of one row.

        Raises:
            BadRow: there is none.
        """
        rows: list[Rated] = []
        for prompt, content, ended, values in _entries(line.row):
            check_prompt(prompt)
            text = check_answer(content, "the answer")
            ratings = _numbers(values)
            self.counts.update(ratings.keys())
            kept = {name: ratings[name] for name in self.scale.names if name in ratings}
            for name, value in kept.items():
                if not self.scale.low <= value <= self.scale.high:
                    self.outside[f"{source}: row {line.number}: {name} is {value:g}"] += 1
            if kept:
                row: Rated = {"prompt": prompt, "completion": assistant_turn(text, ended=ended), "attributes": kept}
                rows.append({**row, **extras_of(line.row)})
        if not rows:
            raise BadRow(f"rated in none of {', '.join(self.scale.names)}")
        return rows


def _entries(row: object) -> list[RatedEntry]:
    """Return each rated answer of a row: alone, in a conversation, or in a list of answers.

    Raises:
        BadRow: no ratings of attributes.
    """
    if isinstance(row, Mapping) and is_k_wise(row):
        prompt = k_wise_prompt(row)
        answers = next(row[name] for name in LISTS if isinstance(row.get(name), list))
        rated = [answer for answer in answers if isinstance(answer, Mapping) and "attributes" in answer]
        texts = [next((answer[name] for name in TEXTS if answer.get(name) is not None), None) for answer in rated]
        return [
            RatedEntry(prompt, text, ended_of(answer), answer["attributes"])
            for text, answer in zip(texts, rated, strict=True)
        ]
    if isinstance(row, Mapping) and is_rated(row):
        return rated_entries(row)
    raise BadRow("no ratings of attributes beside an answer")


def _numbers(values: object) -> dict[str, float]:
    """Return the ratings of an answer that are finite numbers; of one that nobody gave there is none."""
    if not isinstance(values, Mapping):
        return {}
    return {
        str(name): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0
    }


def ratings_of(attributes: Mapping[str, float | None], names: Sequence[str]) -> list[float]:
    """Return the ratings of an answer in the order of the names, NaN where nobody rated.

    >>> ratings_of({"helpfulness": 3, "verbosity": None}, ["helpfulness", "verbosity", "humour"])
    [3.0, nan, nan]
    """
    values = [attributes.get(name) for name in names]
    return [math.nan if value is None else float(value) for value in values]
