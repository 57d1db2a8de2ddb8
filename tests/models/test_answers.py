"""An answer's way from the ids that SFT teaches to a text and back to the ids that are scored: they are the same ids."""

from typing import Any

import pytest
import torch

from rlhf.models.critiques import critique_ids
from rlhf.models.demonstrations import encode_demonstrations
from rlhf.models.generate import completions_of, encode_prompts, has_hidden_tokens, texts_of
from rlhf.models.scratch import train_tokenizer
from rlhf.models.templates import end_at_end_token, frame, rendered, turn_end_ids
from rlhf.models.text import PLAIN_TEMPLATE, check_tokenizer, encode_answers, give_plain_template
from rlhf.ppo.ptx import Demonstrations
from tests.models.test_templates import CHATML, MISTRAL, ZEPHYR, with_template
from tests.recipes import templates
from tests.reward.families import FAMILIES

PROMPT: Any = [{"role": "user", "content": "Name a river, please."}]
ANSWER = "The Danube is one of them."
TEXTS = [f"Human: Name a river, please.\n\nAssistant: {ANSWER}"] * 50
# DeepSeek's second version and its kin: a blank behind "Assistant:" once there is an answer.
DEEPSEEK_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}{% else %}{{ m['content'] + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def scratch(template: str) -> Any:
    """Words over bytes, in which a blank belongs to the word behind it."""
    return with_template(train_tokenizer(TEXTS, vocab_size=400, model_max_length=1024), template)


def pieces() -> Any:
    """A base whose decoder leaves a blank at the beginning out."""
    return with_template(templates.llama_2(TEXTS), PLAIN_TEMPLATE)


ENDED = {"ChatML": CHATML, "Zephyr": ZEPHYR, "Mistral": MISTRAL}
LEADS = {"transcripts": lambda: scratch(PLAIN_TEMPLATE), "DeepSeek-V2": lambda: scratch(DEEPSEEK_2), "Llama 2": pieces}
MADE = {
    **LEADS,
    **{name: lambda template=template: scratch(template) for name, template in ENDED.items()},
    **{f"family {name}": family.build for name, family in FAMILIES.items()},
    "Qwen3": lambda: templates.qwen_3(TEXTS),
}
OPENED, CLOSED = "<opened>", "<closed>"


def build(name: str) -> Any:
    tokenizer = MADE[name]()
    give_plain_template(tokenizer)
    check_tokenizer(tokenizer, conversational=True, name=name)
    return tokenizer


def demonstration(tokenizer: Any, answer: str) -> tuple[list[int], list[int]]:
    """The ids that SFT reads, and those that it learns."""
    batch: Any = {"prompt": [PROMPT], "completion": [[{"role": "assistant", "content": answer}]]}
    columns = encode_demonstrations(batch, tokenizer)
    (row,), (mask,) = columns["input_ids"], columns["completion_mask"]
    return row, row[mask.index(1) :]


def taught(tokenizer: Any, answer: str) -> tuple[list[int], list[int]]:
    """The ids of a demonstration, and those of its answer to the first end token, where sampling stops."""
    row, learnt = demonstration(tokenizer, answer)
    stops = [learnt.index(x) + 1 for x in (tokenizer.eos_token_id, *turn_end_ids(tokenizer)) if x in learnt]
    return row, learnt[: min(stops)] if stops else learnt


@pytest.mark.fault("chat template")
@pytest.mark.parametrize("name", MADE)
def test_an_answer_is_scored_as_the_ids_that_sft_teaches(name: str) -> None:
    """Sampled behind messages, and behind a prompt that a client rendered."""
    tokenizer = build(name)
    lead = frame(tokenizer).lead
    blanks = [" The Danube.", "  The Danube.", "\nThe Danube.", " "] if name in LEADS else []
    for answer in (ANSWER, "", *blanks):
        row, learnt = taught(tokenizer, answer)
        (text,) = texts_of(tokenizer, [learnt], conversational=True)
        assert encode_answers(tokenizer, [PROMPT], [text])[0] == [row], (answer, text)
        if lead.isspace():
            assert text == answer
            asked = rendered(tokenizer, PROMPT, asks=True)
            assert encode_answers(tokenizer, [asked], [text], conversational=True)[0] == [row], text
    asked = rendered(tokenizer, PROMPT, asks=True)
    assert encode_answers(tokenizer, [asked], [ANSWER], conversational=True)[0] == [taught(tokenizer, ANSWER)[0]]


@pytest.mark.parametrize("name", LEADS)
def test_the_blank_that_the_template_writes_is_learnt_once_and_read_once(name: str) -> None:
    tokenizer = build(name)
    row, learnt = taught(tokenizer, ANSWER)
    assert frame(tokenizer).lead == " "
    assert tokenizer.convert_ids_to_tokens(learnt)[0] in ("ĠThe", "▁The")
    completions = completions_of(
        tokenizer, [row], [learnt], end_ids=[tokenizer.eos_token_id], conversational=True, device=torch.device("cpu")
    )
    assert completions.texts == [ANSWER]
    assert completions.response_ids.tolist() == [learnt], "the ids stay those that were sampled"
    (of_beginning,) = texts_of(tokenizer, [learnt[:2]], conversational=True)
    assert of_beginning == tokenizer.decode(learnt[:2]).strip()
    assert texts_of(tokenizer, [[]], conversational=True) == [""]


def test_an_answer_ends_at_its_first_end_token_whatever_sampled_it() -> None:
    """An engine that does not stop there gives more; none of it is trained or read."""
    tokenizer = scratch(PLAIN_TEMPLATE)
    end = tokenizer.eos_token_id
    words, more = (tokenizer(text)["input_ids"] for text in (" The Danube.", " And the Rhine."))
    found = completions_of(
        tokenizer,
        [[5], [5, 6]],
        [[*words, end, *more, end], more],
        end_ids=[2, end],
        conversational=True,
        device=torch.device("cpu"),
    )
    pads = [tokenizer.pad_token_id] * (len(more) - len(words) - 1)
    assert found.response_ids.tolist() == [[*words, end, *pads], more]
    assert found.response_mask.sum(dim=1).tolist() == [len(words) + 1, len(more)]
    assert found.ended.tolist() == [True, False]
    assert found.texts == ["The Danube.", "And the Rhine."]


def test_special_tokens_that_no_text_shows_are_counted_but_for_the_end() -> None:
    tokenizer = build("ChatML")
    tokenizer.add_tokens(["<think>"])
    end, pad, thinks = tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer) - 1
    other = tokenizer.convert_tokens_to_ids("<|user|>")
    words = tokenizer("The Danube")["input_ids"]
    answers = [[*words, end], words, [other, *words, end], [*words, other], [pad, *words], [thinks, *words, end], [end]]
    found = completions_of(
        tokenizer, [[5]] * 7, answers, end_ids=[end], conversational=True, device=torch.device("cpu")
    )
    assert has_hidden_tokens(tokenizer, found).tolist() == [False, False, True, True, True, False, False]
    assert found.texts == ["The Danube"] * 5 + ["<think>The Danube", ""]


def test_what_follows_a_plain_text_keeps_its_blank() -> None:
    tokenizer = scratch(PLAIN_TEMPLATE)
    prompt = "Name a river:"
    (row,), _ = encode_answers(tokenizer, [prompt], [f" {ANSWER}"])
    learnt = row[len(tokenizer(prompt)["input_ids"]) :]
    assert texts_of(tokenizer, [learnt], conversational=False) == [f" {ANSWER}"]


@pytest.mark.parametrize("name", MADE)
def test_a_critique_is_read_as_the_ids_that_were_written(name: str) -> None:
    """No template writes anything before a critique, neither in training nor behind a critique of the model's own."""
    tokenizer = build(name)
    rows = critique_ids(tokenizer, [ANSWER, ANSWER], [True, False])
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert texts == [ANSWER, ANSWER]
    assert critique_ids(tokenizer, texts, [True, False]) == rows


@pytest.mark.parametrize("name", MADE)
def test_what_is_typed_into_a_critique_ends_nothing(name: str) -> None:
    """As in answers: an end token in the middle is words, and one at the end is the critique's own."""
    tokenizer = build(name)
    end = tokenizer.eos_token
    whole, cut, doubled = critique_ids(tokenizer, [f"The {end} is", f"The {end} is", f"is{end}"], [True, False, True])
    assert whole == [*cut, tokenizer.eos_token_id]
    assert not {*cut} & {*tokenizer.all_special_ids}
    assert tokenizer.decode(cut, skip_special_tokens=True).replace(" ", "") == f"The{end}is".replace(" ", "")
    assert [doubled] == critique_ids(tokenizer, ["is"], [True])


@pytest.mark.parametrize("name", MADE)
def test_ptx_counts_the_tokens_that_sft_learns(name: str) -> None:
    """Also the first one of an answer, and an empty thought, that stand behind the prompt; also in rows that are cut."""
    tokenizer = build(name)
    end_at_end_token(tokenizer)
    completion = [{"role": "assistant", "content": ANSWER}]
    row, learnt = demonstration(tokenizer, ANSWER)
    for limit in (None, len(row) - 3):
        drawn = Demonstrations(tokenizer, [{"prompt": PROMPT, "completion": completion}], max_length=limit)
        ids, counts = drawn.draw(1, torch.device("cpu"))
        assert ids[0, 4 - len(row) :].tolist() == row[4:]
        assert ids[counts].tolist() == learnt


@pytest.mark.fault("chat template")
@pytest.mark.parametrize("opening", [": ", "\n\n", "\n", ":", " "])
@pytest.mark.parametrize("name", MADE)
def test_an_answer_is_taught_behind_the_ids_that_sampling_begins_with(name: str, opening: str) -> None:
    """A prompt that ends in a blank melts with an answer's first word: SFT learnt by heart, and 1 of 15 answers was right."""
    tokenizer = build(name)
    template = (
        "{% for m in messages %}{% if m.role != 'assistant' %}Q" + OPENED + "{{ m.content }}" + CLOSED + "{% else %}A" + OPENED
        + "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A" + OPENED + "{% endif %}"
    ).replace(OPENED, opening).replace(CLOSED, "\n")  # fmt: skip
    tokenizer.chat_template = template
    row, learnt = demonstration(tokenizer, "apple pie")
    (asked,) = encode_prompts(tokenizer, [PROMPT], max_prompt_length=None)
    assert row[: len(asked)] == asked
    assert row[len(asked) :] == learnt, "all of the answer is taught, and nothing of the prompt"
    assert tokenizer.decode(learnt, skip_special_tokens=True).strip() == "apple pie"
    whole = tokenizer.decode(asked) + tokenizer.decode(learnt)
    assert "A" + opening + "apple pie" in whole.replace("  ", " "), whole
