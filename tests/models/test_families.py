"""Properties of real model families that went wrong without a word, each on a tiny model of its architecture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf.errors import UserError
from rlhf.models.generate import encode_prompts, generate
from rlhf.models.load import model_settings
from rlhf.models.merge import merge_adapter, merged_weights
from rlhf.models.prompt_length import context_length
from rlhf.models.score import position_limit, score_rows
from rlhf.models.text import encode_answers, freeze_template
from rlhf.pipeline.backbone import check_backbone
from rlhf.recipe import load_recipe
from rlhf.reward.load import save_reward_model
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.3, "max_position_embeddings": 128,
}  # fmt: skip
TEXTS = [[5, 6, 7], [8, 9], [5, 6, 7, 8, 9, 10]]


def saved(config: Any, tokenizer: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(tmp_path: Path, tokenizer: Any, dtype: torch.dtype = torch.float32, size: float = 0.1, **lora: Any) -> Any:
    """A tiny Qwen2 with an adapter that changes something."""
    base = saved(Qwen2Config(**SMALL, vocab_size=len(tokenizer)), tokenizer, tmp_path / "base")
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **lora}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(**settings))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += size * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("peft", [False, True])
def test_a_configuration_that_wraps_that_of_the_text_can_be_scored_and_saved(
    tokenizer: Any, tmp_path: Path, peft: bool
) -> None:
    """Gemma 3 from 4B on: the outer one has no padding id, and the first to ask for it came after the training."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    text = {**SMALL, **ids, "head_dim": 8, "sliding_window": 6}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    base = saved(config, tokenizer, tmp_path / "base")
    settings = model_settings({"use_peft": True, "lora_target_modules": ["q_proj"]} if peft else {})
    model = build_reward_model(base, settings, pad_token_id=tokenizer.pad_token_id)
    model.eval()
    together = score_rows(model, TEXTS, pad_token_id=tokenizer.pad_token_id)
    alone = torch.cat([score_rows(model, [row], pad_token_id=tokenizer.pad_token_id) for row in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    samples = [(prompt, f"yes {word}") for prompt, word in zip(PROMPTS, WORDS, strict=False)]
    save_reward_model(tmp_path / "rm", model, tokenizer, samples=samples)


def test_a_padding_token_without_an_embedding_is_never_read(base_folder: Path, tokenizer: Any) -> None:
    """Added to the tokenizer alone, it was an IndexError as soon as two texts of other lengths met."""
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    torch.manual_seed(0)
    usual = generate(model, tokenizer, PROMPTS[:3], max_new_tokens=6)
    reward = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    scores = score_rows(reward, TEXTS, pad_token_id=tokenizer.pad_token_id)
    torch.testing.assert_close(score_rows(reward, TEXTS, pad_token_id=10**6), scores, atol=1e-6, rtol=1e-6)
    tokenizer = type(tokenizer).from_pretrained(base_folder)
    tokenizer.add_special_tokens({"pad_token": "<|added|>"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    torch.manual_seed(0)
    assert generate(model, tokenizer, PROMPTS[:3], max_new_tokens=6).texts == usual.texts


def test_roberta_has_two_positions_less_than_it_says(tokenizer: Any) -> None:
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**settings, vocab_size=100, max_position_embeddings=66, pad_token_id=1, num_labels=1)
    model = RobertaForSequenceClassification(config).eval()
    limit = position_limit(model, tokenizer)
    assert limit == 64
    score_rows(model, [[5] * limit], pad_token_id=1)
    with pytest.raises((IndexError, RuntimeError)):
        score_rows(model, [[5] * (limit + 1)], pad_token_id=1)


def test_each_of_several_templates_is_frozen(base_folder: Path, tokenizer: Any) -> None:
    several = type(tokenizer).from_pretrained(base_folder)
    dated = "{{ strftime_now('%Y') }}" + several.chat_template
    several.chat_template = {"default": several.chat_template, "tool_use": dated}
    with pytest.warns(UserWarning, match="inserts today's date"):
        assert freeze_template(several, name="x")
    assert several.chat_template["tool_use"].startswith("{{ '2024' }}")
    assert not freeze_template(several, name="x")


def test_a_begin_token_that_is_there_is_not_written_twice(base_folder: Path, tokenizer: Any) -> None:
    """Prompts that a template rendered begin with it, and a tokenizer that writes one wrote a second."""
    from tokenizers.processors import TemplateProcessing

    begins = type(tokenizer).from_pretrained(base_folder)
    begins.add_special_tokens({"bos_token": "<|begin|>"})
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begins.bos_token_id)]
    )
    (plain, rendered) = encode_prompts(begins, ["red", "<|begin|>red"], max_prompt_length=None)
    assert plain == rendered
    assert plain.count(begins.bos_token_id) == 1
    rows, _ = encode_answers(begins, ["red", "<|begin|>red"], ["blue", "blue"])
    assert rows[0] == rows[1]


