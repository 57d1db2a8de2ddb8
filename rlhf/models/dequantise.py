"""A GGUF file as an ordinary checkpoint: weights in float32, tokenizer and chat template beside them."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from rlhf.models.load import load_tokenizer
from rlhf.models.open import open_network


def dequantise(file: Path, folder: Path) -> int:
    """Write a GGUF file's model as a checkpoint that any library reads, and return how many weights it has.

    The weights are those that the quantised blocks stand for, exactly: float32, the type in which they are computed. A
    model that was read from GGUF refuses to be saved, so its weights go into one that is built from its configuration.

    Raises:
        UserError: the file can't be read, or its tokenizer has no end token or no spare one for padding.
    """
    tokenizer = load_tokenizer(file, conversational=True)
    quantised, _ = open_network(AutoModelForCausalLM, file, {"dtype": "float32"})
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    settings["pad_token_id"] = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(type(quantised.config)(**settings), dtype=quantised.dtype)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())
