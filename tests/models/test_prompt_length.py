"""How long a prompt may be is decided in one place, and everything that samples answers reads as much of one as PPO does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPT2LMHeadModel

from rlhf.errors import UserError
from rlhf.models.generate import answer_starts, completer, encode_prompts, generate, sample_texts
from rlhf.models.prompt_length import longest_prompt, room_for_prompt
from tests.conftest import PROMPTS, WORDS

CONTEXT, ANSWER = 128, 40  # tokens that the tiny models read; of an answer
LONG = [[{"role": "user", "content": " ".join(WORDS * 20) + f" {word}"}] for word in WORDS[:2]]


@pytest.fixture(params=["rotary positions", "learnt positions"])
def model(request: pytest.FixtureRequest, base_folder: Path, tokenizer: Any) -> Any:
    if request.param == "rotary positions":
        return AutoModelForCausalLM.from_pretrained(base_folder).eval()
    torch.manual_seed(0)
    sizes = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, eos_token_id=tokenizer.eos_token_id, **sizes)).eval()


def test_a_prompt_has_what_was_asked_for_or_what_an_answer_leaves(model: Any) -> None:
    def length(asked: int | None, answer: int = ANSWER) -> int | None:
        return longest_prompt(model.config, max_new_tokens=answer, max_prompt_length=asked)

    assert (length(None), length(512), length(20)) == (CONTEXT - ANSWER, CONTEXT - ANSWER, 20)
    assert length(20, answer=CONTEXT - 1) == 1
    with pytest.raises(
        UserError, match=f"={CONTEXT} leaves no room for a prompt in the model's context of {CONTEXT} tok"
    ):
        length(20, answer=CONTEXT)


def test_a_model_without_a_limit_reads_what_is_asked_for() -> None:
    config = BloomConfig()
    assert [longest_prompt(config, max_new_tokens=9999, max_prompt_length=n) for n in (None, 512)] == [None, 512]
    assert room_for_prompt(config, max_new_tokens=9999) is None


@pytest.mark.parametrize("asked", [None, 512, 20])
def test_whatever_samples_reads_no_more_of_a_prompt_than_its_answer_leaves(
    model: Any, tokenizer: Any, asked: int | None
) -> None:
    """Beyond the context learnt positions end in an IndexError, and rotary ones in texts that nobody trained."""
    room = min(CONTEXT - ANSWER, asked or CONTEXT)
    settings: dict[str, Any] = {"max_new_tokens": ANSWER, "max_prompt_length": asked}
    expected = encode_prompts(tokenizer, LONG, max_prompt_length=room)
    assert [len(row) for row in expected] == [room] * 2
    for completions in (
        generate(model, tokenizer, LONG, **settings),
        completer(model, tokenizer, LONG, **settings)([0, 1]),
    ):
        assert completions.prompt_ids.tolist() == expected
    assert len(sample_texts(model, tokenizer, LONG, batch_size=1, **settings)[0]) == 2
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        sample_texts(model, tokenizer, PROMPTS[:2], batch_size=1, max_new_tokens=CONTEXT)


def test_a_prompt_of_no_tokens_is_refused(model: Any, tokenizer: Any) -> None:
    """Nothing comes before its answer's first token, so the log-probability was read behind another row's last one."""
    assert tokenizer("")["input_ids"] == []
    with pytest.raises(UserError, match=r"prompts: 2 of 4 have no tokens \(the first is index 1: ''\)"):
        sample_texts(model, tokenizer, ["list red", "", "please", ""], batch_size=1, max_new_tokens=ANSWER)
    assert answer_starts(tokenizer, [""], [[5, 6]]) == [0], "a text that is not sampled may be all answer"


def test_an_engine_is_given_no_more_either(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []

    def answers(_: Any, rows: list[list[int]], **__: Any) -> list[list[int]]:
        given.extend(rows)
        return [[tokenizer.eos_token_id]] * len(rows)

    monkeypatch.setattr("rlhf.models.generate.engine_answers", answers)
    sample_texts(model, tokenizer, LONG, batch_size=1, max_new_tokens=ANSWER, max_prompt_length=512, engine="vllm")
    assert [len(row) for row in given] == [CONTEXT - ANSWER] * 2