def test_yarn_reads_as_far_as_its_factor_says() -> None:
    """Qwen2.5's card tells people to write it like this; prompts were cut at the fourth part, for a reason that was untrue."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert context_length(LlamaConfig(max_position_embeddings=64, rope_parameters=rope)) == 256
    assert context_length(LlamaConfig(max_position_embeddings=512, rope_parameters=rope)) == 512
    assert context_length(LlamaConfig(max_position_embeddings=64)) == 64


def test_positions_that_depend_on_the_batch_are_said(
    tokenizer: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Phi's longrope: beyond its first length a score moved by 1.5 nats with its neighbours."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    base = saved(
        Phi3Config(
            **{**SMALL, **ids, "max_position_embeddings": 256},
            original_max_position_embeddings=64,
            rope_parameters=rope,
        ),
        tokenizer,
        tmp_path,
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "r.yaml").write_text(
        f"name: x\nbackbone: {{model: {base}}}\ndata: {{preferences: {tmp_path / 'p.jsonl'}, sft: {tmp_path / 'p.jsonl'}}}\n"
        "sft: {max_length: 64}\nreward: {max_length: 64}\nppo: {max_prompt_length: 40, max_completion_length: 24}\n"
    )
    check_backbone(load_recipe(tmp_path / "r.yaml"))
    assert not [warning for warning in recwarn if "longrope" in str(warning.message)]
    with pytest.warns(
        UserWarning, match=r"positions \(longrope\) by the longest text of a forward, so beyond 64 tokens"
    ):
        check_backbone(load_recipe(tmp_path / "r.yaml", ["reward.max_length=65"]))


def test_an_adapter_with_biases_of_its_base_starts_no_reward_model(tokenizer: Any, tmp_path: Path) -> None:
    """They were left out without a word: states 0.85 off those of the policy."""
    adapted(tmp_path, tokenizer, bias="lora_only").save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    for peft in (True, False):
        with pytest.raises(UserError, match="this adapter trained biases of its base"):
            build_reward_model(
                tmp_path / "adapter", model_settings({"use_peft": peft}), pad_token_id=tokenizer.pad_token_id
            )


def test_single_tokens_that_an_adapter_trains_go_to_no_other_engine(tokenizer: Any, tmp_path: Path) -> None:
    """vLLM was given a model without its embeddings."""
    model = adapted(tmp_path, tokenizer, trainable_token_indices={"embed_tokens": [3, 4]})
    with pytest.raises(UserError, match="trains single tokens"):
        next(merged_weights(model))


@pytest.mark.filterwarnings("error:merging")
def test_a_merge_that_rounds_the_adapter_away_is_said(tokenizer: Any, tmp_path: Path) -> None:
    """In 16 bits a small adapter is less than the weights' own rounding; the bound of the largest output can't see it."""
    small: dict[str, Any] = {"size": 0.01, "target_modules": ["q_proj"]}
    with pytest.warns(UserWarning, match=r"rounds much of it away: the error is \d+% of what the adapter changes"):
        merge_adapter(adapted(tmp_path / "a", tokenizer, torch.bfloat16, **small))
    merge_adapter(adapted(tmp_path / "b", tokenizer, torch.float32, **small))
