"""Ends that can't be reached, policies that don't end, prompts of which no beginning is read."""

import copy
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.invariants.checks import CheckBook
from rlhf.invariants.ends import ends_reachable, policy_ends, prompts_too_long, require_reachable_end

TURN = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}CLOSE{% endif %}{% endfor %}"
CLOSINGS = {
    "end token": ("{{ eos_token }}", True),
    "end token and newline": ("{{ eos_token + '\\n' }}", True),
    "blank and end token": ("{{ ' ' + eos_token }}", True),
    "turn token, then end token": ("{{ '<|user|>\\n' + eos_token }}", True),
    "another special token": ("{{ '<|user|>\\n' }}", False),
    "plain text": ("{{ '\\n\\n' }}", False),
    "nothing": ("", False),
}


@pytest.fixture
def closed(tokenizer: Any) -> Any:
    """A function from what is written after an answer to a tokenizer whose template does so."""

    def make(close: str) -> Any:
        other = copy.deepcopy(tokenizer)
        other.chat_template = TURN.replace("CLOSE", close)
        return other

    return make


@pytest.mark.parametrize("close", CLOSINGS)
def test_the_ending_that_sft_teaches_must_be_one_at_which_sampling_stops(closed: Any, close: str) -> None:
    text, holds = CLOSINGS[close]
    tokenizer = closed(text)
    assert ends_reachable(tokenizer, [tokenizer.eos_token_id], is_trained_here=True).held is holds


@pytest.mark.parametrize("close", CLOSINGS)
def test_a_policy_trained_elsewhere_is_believed_unless_its_template_names_another_token(
    closed: Any, close: str
) -> None:
    text, holds = CLOSINGS[close]
    tokenizer = closed(text)
    expected = holds or close in ("plain text", "nothing")
    assert ends_reachable(tokenizer, [tokenizer.eos_token_id], is_trained_here=False).held is expected


def test_a_second_end_token_of_the_generation_configuration_counts(closed: Any) -> None:
    tokenizer = closed("{{ '<|user|>\\n' }}")
    end_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")]
    assert ends_reachable(tokenizer, end_ids, is_trained_here=True).held


def test_the_sentence_names_both_tokens_and_what_to_change(closed: Any) -> None:
    tokenizer, checks = closed("{{ '<|user|>\\n' }}"), CheckBook()
    with pytest.raises(UserError) as error:
        require_reachable_end(checks, tokenizer, [tokenizer.eos_token_id], stage="sft", is_trained_here=True)
    sentence = error.value.problems[0]
    assert sentence.startswith("sft: ")
    for words in ("'<|user|>'", repr(tokenizer.eos_token), "sft.eos_token: '<|user|>'"):
        assert words in sentence
    assert checks.entries["ends reachable"]["held"] is False


def test_one_answer_of_sixteen_must_end() -> None:
    assert not policy_ends([False] * 16, max_new_tokens=40).held
    check = policy_ends([False] * 15 + [True], max_new_tokens=40)
    assert check.held
    assert check.statistic == 1 / 16
    assert policy_ends([True] * 16, max_new_tokens=40).held


def test_prompts_are_too_long_only_where_all_of_them_are() -> None:
    assert prompts_too_long([9, 10], 8) is not None
    assert "1 of the 2 prompts that were looked at are longer than the 8 tokens" in str(prompts_too_long([8, 10], 8))
    assert prompts_too_long([7, 8], 8) is None
    assert prompts_too_long([9, 10], None) is None
    assert prompts_too_long([], 8) is None
