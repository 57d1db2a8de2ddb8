"""Chat templates: what is scored ends in the end token, prompts stay as they are, other programs read the same text."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, pipeline

from rlhf.models.templates import (
    CONVERSATIONS,
    add_no_tokens,
    affixes,
    end_at_end_token,
    rendered,
    same_text,
    template_problems,
    turn_end_ids,
)
from rlhf.models.text import answer_text, closed_text, encode, encode_answers, give_plain_template, is_rendered
from rlhf.reward.load import load_reward_model, open_reward_model, save_reward_model
from tests.conftest import PROMPTS, WORDS
from tests.reward.families import FAMILIES
from tests.unit_scale import build_reward_model

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The newlines and blanks between the tags matter: transformers renders with trim_blocks and lstrip_blocks.
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
    {% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<start_of_turn>' + role + '
' + m['content'] | trim + '<end_of_turn>
' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model
' }}{% endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for m in loop_messages %}{% set content = '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + "
    "content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>
' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>
' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>
'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = "
    "messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (system + '\n\n' if system is "
    "defined and loop.first else '') + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token + ' ' }}"
    "{% endif %}{% endfor %}"
)
# White space before the first tag, and after the last one.
PADDED = "\n\n  {% for m in messages %}\n  {{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n  {% endfor %}  \n"
NOTHING = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
ALL = {
    "chatml": CHATML,
    "gemma": GEMMA,
    "llama-3": LLAMA3,
    "zephyr": ZEPHYR,
    "mistral": MISTRAL,
    "padded": PADDED,
    "nothing": NOTHING,
}


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.bos_token = changed.bos_token or changed.pad_token
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("name", ALL)
def test_a_reward_row_ends_in_the_end_token_and_prompts_stay(tokenizer: Any, name: str) -> None:
    own, wrapped = with_template(tokenizer, ALL[name]), with_template(tokenizer, ALL[name])
    assert end_at_end_token(wrapped)
    read = 0
    for conversation in CONVERSATIONS:
        try:
            text = rendered(own, conversation)
        except Exception:  # no system turn
            continue
        read += 1
        end = tokenizer.eos_token
        ended = text.rstrip() if text.rstrip().endswith(end) else text.rstrip("\n") + end
        assert rendered(wrapped, conversation) == ended
        prompt = conversation[:-1]
        assert rendered(wrapped, prompt, asks=True) == rendered(own, prompt, asks=True)
        assert rendered(wrapped, prompt) == rendered(own, prompt)
        assert answer_text(wrapped, prompt, "yes please") == rendered(
            wrapped, [*prompt, {"role": "assistant", "content": "yes please"}]
        )
        assert answer_text(wrapped, prompt, "yes please", ended=False).endswith("yes please")
        (row,), _ = encode_answers(wrapped, [prompt], ["yes please"])
        assert row[-1] == tokenizer.eos_token_id
        assert row[-2] != tokenizer.eos_token_id
    assert read >= 2
    assert not end_at_end_token(wrapped), "wrapped once"
    assert same_text(own, wrapped)


def test_a_template_that_ends_in_the_end_token_is_left_alone(tokenizer: Any) -> None:
    before = tokenizer.chat_template
    assert not end_at_end_token(tokenizer)
    assert tokenizer.chat_template == before


@pytest.mark.parametrize("name", ALL)
def test_the_wrapped_template_survives_saving(tokenizer: Any, name: str, tmp_path: Path) -> None:
    wrapped = with_template(tokenizer, ALL[name])
    end_at_end_token(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert rendered(again, CONVERSATIONS[1]) == rendered(wrapped, CONVERSATIONS[1])


def test_other_texts_are_told_apart(tokenizer: Any) -> None:
    assert same_text(tokenizer, copy.deepcopy(tokenizer))
    assert not same_text(tokenizer, with_template(tokenizer, CHATML))
    assert not same_text(with_template(tokenizer, CHATML), with_template(tokenizer, ZEPHYR))


def test_the_token_that_ends_a_turn(tokenizer: Any) -> None:
    assert turn_end_ids(tokenizer) == [tokenizer.eos_token_id]
    assert turn_end_ids(with_template(tokenizer, CHATML)) == [tokenizer.eos_token_id]
    other = CHATML.replace("eos_token", "'<|user|>'")
    assert turn_end_ids(with_template(tokenizer, other)) == [tokenizer.convert_tokens_to_ids("<|user|>")]
    assert turn_end_ids(with_template(tokenizer, NOTHING)) == []
    letters = tokenizer("END", add_special_tokens=False)["input_ids"]
    assert turn_end_ids(with_template(tokenizer, CHATML.replace("eos_token", "'END'"))) == letters[:1]


@pytest.mark.fault("chat template")
def test_turns_that_a_template_refuses_are_named_before_anything_runs(tokenizer: Any) -> None:
    system = [{"role": "system", "content": "Be short."}, *PROMPTS[0]]
    prompts = [PROMPTS[0], system, PROMPTS[1], system]
    (problem,) = template_problems(with_template(tokenizer, GEMMA), prompts)
    assert problem.startswith("2 prompts (the first is row 1) have the turns system, user")
    assert "System role not supported" in problem
    assert template_problems(tokenizer, prompts) == []
    assert template_problems(tokenizer, ["a plain text"]) == []


@pytest.mark.fault("chat template")
def test_a_system_turn_that_a_template_leaves_out_is_named() -> None:
    """Mistral's third version writes it into a question that waits for its answer, and not into one that has it."""
    mistral = FAMILIES["Mistral v3"].build()
    system = [{"role": "system", "content": "Be short."}, *PROMPTS[0]]
    (problem,) = template_problems(mistral, [PROMPTS[0], system])
    assert problem.startswith("1 prompts (the first is row 1) have the turns system, user, and the chat template of")
    assert "leaves the system turn out once there is an answer" in problem


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_rendered_if_its_template_asks_for_an_answer(name: str) -> None:
    tokenizer = FAMILIES[name].build()
    give_plain_template(tokenizer)
    asks = rendered(tokenizer, PROMPTS[0], asks=True)
    for prompt in (asks, asks.rstrip(), asks.removeprefix(tokenizer.bos_token or "?")):
        assert is_rendered(tokenizer, prompt)
    end = tokenizer.eos_token
    for words in ("What is a cherry?", f"Say {end}", f"{end} and go on", f"{tokenizer.pad_token}", ""):
        assert not is_rendered(tokenizer, words), "a person typed that"


