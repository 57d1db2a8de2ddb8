"""Which of two responses a file calls the better one: decided for the whole file, and said with an example.

A file with two responses and a preference may mean many things by it. The values of its whole column decide:

| values | meaning |
|---|---|
| stated in the recipe (`preference: {0: first, 1: second}`) | as stated |
| words: first, second, left, right, A, B, response_1, model_b, …; tie, both, equal, … | as they say |
| 1 and 2, beside them 0 | the number of the response in `response_1` and `response_2`; 0 is a tie (not in `overall_preference`) |
| a scale with both signs, such as -3 … 3 (HelpSteer2-preference) | below 0 the first is better, above 0 the second |
| anything else, such as 0 and 1, -1 and 1, true and false, 1 … 7 | refused, for nobody can know |

A column that is called a strength is a scale whatever its values, unless all of eight rows or more point to one side: in a
random order of the responses that happens to one file of eight rows in 2^7, and to no larger one that anybody will see.
`overall_preference` is such a scale in all that is published (HelpSteer3), and without both signs may be a cut of one.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from rlhf.data.layouts import find_layout
from rlhf.data.rankings import first_response, given_answer, preference_of, second_response, signed_strength
from rlhf.data.read import BadRow
from rlhf.data.sides import TIES, WORDS_FOR, Side, code_of, named_side, number_of, numbered_sides, shown_codes
from rlhf.errors import UserError

STRENGTHS = ("preference_strength", "strength")
SIGNED = "overall_preference"
ONE_SIDED_ROWS = 8


@dataclass(frozen=True)
class Direction:
    """What the values of a file's preference column say.

    Attributes:
        column: its name.
        codes: all values of the file, as `code_of` writes them.
        sides: code → side; None where the values are a signed scale, above 0 where the second response is better.
    """

    column: str
    codes: tuple[str, ...]
    sides: Mapping[str, Side] | None

    def side(self, value: object) -> Side | None:
        """Return which response a value calls better; None where it calls neither so."""
        code = code_of(value)
        if self.sides is not None:
            return self.sides.get(code)
        number = number_of(code)
        if number is None:
            return None
        return "first" if number < 0 else "second" if number > 0 else "tie"

    def sentence(self, value: object) -> str:
        """Return what a value means.

        >>> Direction("preference", ("1", "2"), {"1": "first", "2": "second"}).sentence(1)
        '`preference` 1 of {1, 2}: the first is better'
        """
        side = self.side(value)
        meaning = "no side" if side is None else WORDS_FOR[side]
        return f"`{self.column}` {code_of(value)} of {shown_codes(self.codes)}: {meaning}"

    def as_pair(self, row: Mapping[str, object]) -> Mapping[str, object]:
        """Return a row with `chosen` and `rejected` in place of its two responses; a row of a signed scale stays as it is.

        Raises:
            BadRow: a tie, or a value that names neither side.
        """
        preference = preference_of(row)
        if self.sides is None or preference is None:
            return row
        side = self.side(preference[1])
        if side is None:
            raise BadRow("the preference names neither of the two responses")
        if side == "tie":
            raise BadRow("no preference between the two responses (a tie)")
        answers = [given_answer(response, 0.0) for response in (first_response(row), second_response(row))]
        sides = [answer.content if answer.ended else answer.turn for answer in answers]
        chosen, rejected = sides if side == "first" else sides[::-1]
        names = ("response_1", "response1", "response_2", "response2", "context")
        rest = {name: value for name, value in row.items() if name not in names}
        return {**rest, "prompt": row.get("prompt", row.get("context")), "chosen": chosen, "rejected": rejected}


def directions(rows: Iterable[object], source: str, stated: Mapping[str, Side] | None = None) -> dict[str, Direction]:
    """Look at a whole file, and decide what each of its preference columns says.

    Args:
        source: the file's name, for the sentence of a refusal.
        stated: what the recipe says about its values.

    Returns:
        column → direction; empty where no row has two responses and a preference.

    Raises:
        UserError: the values may mean either, and nothing states which; or it is stated, and there is no such column.
    """
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        if has_two_responses(row) and (preference := preference_of(row)) is not None:
            column, value = preference
            codes = counts.setdefault(column, {})
            codes[code_of(value)] = codes.get(code_of(value), 0) + 1
    if stated is not None and not counts:
        raise UserError(
            f"{source}: `preference` is stated for it, but no row has two responses and a preference; take the key out."
        )
    return {column: _decide(column, codes, source, stated) for column, codes in counts.items()}


def has_two_responses(row: object) -> TypeGuard[Mapping[str, object]]:
    """Return whether a row is of the layout with two responses and a preference."""
    return isinstance(row, Mapping) and find_layout(row).rankings is signed_strength


def example(sentence: str, chosen: str) -> str:
    """Return a direction's sentence with the beginning of the answer that it makes the chosen one, on one line."""
    text = " ".join(chosen.split())
    text = text if len(text) <= 60 else text[:59] + "…"
    return f"{sentence}: chosen = {json.dumps(text, ensure_ascii=False)}"


def _decide(column: str, counts: Mapping[str, int], source: str, stated: Mapping[str, Side] | None) -> Direction:
    codes = tuple(counts)
    if stated is not None:
        return Direction(column, codes, {code_of(value): side for value, side in stated.items()})
    numbers = {code: number for code in codes if (number := number_of(code)) is not None}
    words = [code for code in codes if code not in numbers]
    named = {code: side for code in words if (side := named_side(code)) is not None}
    sides: dict[str, Side] = {**named, **{code: "tie" for code in words if code in TIES}}
    if {"true", "false"} & set(words):
        raise _unstated(column, codes, source)
    if not numbers:
        return Direction(column, codes, sides)
    numbered = numbered_sides(numbers)
    if numbered is not None and column not in (*STRENGTHS, SIGNED):
        return Direction(column, codes, {**sides, **numbered})
    rows = sum(counts[code] for code, number in numbers.items() if number)
    if named or not _is_scale(column, set(numbers.values()) - {0.0}, rows):
        raise _unstated(column, codes, source)
    return Direction(column, codes, None)


def _is_scale(column: str, numbers: set[float], rows: int) -> bool:
    """Tell whether numbers other than 0 are strengths with a sign."""
    has_both_signs = min(numbers, default=0.0) < 0 < max(numbers, default=0.0)
    if column in STRENGTHS:
        return has_both_signs or rows < ONE_SIDED_ROWS
    return not numbers or (has_both_signs and numbers != {-1.0, 1.0})


def _unstated(column: str, codes: Iterable[str], source: str) -> UserError:
    decided = [code for code in codes if code not in TIES]
    shown = shown_codes(decided)
    ends = sorted(decided, key=lambda code: (number_of(code) is None, number_of(code) or 0.0, code))
    low, high = ends[0], ends[-1] if len(ends) > 1 else ends[0]
    meaning = f"{low}: first, {high}: second" if low != high else f"{low}: first"
    known = f" In HelpSteer3 `{column}` is such a scale." if column == SIGNED else ""
    return UserError(
        f"{source}: `{column}` holds {shown}, which does not say which of the two responses is better. State it beside the "
        f"source in the recipe, such as {{source: …, preference: {{{meaning}}}}} (each value is first, second or tie); or give "
        "the file columns that say it: `chosen` and `rejected`, or `preference_strength`, below 0 where the first is better "
        f"and above 0 where the second is.{known}"
    )
