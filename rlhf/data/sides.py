"""Words and numbers by which files name one of two answers."""

import re
from collections.abc import Iterable
from typing import Literal

Side = Literal["first", "second", "tie"]
NAMES: dict[str, Side] = {
    **dict.fromkeys(("first", "a", "one", "left"), "first"),
    **dict.fromkeys(("second", "b", "two", "right"), "second"),
}
TIES = (
    "tie", "tied", "both", "equal", "draw", "same", "neither", "both good", "both bad", "both_good", "both_bad", "tie (bothbad)",
)  # fmt: skip
# `response_1`, "Model A", `assistant-b`: a number behind such a word is the number of the response.
NUMBERED = re.compile(
    r"(?:response|model|answer|option|assistant|output|candidate|completion|text|summary|reply)[ _-]?(1|2|a|b)"
)
SHOWN_CODES = 7
WORDS_FOR: dict[Side, str] = {"first": "the first is better", "second": "the second is better", "tie": "a tie"}


def named_side(word: str) -> Side | None:
    """Return the response that a word names: first or second; None if it names neither.

    >>> [named_side(word) for word in ("A", "response_2", "left", "3")]
    ['first', 'second', 'first', None]
    """
    plain = word.strip().lower()
    if match := NUMBERED.fullmatch(plain):
        return "first" if match[1] in ("1", "a") else "second"
    return NAMES.get(plain)


def is_tie(value: object) -> bool:
    """Return whether a value says that neither of two answers is better."""
    return isinstance(value, str) and value.strip().lower() in TIES


def numbered_sides(codes: Iterable[str]) -> dict[str, Side] | None:
    """Return what 1 and 2, and beside them 0, mean: the number of the response, and a tie; None for other numbers.

    A file without a 2 may count from 0, so its 1 says nothing.
    """
    meaning: dict[str, Side] = {"1": "first", "2": "second", "0": "tie"}
    return {code: meaning[code] for code in codes} if "2" in codes and set(codes) <= meaning.keys() else None


def code_of(value: object) -> str:
    """Return a value in the form in which values of files and recipes are compared.

    >>> [code_of(value) for value in (1, 1.0, "1", "A ", True, -0.5)]
    ['1', '1', '1', 'a', 'true', '-0.5']
    """
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value).strip().lower()
    number = number_of(text)
    return text if number is None else f"{number:g}"


def shown_codes(codes: Iterable[str]) -> str:
    """Return the values of a file for a person, smallest first: `{1, 2}`; the ends only where they are many."""
    ordered = sorted(codes, key=lambda code: (number_of(code) is None, number_of(code) or 0.0, code))
    if len(ordered) > SHOWN_CODES:
        ordered = [*ordered[:2], "…", ordered[-1]]
    return "{" + ", ".join(ordered) + "}"


def number_of(code: str) -> float | None:
    """Return the finite number that a code stands for; None if it is none."""
    try:
        number = float(code)
    except ValueError:
        return None
    return number if number == number and abs(number) != float("inf") else None
