"""Dropout is off in whatever form a model has it, and the configuration that is saved keeps it."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BltConfig, FalconConfig, GPTNeoConfig, PersimmonConfig, PreTrainedConfig

from rlhf.models.dropout import switch_off_dropout

IDS = {"vocab_size": 60, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BYTES = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16, "dropout": 0.1}
READ_AT_EVERY_FORWARD: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "falcon": (FalconConfig, {**SIZE, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "falcon, one after the other": (
        FalconConfig,
        {**SIZE, "hidden_dropout": 0.1, "attention_dropout": 0.1, "parallel_attn": False, "bias": True},
    ),
    "persimmon": (PersimmonConfig, {**SIZE, "intermediate_size": 64, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "gpt_neo": (
        GPTNeoConfig,
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global"], 2]],
            "attention_dropout": 0.1,
            "embed_dropout": 0.1,
            "resid_dropout": 0.1,
        },
    ),
    "blt": (
        BltConfig,
        {
            "vocab_size": 260,
            "hidden_size": 32,
            "patch_in_forward": False,
            "encoder_hash_byte_group_vocab": 50,
            "encoder_hash_byte_group_size": [3],
            "encoder_config": {**BYTES, "vocab_size": 260, "hidden_size_global": 32, "cross_attn_k": 2},
            "decoder_config": {**BYTES, "vocab_size": 260, "hidden_size_global": 32, "cross_attn_k": 2},
            "global_config": {**BYTES, "hidden_size": 32},
        },
    ),
}


def build(kind: str) -> Any:
    make_config, settings = READ_AT_EVERY_FORWARD[kind]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(**{**IDS, **settings}))


@torch.no_grad()
def difference(model: Any) -> float:
    """Between two forwards in training and one in evaluation."""
    ids = torch.arange(5, 45).view(2, 20)
    logits = [model.train(training)(input_ids=ids, use_cache=False).logits for training in (True, True, False)]
    return max((logits[i] - logits[2]).abs().max().item() for i in (0, 1))


@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize("kind", READ_AT_EVERY_FORWARD)
def test_models_that_read_their_configuration_at_every_forward(kind: str, has_adapter: bool) -> None:
    model = build(kind)
    saved = model.config.to_dict()
    whole = model
    if has_adapter:
        model = get_peft_model(
            model, LoraConfig(target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False)
        )
    assert difference(model) > 1e-3, "dropout is on"
    assert switch_off_dropout(model) > 0
    assert difference(model) < 1e-5
    assert difference(copy.deepcopy(model)) < 1e-5
    assert switch_off_dropout(model) == 0
    assert whole.config.to_dict() == saved
    assert type(whole.config) is READ_AT_EVERY_FORWARD[kind][0]
    # What is written into the configuration later reaches the layers.
    whole.config.use_cache, whole.config.pad_token_id = False, 7
    inner = next(
        m
        for m in whole.modules()
        if m is not whole and type(getattr(m, "config", None)).__name__ == type(whole.config).__name__
    )
    assert (inner.config.use_cache, inner.config.pad_token_id) == (False, 7)
    assert isinstance(inner.config, type(whole.config))
