"""Verdicts of a causal model: what a stranger reads with plain transformers, what does not fit, which tokenizers can't."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.models.verdicts import VerdictModel, load_verdict_model

PROMPTS = [[{"role": "user", "content": "Name a fruit."}], [{"role": "user", "content": "Say yes, please {now}"}]]
FIRSTS, SECONDS = ["An apple.", "yes"], ["no", "The dog is three and blue, which is a long answer."]
# The question once more, as it must be to the last character.
ASKED = """Two assistants answered the same request. Judge which answer is better: correct, complete, safe, and no longer than \
it needs to be. The order of the answers says nothing about them.

[Request]
{}

[Answer A]
{}
[End of A]

[Answer B]
{}
[End of B]

Which answer is better? Say one letter only: A or B."""


@torch.no_grad()
def strangers_logprobs(folder: Path, prompt: str, first: str, second: str) -> torch.Tensor:
    """log p(A), log p(B): one question at a time, without padding, with what transformers itself offers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    messages = [{"role": "user", "content": ASKED.format(prompt, first, second)}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    letters = [tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
    logits = model(input_ids=ids).logits[0, -1].double()
    return (logits - logits.logsumexp(0))[torch.tensor(letters)[:, 0]]


def test_a_stranger_reads_the_same_verdicts(verdict_folder: Path) -> None:
    model = load_verdict_model(str(verdict_folder))
    verdicts = model.compare(PROMPTS, FIRSTS, SECONDS)
    for i, (prompt, first, second) in enumerate(zip(PROMPTS, FIRSTS, SECONDS, strict=True)):
        forward = strangers_logprobs(verdict_folder, prompt[0]["content"], first, second)
        backward = strangers_logprobs(verdict_folder, prompt[0]["content"], second, first)
        better = ((forward[0] - forward[1]) + (backward[1] - backward[0])) / 2
        towards_a = ((forward[0] - forward[1]) + (backward[0] - backward[1])) / 2
        assert verdicts.orders.log_odds[i].item() == pytest.approx(better.item(), abs=1e-5)
        assert verdicts.orders.bias[i].item() == pytest.approx(towards_a.item(), abs=1e-5)
        share = (forward.exp().sum() + backward.exp().sum()) / 2
        assert verdicts.share[i].item() == pytest.approx(share.item(), rel=1e-4)
    assert verdicts.fits.all()
    assert verdicts.orders.log_odds.abs().min() > 1e-3, "a model without a preference would prove nothing"


def test_swapped_answers_and_equal_answers(verdict_folder: Path) -> None:
    model = load_verdict_model(str(verdict_folder))
    verdicts, swapped = model.compare(PROMPTS, FIRSTS, SECONDS), model.compare(PROMPTS, SECONDS, FIRSTS)
    torch.testing.assert_close(swapped.orders.log_odds, -verdicts.orders.log_odds)
    torch.testing.assert_close(swapped.orders.bias, verdicts.orders.bias)
    equal = model.compare(PROMPTS, FIRSTS, FIRSTS)
    torch.testing.assert_close(equal.orders.log_odds, torch.zeros(2), atol=1e-5, rtol=0)


def test_a_question_that_does_not_fit_has_no_verdict_and_is_counted(verdict_folder: Path) -> None:
    model = load_verdict_model(str(verdict_folder))
    verdicts = model.compare(PROMPTS, ["dog " * 600, FIRSTS[1]], SECONDS)
    alone = model.compare(PROMPTS[1:], FIRSTS[1:], SECONDS[1:])
    assert verdicts.fits.tolist() == [False, True]
    assert (verdicts.orders.log_odds[0], verdicts.orders.bias[0], verdicts.share[0]) == (0, 0, 0)
    torch.testing.assert_close(verdicts.orders.log_odds[1:], alone.orders.log_odds, atol=1e-5, rtol=1e-5)
    assert model.too_long == 1


def word_tokenizer(*letters: str) -> Any:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{word: 3 + i for i, word in enumerate(letters)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **names)


@pytest.mark.parametrize("letters", [(), ("A",), ("B", "x")])
def test_letters_that_are_no_tokens_are_refused(letters: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="thing: its tokenizer does not write the answers A and B as one token each"):
        VerdictModel(None, word_tokenizer(*letters), name="thing")  # type: ignore[arg-type]


def test_letters_that_are_tokens_are_found_behind_the_template() -> None:
    assert VerdictModel(None, word_tokenizer("A", "B"), name="thing").letter_ids == (3, 4)  # type: ignore[arg-type]


def test_an_encoder_gives_no_verdict(encoder_folder: Path) -> None:
    with pytest.raises(UserError, match="an encoder says no next token"):
        load_verdict_model(str(encoder_folder))