def adding(tokenizer: Any, *, before: bool, after: bool) -> Any:
    """The tokenizer, which now writes a begin or an end token by itself, as Llama's and Gemma's do."""
    changed = with_template(tokenizer, "{{ bos_token }}" + CHATML)
    single = ("<b> " if before else "") + "$A" + (" <e>" if after else "")
    changed._tokenizer.post_processor = processors.TemplateProcessing(
        single, special_tokens=[("<b>", changed.bos_token_id), ("<e>", changed.eos_token_id)]
    )
    return changed


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_prompts_do_not_end_and_answers_end_once(tokenizer: Any, before: bool, after: bool) -> None:
    adds = adding(tokenizer, before=before, after=after)
    assert affixes(adds) == (before, after)
    (prompt,) = encode(adds, ["Question: one?"], conversational=False)
    assert prompt[-1] != adds.eos_token_id
    assert (prompt[0] == adds.bos_token_id) == before
    (row,), _ = encode_answers(adds, ["Question: one?"], ["two"])
    assert row.count(adds.eos_token_id) == 1
    assert row[-1] == adds.eos_token_id
    assert row[: len(prompt)] == prompt
    if before or after:
        assert add_no_tokens(adds)
        assert affixes(adds) == (0, 0)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_the_saved_model_has_the_same_scores_in_the_pipeline_of_transformers(
    base_folder: Path, tokenizer: Any, tmp_path: Path, before: bool, after: bool
) -> None:
    adds = adding(tokenizer, before=before, after=after)
    torch.manual_seed(0)
    model = build_reward_model(base_folder, pad_token_id=adds.pad_token_id)
    samples = [(prompt, f"yes {word}" * (i + 1)) for i, (prompt, word) in enumerate(zip(PROMPTS, WORDS, strict=False))]
    ours = save_reward_model(tmp_path, model, adds, samples=samples)
    prompts, answers = [p for p, _ in samples], [a for _, a in samples]
    scores = ours.score(prompts, answers)
    torch.testing.assert_close(load_reward_model(tmp_path).score(prompts, answers), scores)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    texts = [plain.apply_chat_template([*p, {"role": "assistant", "content": a}], tokenize=False) for p, a in samples]
    classify = pipeline("text-classification", model=str(tmp_path), tokenizer=str(tmp_path))
    for keys in ({}, {"add_special_tokens": False}, {"batch_size": 4}):
        theirs = torch.tensor([x["score"] for x in classify(texts, **keys)])
        torch.testing.assert_close(theirs, scores, atol=1e-4, rtol=0)
    assert adds.chat_template == "{{ bos_token }}" + CHATML, "the caller's tokenizer keeps its own"
    assert set(ours.checks.entries) == {"score alone = in a batch", "score as its template renders"}


def test_a_foreign_model_is_read_at_the_end_of_what_its_template_renders(
    base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    for name in ("chatml", "zephyr", "padded", "llama-3"):
        folder = tmp_path / name
        own = with_template(tokenizer, ALL[name])
        torch.manual_seed(0)
        network = build_reward_model(base_folder, pad_token_id=own.pad_token_id).eval()
        network.save_pretrained(folder)
        own.save_pretrained(folder)
        conversation = [*PROMPTS[0], {"role": "assistant", "content": "yes please"}]
        ids = own.apply_chat_template(conversation, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected = network(input_ids=ids).logits.item()
        with pytest.warns(UserWarning, match="not checked against stored"):
            foreign = open_reward_model(str(folder))
        assert foreign.score([PROMPTS[0]], ["yes please"]).item() == pytest.approx(expected, abs=1e-5)


def test_a_begin_token_that_marks_the_system_turn_is_kept(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.bos_token = "<|system|>"
    turns = [{"role": "user", "content": "list two"}, {"role": "assistant", "content": "yes"}]
    with_system = [{"role": "system", "content": "please"}, *turns]
    for conversation in (turns, with_system):
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        assert closed_text(tokenizer, text, conversational=True) == text
        assert closed_text(tokenizer, tokenizer.bos_token + text, conversational=True) == text
