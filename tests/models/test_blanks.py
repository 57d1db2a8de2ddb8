"""Plain prompts: a reward model reads the very ids that the policy wrote, the blank before an answer's first word included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.models.blanks import lost_blank
from rlhf.models.generate import Completions, completions_of, encode_prompts, texts_of
from rlhf.models.text import encode_answers
from rlhf.ppo.rewards import texts_for
from rlhf.reward.model import RewardModel
from tests.models.test_answers import MADE, TEXTS, build
from tests.recipes import templates

WORDS = "The capital of France is Paris and a longer answer to it all was yes or no ."
PROMPT = "The capital of France is"
ANSWERS = [" Paris", "  Paris", " is a .", "  ", "Paris", "\nParis", ""]


def llama_2(metaspace: bool) -> Any:
    """As Llama 2's file has it: the blank is a part of the word behind it, and the decoder takes a first one away."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if metaspace:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=["\n"], show_progress=False)
    inner.train_from_iterator([WORDS] * 20, trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


LIKE_LLAMA_2: dict[str, Callable[[], Any]] = {
    "with a normaliser": lambda: llama_2(metaspace=False),
    "with Metaspace": lambda: llama_2(metaspace=True),
    "LlamaTokenizer": lambda: templates.llama_2([WORDS] * 20),
}


def sampled(tokenizer: Any, answers: list[str]) -> tuple[list[int], list[list[int]], Completions]:
    """A prompt's ids, those of answers that go on behind it, every second one cut off, and what is made of them."""
    (asked,) = encode_prompts(tokenizer, [PROMPT], max_prompt_length=None)
    ends = [True, False] * len(answers)
    rows, _ = encode_answers(tokenizer, [PROMPT] * len(answers), answers, ended=ends[: len(answers)])
    assert all(row[: len(asked)] == asked for row in rows)
    written = [row[len(asked) :] for row in rows]
    completions = completions_of(
        tokenizer,
        [asked] * len(answers),
        written,
        end_ids=[tokenizer.eos_token_id],
        conversational=False,
        device=torch.device("cpu"),
    )
    return asked, written, completions


@pytest.mark.parametrize("name", LIKE_LLAMA_2)
def test_a_reward_model_reads_the_ids_that_the_policy_wrote(name: str) -> None:
    tokenizer = LIKE_LLAMA_2[name]()
    tokenizer.pad_token = tokenizer.pad_token or "<unk>"
    answers = ANSWERS[:4] if name == "LlamaTokenizer" else ANSWERS
    asked, written, completions = sampled(tokenizer, [*answers, " Paris"])
    assert tokenizer.convert_ids_to_tokens(written[0]) == ["▁Paris", "</s>"]
    assert completions.texts == [*answers, " Paris"]
    assert completions.blank == " "
    reward = RewardModel(torch.nn.Linear(1, 1), tokenizer, max_length=100)
    texts = texts_for(reward, completions.texts, blank=completions.blank)
    rows = reward.encode([PROMPT] * len(texts), texts, completions.ended.tolist())
    assert rows == [[*asked, *ids] for ids in written]
    beginnings = [ids[:1] for ids in written[:2]] + [[]]
    assert texts_of(tokenizer, beginnings, conversational=False)[0::2] == [" Paris", ""]


@pytest.mark.parametrize("name", LIKE_LLAMA_2)
def test_as_a_message_an_answer_has_no_blank_before_it(name: str) -> None:
    tokenizer = LIKE_LLAMA_2[name]()
    tokenizer.pad_token = tokenizer.pad_token or "<unk>"
    _, written, completions = sampled(tokenizer, [" Paris", "  Paris", " is a ."])
    reward = RewardModel(torch.nn.Linear(1, 1), tokenizer, conversational=True, max_length=100)
    texts = texts_for(reward, completions.texts, blank=completions.blank)
    assert texts == ["Paris", " Paris", "is a ."]
    assert texts == tokenizer.batch_decode(written, skip_special_tokens=True), "as its decoder gives them"


@pytest.mark.parametrize("name", [name for name in MADE if "Llama 2" not in name])
def test_other_tokenizers_decode_as_they_always_did(name: str) -> None:
    tokenizer = build(name)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TEXTS[0], " yes", "yes .", "")]
    assert texts_of(tokenizer, rows, conversational=False) == tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert lost_blank(tokenizer) == ""
