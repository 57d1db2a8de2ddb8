"""Traits of an answer, each by sentences that have it and sentences that look alike."""

import pytest

from rlhf.data.traits import TRAITS, trait_table

CASES = {
    "length": ("one two  three", 3),
    "evasion": ("I'm sorry, I can't help with that. I don't really know.", 2),
    "asking back": ("Why? What for?", 2),
    "apology": ("Sorry, I apologize. I am afraid so.", 3),
    "hedging": ("Maybe. I think it might, it depends.", 4),
    "warning": ("That is illegal and dangerous; ask a professional.", 3),
    "flattery": ("Sure! What a great question. You are so clever. Hope this helps, enjoy!", 5),
    "lists": ("Two:\n- one\n  2. two\nnot - three", 2),
    "markup": ("# Title\n**bold** and `code`", 3),
    "numbers": ("From 1,000 to 2.5, or 3.", 3),
    "overlap": ("Bees fly.", 1 / 3),
}
NONE_OF_IT = {
    "evasion": "I can't help but smile; you cannot swim there. They do not know. I will not go.",
    "apology": "It is a sorrowful story.",
    "hedging": "The mighty river.",
    "warning": "A careful reader.",
    "flattery": "The question is great. Questions matter, you are right handed, I am sure of it. They enjoy fun.",
    "lists": "well-known - and 3.5 metres",
    "numbers": "one, two",
}


@pytest.mark.parametrize("name", list(CASES))
def test_traits_are_counted(name: str) -> None:
    text, expected = CASES[name]
    value = trait_table(["Tell me about bees"], [text])[0][list(TRAITS).index(name)]
    assert value == pytest.approx(expected)


@pytest.mark.parametrize("name", list(NONE_OF_IT))
def test_what_looks_alike_is_not_counted(name: str) -> None:
    assert trait_table(["p"], [NONE_OF_IT[name]])[0][list(TRAITS).index(name)] == 0


def test_every_trait_has_its_case_and_empty_texts_have_none() -> None:
    assert set(CASES) == set(TRAITS)
    assert trait_table([""], [""]).tolist() == [[0.0] * len(TRAITS)]
    assert trait_table([], []).shape == (0, len(TRAITS))
