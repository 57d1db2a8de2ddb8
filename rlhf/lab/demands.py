"""Demands on an answer that code can check: their wording in a prompt, and how far an answer meets each, from 0 to 1.

A prompt has at most one demand of a group, so that all of its demands can be met at once. Some kinds are held out for shift.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

WORDS = re.compile(r"[a-z]+(?:['’][a-z]+)*", re.IGNORECASE)
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
PLAIN_WORDS = (
    "yellow",
    "grandmother",
    "Monday",
    "window",
    "remember",
    "together",
    "silver",
    "patience",
    "garden",
    "seven",
)
CAPITALS_FORGIVEN = 4  # words with a capital, at which lower case is not met at all


@dataclass(frozen=True)
class DemandKind:
    """A kind of demand.

    Attributes:
        group: kinds of one group exclude each other.
        wordings: sentences of a prompt, with `{value}` where the value stands.
        values: what may be asked for; empty where there is no value, or where the topic gives it.
        score: takes an answer and the value, and returns how far the answer meets the demand, 0 to 1.
    """

    group: str
    wordings: tuple[str, str]
    values: tuple[str, ...]
    score: Callable[[str, str], float]


@dataclass(frozen=True)
class Demand:
    """One demand of a prompt: its kind, of `KINDS`, and the value that is asked for, "" where the kind has none."""

    kind: str
    value: str

    def score(self, answer: str) -> float:
        """Return how far an answer meets the demand, 0 to 1; one without a word meets none."""
        return KINDS[self.kind].score(answer, self.value) if words_of(answer) else 0.0


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case.

    >>> words_of("It's 3 o'clock: GO!")
    ["it's", "o'clock", 'go']
    """
    return [word.replace("’", "'") for word in WORDS.findall(text.lower())]


def count_sentences(text: str) -> int:
    """Count the sentences of a text: stretches with a word in them, between full stops, question and exclamation marks.

    >>> count_sentences("Bees fly. 2. They hum! And")
    3
    """
    return sum(bool(WORDS.search(part)) for part in re.split(r"[.!?]+(?=\s|$)", text))


def count_items(text: str) -> int:
    """Count the items of a numbered list: 1, 2, 3 and so on, in order, each followed by a stop or a bracket and a blank.

    >>> count_items("1. Dig. 2. Water. 4. Wait."), count_items("at 1.5 metres")
    (2, 0)
    """
    number = 0
    for written in re.findall(r"(?:^|\s)(\d{1,2})[.)]\s", text):
        number += int(written) == number + 1
    return number


def _near(count: int, wanted: str) -> float:
    """Return 1 for the number that is wanted, a word such as "two" with or without its noun; 1/2 for one more or less, else 0."""
    return {0: 1.0, 1: 0.5}.get(abs(count - COUNTS[wanted.split()[0]]), 0.0)


def _has_word(text: str, word: str) -> float:
    words = words_of(text)
    return float(word.lower() in words or f"{word.lower()}s" in words)


def _in_lower_case(text: str, _: str) -> float:
    """Return 1 for a text without capitals, less by a quarter for each word that has one."""
    return max(0.0, 1 - sum(word != word.lower() for word in WORDS.findall(text)) / CAPITALS_FORGIVEN)


def _in_capitals(text: str, _: str) -> float:
    """Return the share of the words that are in capitals."""
    words = WORDS.findall(text)
    return sum(word == word.upper() for word in words) / len(words)


def _at_most(text: str, limit: str) -> float:
    """Return 1 up to so many words, then falling to 0 at twice as many."""
    return min(1.0, max(0.0, 2 - len(words_of(text)) / int(limit)))


def _at_least(text: str, limit: str) -> float:
    return min(1.0, len(words_of(text)) / int(limit))


def _ends_with(text: str, phrase: str) -> float:
    """Return 1 if the phrase ends the text, punctuation and case aside; 1/2 if it stands elsewhere in it, else 0."""
    words, wanted = " ".join(words_of(text)), " ".join(words_of(phrase))
    return 1.0 if f" {words}".endswith(f" {wanted}") else 0.5 * (f" {wanted} " in f" {words} ")


def _begins_with(text: str, word: str) -> float:
    return float(words_of(text)[0] == word.lower())


def _asks_once(text: str, _: str) -> float:
    """Return 1 for one question mark, 1/2 for several, else 0."""
    return {0: 0.0, 1: 1.0}.get(text.count("?"), 0.5)


def _without_commas(text: str, _: str) -> float:
    return max(0.0, 1 - text.count(",") / 2)


KINDS = {
    "sentences": DemandKind(
        "shape",
        ("Answer in exactly {value}.", "Write exactly {value}."),
        ("one sentence", "two sentences", "three sentences"),
        lambda text, value: _near(count_sentences(text), value),
    ),
    "items": DemandKind(
        "shape",
        ("Give exactly {value} in a numbered list.", "Make a numbered list of exactly {value}."),
        ("two items", "three items", "four items"),
        lambda text, value: _near(count_items(text), value),
    ),
    "word": DemandKind(
        "word", ('Use the word "{value}".', 'Your answer must contain the word "{value}".'), PLAIN_WORDS, _has_word
    ),
    "avoid": DemandKind(
        "word",
        ('Do not use the word "{value}".', 'Never say "{value}".'),
        (),
        lambda text, value: 1 - _has_word(text, value),
    ),
    "lower": DemandKind(
        "case", ("Write in lower case letters only.", "Do not use any capital letters."), (), _in_lower_case
    ),
    "capitals": DemandKind(
        "case", ("Write everything in capital letters.", "Use capital letters only."), (), _in_capitals
    ),
    "short": DemandKind(
        "length",
        ("Use at most {value} words.", "Be brief: no more than {value} words."),
        ("15", "20", "25"),
        _at_most,
    ),
    "ending": DemandKind(
        "end",
        ('End with the words "{value}".', 'Your last words must be "{value}".'),
        ("That is all", "Good luck", "The end", "See you soon"),
        _ends_with,
    ),
    # Held out for shift.
    "long": DemandKind(
        "length", ("Use at least {value} words.", "Write {value} words or more."), ("30", "35"), _at_least
    ),
    "opening": DemandKind(
        "opening", ('Begin with the word "{value}".', 'Your first word must be "{value}".'), PLAIN_WORDS, _begins_with
    ),
    "question": DemandKind("end", ("Ask one question.", "Put exactly one question into it."), (), _asks_once),
    "commas": DemandKind("marks", ("Do not use commas.", "Write without any comma."), (), _without_commas),
}
SHIFT_KINDS = ("long", "opening", "question", "commas")


PATTERNS = [
    (kind, re.compile(re.escape(wording).replace(r"\{value\}", r"(?P<value>[\w ]+?)") + r"(?:\s+|$)"))
    for kind, entry in KINDS.items()
    for wording in entry.wordings
]


def parse_demands(text: str) -> list[Demand]:
    """Read back the demands that a text consists of.

    Raises:
        ValueError: something in it is no demand.
    """
    demands: list[Demand] = []
    rest = text.strip()
    while rest:
        matches = ((kind, pattern.match(rest)) for kind, pattern in PATTERNS)
        kind, match = next(((kind, match) for kind, match in matches if match is not None), ("", None))
        if match is None:
            raise ValueError(f"no demand of the lab's world: {rest!r}")
        demands.append(Demand(kind, match.groupdict().get("value", "")))
        rest = rest[match.end() :]
    return demands
