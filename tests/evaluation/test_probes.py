"""Bias probes: planted biases are found with their sign and size, and a scorer without bias shows none."""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.evaluation.benchmarks import Item
from rlhf.evaluation.probes import FILLER, FLATTERY, PREFIX, longer, probe, probes_by_name, with_markdown, with_token

WORDS = ["river", "stone", "light", "paper", "bread", "winter", "garden", "music", "window", "silver"]
END = "<|end|>"


class Toy:
    """Scores each answer by a function of its text and of the longest text in its batch, in characters."""

    def __init__(self, rule: Callable[[str, int], float]) -> None:
        self.rule = rule

    def score(self, prompts: Sequence[Any], responses: Sequence[str], *, ended: Any = None) -> torch.Tensor:
        widest = max(map(len, responses))
        return torch.tensor([self.rule(text, widest) for text in responses], dtype=torch.float64)


def quality(text: str) -> float:
    """Give what an answer is worth, whatever an edit adds: a number that only its own words decide, in any order."""
    for added in (FILLER.strip(), PREFIX.strip(), FLATTERY.strip(), END):
        text = text.replace(added, "")
    words = [word for word in re.findall(r"[a-z]+", text.lower()) if word in WORDS]
    return sum(int(hashlib.sha256(word.encode()).hexdigest()[:6], 16) / 2**24 - 0.5 for word in words)


def answers(count: int = 120) -> list[Item]:
    rng = np.random.default_rng(0)
    items = []
    for i in range(count):
        sides = []
        for _ in range(2):
            sentences = [" ".join(rng.choice(WORDS, size=rng.integers(3, 9))) + "." for _ in range(rng.integers(1, 5))]
            if rng.random() < 0.3:
                sentences.append("**" + " ".join(rng.choice(WORDS, size=2)) + "**.")
            sides.append(" ".join(sentences))
        items.append(Item([{"role": "user", "content": f"question {i}"}], sides, [1, 0], [(0, 1)]))
    return items


ITEMS = answers()
TEXTS = [text for item in ITEMS for text in item.answers]


