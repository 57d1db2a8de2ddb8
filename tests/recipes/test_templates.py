"""The stand-ins' templates are those of the models, and every stage reads the text that a stranger would write."""

from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf.models.demonstrations import encode_demonstrations
from rlhf.models.generate import encode_prompts
from rlhf.models.load import load_tokenizer
from rlhf.models.templates import end_at_end_token
from rlhf.models.text import encode_answers
from tests.recipes import templates
from tests.recipes.stand_ins import texts


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


USER, ANSWER = turn("user", " Can you say 3 ?\n"), turn("assistant", "Yes , 3 .")
SYSTEM = turn("system", "Be brief.")
THOUGHT = turn("assistant", "<think>\nThree?\n</think>\n\nYes , 3 .")
CONVERSATIONS = {
    "a question": [USER],
    "an answer": [USER, ANSWER],
    "two answers": [USER, ANSWER, USER, ANSWER],
    "a system turn": [SYSTEM, USER, ANSWER],
    "a thought": [USER, THOUGHT],
    "an earlier thought": [USER, THOUGHT, USER, ANSWER],
}
ORIGINALS: dict[str, Callable[..., Any]] = {
    "qwen3": templates.qwen_3,
    "qwen2_5": templates.qwen_2_5,
    "llama3_1": templates.llama_3_1,
    "gemma3": templates.gemma_3,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: build(texts()) for name, build in ORIGINALS.items()}


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_template_written_anew_writes_what_the_original_writes(
    tokenizers: dict[str, Any], name: str, conversation: str
) -> None:
    original = resources.files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    tokenizer, messages = tokenizers[name], CONVERSATIONS[conversation]
    for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
        expected = rendered(tokenizer, messages, chat_template=original, **options)
        assert rendered(tokenizer, messages, **options) == expected


@pytest.fixture(scope="module", params=ORIGINALS)
def pair(request: pytest.FixtureRequest, tokenizers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stranger's tokenizer, and the same one as a stage loads it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers[request.param].save_pretrained(folder)
    return tokenizers[request.param], load_tokenizer(folder, conversational=True)


def stranger_ids(tokenizer: PreTrainedTokenizerBase, messages: Any, *, asks: bool = False) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=asks, return_dict=False)
    assert isinstance(ids, list)
    return ids


PROMPTS: list[Any] = [[USER], [SYSTEM, USER], [USER, ANSWER, USER]]


def test_a_policy_reads_the_prompt_that_transformers_writes(pair: Any) -> None:
    stranger, tokenizer = pair
    expected = [stranger_ids(stranger, prompt, asks=True) for prompt in PROMPTS]
    assert encode_prompts(tokenizer, PROMPTS, max_prompt_length=None) == expected


def test_sft_learns_what_stands_behind_the_prompt_to_the_end_of_the_turn(pair: Any) -> None:
    """In Qwen3 the empty thought is learnt too, so that a policy whose prompts ask for one does not think for long."""
    stranger, tokenizer = pair
    batch: Any = {"prompt": PROMPTS, "completion": [[ANSWER]] * len(PROMPTS)}
    rows = encode_demonstrations(batch, tokenizer)
    for prompt, ids, mask in zip(PROMPTS, rows["input_ids"], rows["completion_mask"], strict=True):
        expected = stranger_ids(stranger, [*prompt, ANSWER])
        assert ids == expected
        learnt = tokenizer.decode([token for token, is_answer in zip(ids, mask, strict=True) if is_answer])
        thought = "<think>\n\n</think>\n\n" if "<think>" in stranger.chat_template else ""
        assert learnt.startswith(f"{thought}Yes , 3 .")
        assert sum(mask) == len(expected) - len(stranger_ids(stranger, prompt, asks=True))


def test_a_reward_model_reads_the_conversation_and_one_end_token(pair: Any) -> None:
    stranger, tokenizer = pair
    end_at_end_token(tokenizer)
    rows, _ = encode_answers(tokenizer, PROMPTS, ["Yes , 3 ."] * len(PROMPTS))
    for prompt, ids in zip(PROMPTS, rows, strict=True):
        text = rendered(stranger, [*prompt, ANSWER])
        end = stranger.eos_token
        text = text.rstrip("\n") if text.rstrip("\n").endswith(end) else text.rstrip("\n") + end
        assert ids == stranger(text, add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == text.count(end)
        assert ids.count(tokenizer.bos_token_id) == (1 if tokenizer.bos_token else 0)


def test_an_answer_with_its_thought_has_one_thought(tokenizers: dict[str, Any]) -> None:
    """A policy of Qwen3 samples its thought, empty or not, and the template must not write another one before it."""
    tokenizer = tokenizers["qwen3"]
    asked = rendered(tokenizer, [USER], add_generation_prompt=True)
    skipped = rendered(tokenizer, [USER], add_generation_prompt=True, enable_thinking=False)
    for answer, prompt in [
        ("Yes , 3 .", [USER]),
        ("<think>\n\n</think>\n\nYes , 3 .", [USER]),
        ("Yes , 3 .", asked),
        ("<think>\n\n</think>\n\nYes , 3 .", asked),
        ("Yes , 3 .", skipped),
    ]:
        (ids,), _ = encode_answers(tokenizer, [prompt], [answer], conversational=True)
        assert ids == stranger_ids(tokenizer, [USER, ANSWER]), (answer, prompt)
    for prompt in ([USER], asked):
        (ids,), _ = encode_answers(tokenizer, [prompt], [THOUGHT["content"]], conversational=True)
        assert ids == stranger_ids(tokenizer, [USER, THOUGHT])


def test_padding_tokens(tokenizers: dict[str, Any], tmp_path: Any) -> None:
    """Llama 3.1 and Llama 2 have none, SmolLM2's is its end token: one that no text needs takes its place."""
    built = {"llama_3_1": "<|finetune_right_pad_id|>", "llama_2": "<unk>", "smol_lm_2": "<|endoftext|>"}
    for name, pad in built.items():
        getattr(templates, name)(texts()).save_pretrained(tmp_path / name)
        tokenizer = load_tokenizer(tmp_path / name, conversational=True)
        assert tokenizer.pad_token == pad
        assert (
            tokenizer.pad_token_id not in tokenizer("any 語 \U0001f9ff text\x00", add_special_tokens=False)["input_ids"]
        )
