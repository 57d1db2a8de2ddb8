"""What is said of templates that take thoughts away, or let a prompt end otherwise than they write it before an answer."""

from typing import Any

import pytest

from rlhf.models.text import give_plain_template
from rlhf.models.thoughts import lost_thoughts, thought_of, trained_unlike_sampled
from tests.models.test_templates import with_template
from tests.recipes import templates
from tests.reward.families import FAMILIES

PROMPT: Any = [{"role": "user", "content": "Name a river."}]
PLAIN, THOUGHT = "The Danube.", "<think>\nRivers of Europe.\n</think>\n\nThe Danube."
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' + @ANSWER@ + eos_token }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# As distilled models have it: a thought is asked for, and left out of every answer.
DROPS = TURNS.replace("@ANSWER@", "m['content'].split('</think>')[-1]")
# An empty thought where the answer has none, closed at once.
CLOSES = TURNS.replace("@ANSWER@", "('' if '<think>' in m['content'] else '<think></think>') + m['content']")


def test_a_template_that_takes_thoughts_away_is_named(tokenizer: Any) -> None:
    drops = with_template(tokenizer, DROPS)
    prompts, answers = [PROMPT] * 4, [PLAIN, THOUGHT, PLAIN, THOUGHT]
    (lost,) = lost_thoughts(drops, prompts, answers)
    assert lost.startswith("2 answers with a thought (the first is row 1): the chat template of ")
    assert "leaves <think>…</think> out" in lost
    without, thinking = trained_unlike_sampled(drops, prompts, answers)
    assert without.startswith("2 answers without a thought (the first is row 0): the chat template of ")
    assert (
        r"lets a prompt end in '|assistant|><think>\n', and with the answer writes '|assistant|>The Danube.<|end|>'"
        in without
    )
    assert thinking.startswith("2 answers with a thought (the first is row 1): the chat template of ")
    assert r"writes '|assistant|>\n\nThe Danube.<|end|>' there" in thinking


def test_only_answers_that_do_not_begin_as_the_prompt_lets_them_are_named(tokenizer: Any) -> None:
    closes = with_template(tokenizer, CLOSES)
    assert trained_unlike_sampled(closes, [PROMPT], [THOUGHT]) == []
    assert lost_thoughts(closes, [PROMPT] * 2, [THOUGHT, PLAIN]) == []
    (sentence,) = trained_unlike_sampled(closes, [PROMPT] * 2, [THOUGHT, PLAIN])
    assert sentence.startswith("1 answers without a thought (the first is row 1)")
    assert (
        r"end in 'ant|><think>\n', and with the answer writes 'ant|><think></think>The Danube.<|end' there" in sentence
    )


@pytest.mark.parametrize("name", [*FAMILIES, "qwen_3", "qwen_2_5", "llama_3_1", "gemma_3"])
def test_nothing_is_said_of_templates_that_write_both_alike(name: str) -> None:
    texts = ["Name a river. The Danube."] * 50
    tokenizer = FAMILIES[name].build() if name in FAMILIES else getattr(templates, name)(texts)
    give_plain_template(tokenizer)
    prompts = [PROMPT, [*PROMPT, {"role": "assistant", "content": PLAIN}, *PROMPT], PROMPT, "a string"]
    answers = [PLAIN, THOUGHT, THOUGHT, THOUGHT]
    assert lost_thoughts(tokenizer, prompts, answers) == []
    assert trained_unlike_sampled(tokenizer, prompts, answers) == []


def test_turns_that_a_template_refuses_are_not_its_matter(tokenizer: Any) -> None:
    refuses = with_template(tokenizer, "{{ raise_exception('no') }}")
    assert lost_thoughts(refuses, [PROMPT], [THOUGHT]) == trained_unlike_sampled(refuses, [PROMPT], [PLAIN]) == []


def test_a_thought_is_what_stands_between_its_marks() -> None:
    texts = (THOUGHT, "Rivers.\n</think>\nThe Danube.", "<think>\n\n</think>\n\nThe Danube.", PLAIN, "<think>cut off")
    assert [thought_of(text) for text in texts] == ["Rivers of Europe.", "Rivers.", "", "", ""]
