"""The turn that asks for a critique: the tokens that the chat template writes, and templates that can't write it."""

from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.models.critiques import REQUEST, request_ids
from rlhf.models.load import load_tokenizer
from tests import conftest

PROMPTS = list[Any](conftest.PROMPTS)


def test_the_request_is_what_the_template_writes(tokenizer: Any) -> None:
    answer = [*PROMPTS[0], {"role": "assistant", "content": "yes"}]
    with_request = [*answer, {"role": "user", "content": REQUEST}]
    before, whole = (
        tokenizer.apply_chat_template(x, add_generation_prompt=asks, return_dict=True)["input_ids"]
        for x, asks in ((answer, False), (with_request, True))
    )
    assert before + request_ids(tokenizer) == whole


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% if not loop.last %}-{% else %}{{ eos_token }}{% endif %}{% endfor %}", "otherwise"),
        ("{% if messages|length > 2 %}{{ raise_exception('no more') }}{% endif %}{{ messages[0]['content'] + eos_token }}", "refuses a turn"),
    ],
)  # fmt: skip
def test_a_template_that_can_not_ask_is_refused(base_folder: Any, template: str, sentence: str) -> None:
    tokenizer: Any = load_tokenizer(base_folder, conversational=True)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=sentence):
        request_ids(tokenizer)
