"""Sampling is ours alone: nothing that a checkpoint's generation configuration declares acts, but for its end tokens."""

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, MistralConfig

from rlhf.models.generate import (
    Completions,
    encode_prompts,
    end_token_ids,
    generate,
    mask_after_end,
    sample_texts,
    sampling_settings,
    without_declared_settings,
)
from rlhf.models.text import plain
from tests.conftest import PROMPTS, WORDS

# A value of each key that changes which tokens are drawn (or ends in an error) where it acts.
ACTING: dict[str, Any] = {
    "max_length": 3, "min_length": 60, "min_new_tokens": 12, "max_time": 1e-9, "stop_strings": ["e"], "num_beams": 3,
    "use_mtp": True, "cache_implementation": "no such cache", "max_cache_len": 1, "min_p": 0.4, "top_h": 0.1, "typical_p": 0.1,
    "epsilon_cutoff": 0.3, "eta_cutoff": 0.3, "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[i] for i in range(20, 200)],
    "forced_bos_token_id": 9, "forced_eos_token_id": 9, "exponential_decay_length_penalty": (1, 9.0),
    "suppress_tokens": list(range(20, 200)), "begin_suppress_tokens": list(range(20, 200)), "sequence_bias": [[[25], 90.0]],
    "guidance_scale": 9.0, "watermarking_config": {"bias": 9.0}, "num_return_sequences": 2,
    "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "low_memory": True, "penalty_alpha": 0.6, "dola_layers": "high",
    "diversity_penalty": 2.0, "num_beam_groups": 3, "constraints": [1], "force_words_ids": [[9]], "token_healing": True,
    "prefill_chunk_size": 2, "remove_invalid_values": True, "renormalize_logits": True, "early_stopping": True,
    "length_penalty": 4.0, "cache_config": {"nbits": 2}, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.9, "max_matching_ngram_size": 2,
    "assistant_lookbehind": 3, "target_lookbehind": 3, "assistant_ensemble_weight": 0.9, "speculation_type": "mtp",
    "do_sample": False, "temperature": 0.01, "top_k": 1, "top_p": 0.01, "max_new_tokens": 2, "use_cache": False,
    "return_dict_in_generate": False, "pad_token_id": 9, "bos_token_id": 9, "decoder_start_token_id": 9,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "compile_config": None, "disable_compile": True, "continuous_batching_config": None,
}  # fmt: skip
# What `transformers` itself would let act through the settings that are passed, on this model: the test can fail.
SEEN_TO_ACT = (
    "min_p", "typical_p", "epsilon_cutoff", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "guidance_scale", "num_beams", "watermarking_config",
    "forced_eos_token_id",
)  # fmt: skip
ENDS = "eos_token_id"
BOOKKEEPING = {"transformers_version", "_from_model_config"}


def drawn(model: Any, tokenizer: Any) -> list[list[int]]:
    torch.manual_seed(0)
    return generate(model, tokenizer, PROMPTS[:4], max_new_tokens=12).response_ids.tolist()


@pytest.fixture
def model(base_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


def test_the_table_names_every_key_of_the_class() -> None:
    assert set(vars(GenerationConfig())) - {ENDS, *BOOKKEEPING} == set(ACTING)


@pytest.mark.parametrize("adapter", [False, True])
def test_no_key_that_the_checkpoint_declares_acts(model: Any, tokenizer: Any, adapter: bool) -> None:
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).eval()
    inner = model.base_model.model if adapter else model
    expected = drawn(model, tokenizer)
    declared = copy.deepcopy(inner.generation_config)
    for key, value in ACTING.items():
        inner.generation_config = copy.deepcopy(declared)
        setattr(
            inner.generation_config,
            key,
            GenerationConfig(**{key: value}).watermarking_config if "water" in key else value,
        )
        assert drawn(model, tokenizer) == expected, key
        assert getattr(inner.generation_config, key) is not None or value is None, "put back"


