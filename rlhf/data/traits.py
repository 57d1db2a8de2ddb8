"""Traits of an answer that anyone can count: what labels may be found to like or dislike without a word about it.

Each is a number of one answer, larger where there is more of the trait. They are simple on purpose: a person can check them.
English words only; in other languages the traits of words are 0 and say nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)*")
COMMON_LENGTH = 3  # words of a prompt as short as this ("the", "of") say nothing about its topic

EVASIONS = re.compile(
    r"\b(?:can't|cannot|can not|won't|will not|unable to|not able to|not allowed to|refuse to|rather not|don't want to)\b"
    r"(?: \S+){0,3}? (?:help(?! but\b)|assist|provide|give|tell|explain|support|answer|share|do that|encourage|advise|teach"
    r"|recommend|talk|discuss|say)\b"
    r"|\bi (?:do not|don't|didn't|did not) (?:really |quite )?(?:know|understand|follow)\b"
    r"|\bi(?: am|'m) not (?:really |quite )?(?:sure|certain|familiar|able)\b|\bi have no idea\b"
    r"|\bnot sure (?:what|how|if|why|i)\b|\bi(?:'d| would) rather not\b"
)
APOLOGIES = re.compile(r"\b(?:sorry|apologi[sz]e|apologies|afraid)\b")
HEDGES = re.compile(r"\b(?:maybe|perhaps|possibly|probably|might|seems?|i think|i believe|i guess|it depends)\b")
WARNINGS = re.compile(
    r"\b(?:illegal|unlawful|dangerous|harmful|unsafe|unethical|immoral|be careful|professional|police|consult)\b"
)
FLATTERY = re.compile(
    r"\b(?:great|good|excellent|wonderful|fantastic|interesting|lovely|amazing) (?:question|idea|choice|job|point|topic)\b"
    r"|\byou(?: are|'re) (?:so|very|really|clearly) (?:\w+ )?(?:clever|smart|kind|right|wise|nice|good)\b"
    r"|\bi (?:really )?love (?:this|that|your)\b|\bhappy to help\b|\bglad to help\b|\b(?:hope this|hope that) helps\b"
)
LIST_ITEMS = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
MARKUP = re.compile(r"\*\*|__|```|^\s*#+\s", re.MULTILINE)
NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Trait:
    """A number that tells how much of something an answer has.

    Attributes:
        count: takes prompt and answer, both in lower case, and returns the number.
        meaning: what has more of it, for a person: "answers that …".
    """

    count: Callable[[str, str], float]
    meaning: str


def overlap(prompt: str, answer: str) -> float:
    """Return the share of a prompt's longer words that its answer repeats.

    >>> overlap("name a red fruit", "a red apple")
    0.3333333333333333
    """
    asked = {word for word in WORD.findall(prompt) if len(word) >= COMMON_LENGTH}
    return len(asked & set(WORD.findall(answer))) / len(asked) if asked else 0.0


def occurrences(pattern: re.Pattern[str]) -> Callable[[str, str], float]:
    """Return a count of how often a pattern is found in an answer."""
    return lambda prompt, answer: float(len(pattern.findall(answer)))


TRAITS = {
    "length": Trait(lambda prompt, answer: float(len(answer.split())), "have more words"),
    "evasion": Trait(occurrences(EVASIONS), "don't answer: refuse, don't know, don't understand"),
    "asking back": Trait(lambda prompt, answer: float(answer.count("?")), "ask questions"),
    "apology": Trait(occurrences(APOLOGIES), "apologise"),
    "hedging": Trait(occurrences(HEDGES), "hedge: maybe, might, I think"),
    "warning": Trait(occurrences(WARNINGS), "warn of danger, law or harm"),
    "flattery": Trait(occurrences(FLATTERY), "flatter or please without content"),
    "lists": Trait(occurrences(LIST_ITEMS), "have list items"),
    "markup": Trait(occurrences(MARKUP), "have bold text, headings or code"),
    "exclamation": Trait(lambda prompt, answer: float(answer.count("!")), "have exclamation marks"),
    "numbers": Trait(occurrences(NUMBERS), "name numbers"),
    "overlap": Trait(overlap, "repeat words of the prompt"),
}


def trait_table(prompts: list[str], answers: list[str]) -> NDArray[np.float64]:
    """Return every trait of some answers, [answers, traits], in the order of `TRAITS`."""
    return np.array(
        [
            [trait.count(prompt.lower(), answer.lower()) for trait in TRAITS.values()]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    ).reshape(len(answers), len(TRAITS))
