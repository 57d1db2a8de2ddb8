"""Small models from nothing: a BPE tokenizer trained on the data, and a randomly initialised causal model."""

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, set_seed

from rlhf.errors import UserError

PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
ARCHITECTURES = ("llama", "qwen3")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on texts, with distinct padding and end tokens and a chat template whose last token is the end.

    Bytes that never occur in the texts are in the vocabulary too, so any text can be encoded and decoded again.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=resources.files("rlhf.models").joinpath("chat_template.jinja").read_text(encoding="utf-8"),
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def build_base(
    folder: Path, texts: Iterable[str], *, architecture: str, settings: Mapping[str, object], seed: int
) -> None:
    """Write a base checkpoint (random weights, tokenizer, chat template) in the ordinary Hugging Face layout.

    Args:
        folder: where to write.
        texts, architecture, settings: as in `design_base`.
        seed: of the weights.

    Raises:
        UserError: an unknown architecture or setting.
    """
    tokenizer, config = design_base(texts, architecture=architecture, settings=settings)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def design_base(
    texts: Iterable[str], *, architecture: str, settings: Mapping[str, object]
) -> tuple[PreTrainedTokenizerFast, PretrainedConfig]:
    """Train the tokenizer and build the configuration of a model from nothing.

    Args:
        texts: what the tokenizer is trained on.
        architecture: "llama" or "qwen3".
        settings: the Hugging Face configuration's own names (`hidden_size`, …) and `vocab_size`.

    Raises:
        UserError: an unknown architecture or setting.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"backbone.from_scratch.architecture is {architecture!r}; choose one of {', '.join(ARCHITECTURES)}."
        )
    values: dict[str, Any] = dict(settings)
    vocab_size = values.pop("vocab_size", 4096)
    config_class = CONFIG_MAPPING[architecture]
    known = set(config_class().to_dict())
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(
            [
                f"backbone.from_scratch.{name}: {config_class.__name__} has no such setting; remove it."
                for name in unknown
            ]
        )
    values.setdefault("max_position_embeddings", 1024)
    values.setdefault("tie_word_embeddings", True)
    if "num_attention_heads" in values:
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        if "hidden_size" in values:
            values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, model_max_length=values["max_position_embeddings"])
    config = config_class(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **values,
    )
    return tokenizer, config