def test_they_would_act_without_the_blank_configuration(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drawn(model, tokenizer)
    monkeypatch.setattr("rlhf.models.generate.without_declared_settings", lambda _: nullcontext())
    declared = copy.deepcopy(model.generation_config)
    silent = []
    for key in SEEN_TO_ACT:
        model.generation_config = copy.deepcopy(declared)
        value = ACTING[key]
        setattr(
            model.generation_config,
            key,
            GenerationConfig(**{key: value}).watermarking_config if "water" in key else value,
        )
        try:
            if drawn(model, tokenizer) == expected:
                silent.append(key)
        except Exception:  # an error is an effect too
            continue
    assert not silent


def test_the_file_of_a_checkpoint(base_folder: Path, tokenizer: Any, tmp_path: Path, model: Any) -> None:
    folder = tmp_path / "declares"
    shutil.copytree(base_folder, folder)
    file = folder / "generation_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    values |= {"suppress_tokens": list(range(20, 200)), "min_p": 0.3, "repetition_penalty": 3.0, "num_beams": 4}
    file.write_text(json.dumps(values), encoding="utf-8")
    narrow = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert narrow.generation_config.min_p == 0.3
    assert drawn(narrow, tokenizer) == drawn(model, tokenizer)
    assert narrow.generation_config.min_p == 0.3, "saved as it came"


def test_end_tokens_are_taken_over(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = [30, 31]
    assert end_token_ids(model, tokenizer) == sorted({30, 31, tokenizer.eos_token_id})
    settings = sampling_settings(temperature=0.7, pad_token_id=0, end_ids=[1, 2])
    assert (settings.eos_token_id, settings.temperature, settings.top_k, settings.top_p) == ([1, 2], 0.7, 0, 1.0)


def test_the_configuration_comes_back_after_an_error(model: Any) -> None:
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    before = model.generation_config
    with pytest.raises(RuntimeError, match="stop"), without_declared_settings(wrapped):
        assert model.generation_config is not before
        raise RuntimeError("stop")
    assert model.generation_config is before
    assert wrapped.generation_config is before


def test_mask_after_end_with_several_end_ids() -> None:
    ids = torch.tensor([[5, 2, 7, 1], [9, 9, 9, 9], [1, 2, 1, 2]])
    mask, ended = mask_after_end(ids, [1, 2])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert ended.tolist() == [True, False, True]


def test_generation_samples_the_whole_distribution_whatever_the_model_declares(
    base_folder: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.1
    torch.manual_seed(0)
    completions = generate(model, tokenizer, [PROMPTS[0]] * 400, max_new_tokens=1, temperature=1.0)
    with torch.no_grad():
        logits = model(input_ids=completions.prompt_ids[:1], attention_mask=completions.prompt_mask[:1]).logits[0, -1]
    entropy = torch.distributions.Categorical(logits=logits).entropy().item()
    distinct = len(set(completions.response_ids[:, 0].tolist()))
    assert distinct > 20, f"{distinct} tokens at an entropy of {entropy:.1f} nats"


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_rows_that_have_ended_leave_and_the_others_go_on_as_before(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, window: int | None, stays: bool
) -> None:
    """At temperature 1e-4 sampling is greedy, so stretches must give what transformers gives in one go."""
    config = AutoConfig.from_pretrained(base_folder)
    if window is not None:
        values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        config = MistralConfig(**values, sliding_window=window)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # a bias that makes answers end after different numbers of tokens
        model.lm_head.weight[tokenizer.eos_token_id] *= 2.5
    monkeypatch.setattr("rlhf.models.generate.STRETCH", 3)
    if stays:
        monkeypatch.setattr("rlhf.models.generate.DynamicLayer", None)
        monkeypatch.setattr("rlhf.models.generate.DynamicSlidingWindowLayer", None)
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, named: sizes.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    prompts = [[{"role": "user", "content": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 7])}] for i in range(24)]
    found = generate(model, tokenizer, prompts, max_new_tokens=20, temperature=1e-4)
    assert (found.prompt_mask == 0).any(), "some are padded"
    lengths = found.response_mask.sum(dim=1)
    assert len(set(lengths.tolist())) > 4, f"answers of lengths {lengths.tolist()} test nothing"
    assert (sizes[-1] == 24) if stays else (sizes[-1] < 24)
    expected = model.generate(
        input_ids=found.prompt_ids, attention_mask=found.prompt_mask, do_sample=False, max_new_tokens=20,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )[:, found.prompt_ids.shape[1] :]  # fmt: skip
    for ours, theirs, length in zip(found.response_ids, expected, lengths.tolist(), strict=True):
        assert ours[:length].tolist() == theirs[:length].tolist()
        assert length == 20 or theirs[length - 1] == tokenizer.eos_token_id

    # In parts: no more rows at once, and the same answers in the same order.
    sizes.clear()
    parts = generate(model, tokenizer, prompts, max_new_tokens=20, temperature=1e-4, batch_size=7)
    assert max(sizes) == 7
    assert parts.response_mask.equal(found.response_mask)
    assert (parts.response_ids * parts.response_mask).equal(found.response_ids * found.response_mask)
    assert (parts.texts, parts.ended.tolist()) == (found.texts, found.ended.tolist())


def test_answers_come_back_in_the_order_of_their_prompts_from_batches_of_like_length(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    prompts = [[{"role": "user", "content": " ".join(WORDS[: 1 + (7 * i) % 12])}] for i in range(10)]
    batches: list[list[int]] = []

    def echo(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> Completions:
        batches.append([len(row) for row in encode_prompts(tokenizer, prompts, max_prompt_length=None)])
        none, words = torch.zeros(len(prompts), 0), [plain(prompt) for prompt in prompts]
        return Completions(none, none, none, none, torch.tensor([len(x.split()) % 2 == 0 for x in words]), words)

    monkeypatch.setattr("rlhf.models.generate.generate", echo)
    texts, ended = sample_texts(model, tokenizer, prompts, batch_size=3, max_new_tokens=5)
    assert texts == [plain(prompt) for prompt in prompts]
    assert ended == [len(text.split()) % 2 == 0 for text in texts]
    lengths = [n for batch in batches for n in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert len(set(lengths)) > 5


def test_rows_that_can_not_leave_are_sampled_no_further_than_the_longest_answer(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear state keeps all rows; those that have ended in an earlier stretch have no end token in the latest."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_folder)).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2.5
    for name, value in (("STRETCH", 3), ("DynamicLayer", None), ("DynamicSlidingWindowLayer", None)):
        monkeypatch.setattr(f"rlhf.models.generate.{name}", value)
    forwards: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    prompts = [[{"role": "user", "content": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 7])}] for i in range(8)]
    found = generate(model, tokenizer, prompts, max_new_tokens=100, temperature=0.5)
    assert found.ended.all()
    longest = int(found.response_mask.sum(dim=1).max())
    assert longest < 60
    assert len(forwards) <= longest + 3
