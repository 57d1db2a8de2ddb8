"""What a prompt and an answer become: cut, padded, with a template or without, and with a date that stands still."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.errors import UserError
from rlhf.models.load import load_tokenizer
from rlhf.models.templates import end_at_end_token
from rlhf.models.text import answer_text, check_tokenizer, encode_answers, plain
from tests.conftest import PROMPTS

PROMPT = PROMPTS[0]


def test_the_text_of_an_answer(tokenizer: Any) -> None:
    ended = answer_text(tokenizer, PROMPT, "yes please")
    cut = answer_text(tokenizer, PROMPT, "yes please", ended=False)
    assert ended == cut + tokenizer.eos_token
    assert cut.endswith("yes please")
    assert answer_text(tokenizer, "plain ", "yes") == "plain yes" + tokenizer.eos_token
    assert answer_text(tokenizer, PROMPT, "", ended=False).endswith("<|assistant|>\n")


def test_a_template_that_ends_in_a_newline_still_ends_in_the_end_token(tokenizer: Any) -> None:
    import copy

    chatml = copy.deepcopy(tokenizer)
    chatml.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    assert answer_text(chatml, PROMPT, "yes").endswith("yes" + tokenizer.eos_token + "\n"), "a template not made here"
    assert answer_text(chatml, PROMPT, "yes", ended=False).endswith("yes")
    assert end_at_end_token(chatml)
    assert answer_text(chatml, PROMPT, "yes").endswith("yes" + tokenizer.eos_token)
    assert answer_text(chatml, PROMPT, "yes", ended=False).endswith("yes")


@pytest.mark.fault("rows too long")
def test_too_long_rows_lose_the_prompt_not_the_answer(tokenizer: Any) -> None:
    (whole,), none = encode_answers(tokenizer, [PROMPT], ["yes please"])
    (cut,), one = encode_answers(tokenizer, [PROMPT], ["yes please"], max_length=6)
    assert (none, one) == (0, 1)
    assert cut == whole[-6:]


@pytest.mark.fault("padding is the end")
def test_pad_that_equals_end_is_replaced_or_refused(tokenizer: Any) -> None:
    import copy

    wrong = copy.deepcopy(tokenizer)
    wrong.pad_token = wrong.eos_token
    check_tokenizer(wrong, conversational=True, name="x")
    assert wrong.pad_token == "<|pad|>", "a reserved token takes its place"
    from tests.ppo.test_ppo import bandit_tokenizer

    bare = bandit_tokenizer(8, pad_token="<eos>")
    with pytest.raises(UserError, match="no padding token other than its end token"):
        check_tokenizer(bare, conversational=False, name="x")
    with pytest.raises(UserError, match="no chat template"):
        check_tokenizer(bandit_tokenizer(8), conversational=True, name="x")


def test_any_text_can_be_encoded_and_decoded(tokenizer: Any) -> None:
    text = "שלום 👩‍👩‍👧 é \x07 tabs\tand\nlines"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_plain_prompts() -> None:
    assert plain(PROMPT) == PROMPT[0]["content"]
    assert (
        plain([*PROMPT, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])
        == f"user: {plain(PROMPT)}\n\nassistant: a\n\nuser: b"
    )


@pytest.mark.fault("chat template")
def test_a_base_model_without_a_chat_template_gets_transcripts(tokenizer: Any) -> None:
    import copy

    from rlhf.models.text import give_plain_template, prompt_text

    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    assert give_plain_template(base)
    assert not give_plain_template(base)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    end = base.eos_token
    assert prompt_text(base, turns) == f"\n\nHuman: a\n\nAssistant: b{end}\n\nHuman: c\n\nAssistant:"
    assert answer_text(base, turns, "d") == prompt_text(base, turns) + f" d{end}"
    assert answer_text(base, turns, "d", ended=False) == prompt_text(base, turns) + " d"


@pytest.mark.fault("cut or ended answer")
@pytest.mark.parametrize("answer", ["d", "end", "<|", "n", " yes ", "a\n"])
def test_an_unended_answer_loses_only_the_close(tokenizer: Any, answer: str) -> None:
    cut = answer_text(tokenizer, PROMPT, answer, ended=False)
    assert cut.endswith("<|assistant|>\n" + answer)


DATED = (
    "{%- if not date_string is defined -%}{%- if strftime_now is defined -%}"
    '{%- set date_string = strftime_now("%d %b %Y") -%}{%- else -%}{%- set date_string = "26 Jul 2024" -%}'
    "{%- endif -%}{%- endif -%}Today: {{ date_string }}\n"
    "{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] + eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}assistant: {%- endif -%}"
)


@pytest.mark.fault("chat template")
def test_a_template_that_inserts_a_date_is_frozen(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3's own construction: the text of an answer is the same on two days, and the frozen template is saved."""
    import copy
    import datetime

    from transformers.utils import chat_template_utils

    dated = copy.deepcopy(tokenizer)
    dated.chat_template = DATED
    dated.save_pretrained(tmp_path)

    def on(day: int) -> str:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls(2030, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        chat_template_utils._compile_jinja_template.cache_clear()
        return answer_text(loaded, PROMPT, "yes")

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert on(1) != on(2), "the trap itself: without freezing, the text changes with the day"
    with pytest.warns(UserWarning, match="frozen at 26 Jul 2024"):
        loaded = load_tokenizer(tmp_path, conversational=True)
    assert on(1) == on(2)
    assert on(1).startswith("Today: 26 Jul 2024")
    loaded.save_pretrained(tmp_path / "again")
    assert "strftime_now(" not in (AutoTokenizer.from_pretrained(tmp_path / "again").chat_template or "")
    loaded.chat_template = "{{ strftime_now(form) }}"
    loaded.save_pretrained(tmp_path / "computed")
    with pytest.raises(UserError, match="computes a date"):
        load_tokenizer(tmp_path / "computed", conversational=True)