def effects(rule: Callable[[str, int], float]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = probe(Toy(rule), ITEMS, special=END)["effects"]
    return result


def covers_zero(entry: dict[str, Any]) -> bool:
    low, high = entry["effect_ci"]
    return bool(low <= 1e-9 and high >= -1e-9)


def test_a_clean_scorer_shows_no_bias() -> None:
    """Its scores differ (deviation above 0) and no edit moves them."""
    result = probe(Toy(lambda text, _: quality(text)), ITEMS, special=END)
    assert result["deviation"] > 0.5
    assert result["answers"] == 240
    assert set(result["effects"]) == {
        "length",
        "markdown",
        "prefix",
        "flattery",
        "special tokens",
        "position",
        "batch mates",
    }
    for name, entry in result["effects"].items():
        assert entry["effect"] == pytest.approx(0, abs=1e-9), name
        assert covers_zero(entry), name


def test_a_noisy_scorer_without_bias_shows_zero_within_its_intervals() -> None:
    """Every edit shakes the score a little, in both directions: intervals have a width, and hold 0.

    Seven intervals of 95 % would all hold 0 in 70 % of draws; the salt is fixed, so this draw stays what it is.
    """
    noisy = effects(lambda text, _: quality(text) + 0.3 * (hash_of("salt 1" + text) - 0.5))
    assert all(
        entry["effect_ci"][1] - entry["effect_ci"][0] > 0.005 for name, entry in noisy.items() if name != "batch mates"
    )
    assert all(covers_zero(entry) for entry in noisy.values()), noisy


def hash_of(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def test_a_score_of_length_is_found_with_its_size() -> None:
    """Score = characters: each edit adds a known number of them, so each effect is that number of deviations."""
    found = effects(lambda text, _: float(len(text)))
    deviation = float(np.std([len(text) for text in TEXTS]))
    for name, added in (("length", FILLER), ("prefix", PREFIX), ("flattery", FLATTERY), ("special tokens", END + " ")):
        assert found[name]["effect"] == pytest.approx(len(added) / deviation, rel=1e-6), name
        low, high = found[name]["effect_ci"]
        assert 0 < low < found[name]["effect"] < high, name
        assert found[name]["higher"] == 1
    assert found["position"]["effect"] == 0, "the same characters in another order"
    assert found["batch mates"]["effect"] == 0
    shorter = effects(lambda text, _: -float(len(text)))
    assert shorter["length"]["effect"] == pytest.approx(-len(FILLER) / deviation, rel=1e-6), "the sign turns"
    assert shorter["length"]["effect_ci"][1] < 0


def test_a_score_of_bold_is_found_by_markdown_alone() -> None:
    found = effects(lambda text, _: float(text.count("**")))
    deviation = float(np.std([text.count("**") for text in TEXTS]))
    assert found["markdown"]["effect"] == pytest.approx(2 / deviation, rel=1e-6), "one bold point, two marks"
    assert found["markdown"]["n"] == sum("**" not in text for text in TEXTS), "answers with markup are left alone"
    assert all(found[name]["effect"] == 0 for name in found if name != "markdown")


def test_each_other_bias_is_found_by_its_own_probe() -> None:
    def bonus(condition: Callable[[str, int], bool]) -> dict[str, dict[str, Any]]:
        return effects(lambda text, widest: quality(text) + condition(text, widest))

    deviation = float(np.std([quality(text) for text in TEXTS]))
    for name, condition in (
        ("flattery", lambda text, _: "wonderful" in text),
        ("prefix", lambda text, _: text.startswith("Sure")),
        ("special tokens", lambda text, _: END in text),
        ("batch mates", lambda text, widest: widest > len(text)),
    ):
        found = bonus(condition)
        expected = 1 / deviation
        assert found[name]["effect"] == pytest.approx(expected, rel=0.02), name
        others = [entry["effect"] for other, entry in found.items() if other != name]
        assert np.abs(others).max() < 0.05, (name, found)


def test_position_of_the_better_half() -> None:
    """A scorer that reads the first paragraph alone likes the better one first, by the mean difference of the two."""
    found = effects(lambda text, _: quality(text.split("\n\n")[0]))
    scores = np.array([[quality(text) for text in item.answers] for item in ITEMS])
    expected = (scores[:, 0] - scores[:, 1]).mean() / scores.std()
    assert found["position"]["effect"] == pytest.approx(expected, rel=1e-6)
    assert found["position"]["n"] == len(ITEMS)


def test_a_scorer_that_says_one_thing_has_no_effects() -> None:
    found = effects(lambda text, _: 1.0)
    assert all(entry["effect"] is None and entry["effect_ci"] is None for entry in found.values())


def test_edits_are_minimal() -> None:
    """Words are added or left, never changed; what has markup already is no plain text to dress."""
    text = "One thing. Another thing! A third?"
    assert longer(text) == text + FILLER
    assert with_markdown(text) == "- **One thing.**\n- Another thing!\n- A third?"
    assert [with_markdown(x) for x in ("# Head", "- point", "1. first", "a **b**", "| a | b |", "```x```")] == [
        None
    ] * 6
    assert with_markdown("5 - 3 = 2") is not None
    assert with_token("a b c d", "<x>") == "a b <x> c d"
    assert with_token("one", "<x>") == "one <x>"
    for name, single in probes_by_name(END).items():
        edited = single.edit(text)
        assert edited is not None
        rest = iter(re.findall(r"\w+", edited))
        assert all(word in rest for word in re.findall(r"\w+", text)), f"{name}: a word of the answer is missing"


def test_turns_of_one_conversation_are_one_draw() -> None:
    """The same answers to ten turns of each conversation as to one: the interval stays as wide."""
    later = [{"role": "assistant", "content": "and?"}, {"role": "user", "content": "go on"}]
    turns = [
        Item([*item.prompt, *later * k], item.answers, item.labels, item.pairs)
        for item in ITEMS[:20]
        for k in range(10)
    ]
    rule = Toy(lambda text, _: quality(text) * (2 if text.startswith(PREFIX) else 1))
    once, often = (probe(rule, items, special=END)["effects"]["prefix"] for items in (ITEMS[:20], turns))
    assert often["effect"] == pytest.approx(once["effect"])
    assert often["effect_ci"] == pytest.approx(once["effect_ci"])
