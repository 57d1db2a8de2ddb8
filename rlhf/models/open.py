"""The one place that opens a model: no remote code, safetensors or GGUF, every tensor accounted for, one sentence a fault."""

import copy
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from rlhf.errors import TrainingError, UserError, Waiting
from rlhf.models.gguf import SUFFIX, gguf_file, unreadable

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMED = 4  # tensors that a sentence names before it says how many more there are
# What configurations call their layers, and how many there are in no model: building them would take for ever.
LAYERS, MOST_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1000


@contextmanager
def one_sentence(name: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong while a model is opened into one sentence about it; too little memory stays what it is.

    Raises:
        UserError: naming the folder or hub id.
    """
    try:
        yield
    except (UserError, TrainingError, Waiting, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # from transformers, PEFT, safetensors, the hub's client, json: each has its own
        raise UserError(f"{name}: {_reason(name, error)}") from error


def _reason(name: str | Path, error: Exception) -> str:
    """Return why a model could not be opened, in one line."""
    message = str(error).strip()
    if (closed := _closed_file(Path(expand(name)))) is not None:
        return f"{closed.name} can't be read by this user ({closed.stat().st_uid} owns it); let its owner run chmod a+r on it."
    if "trust_remote_code" in message or "custom code" in message:
        return (
            "this model wants to run code of its own (`auto_map` in its files), and remote code is never run; use one whose "
            "architecture transformers has."
        )
    if unknown := re.search(r"model type `(.+?)` but Transformers does not recognize", message):
        return (
            f"transformers {transformers.__version__} does not know the architecture {unknown[1]!r}; install one that does "
            "(pip install -U transformers), or take another model."
        )
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"a JSON file of this model can't be read ({message}); copy the model again."
    if str(name).lower().endswith(SUFFIX) or (Path(name).is_dir() and gguf_file(name) is not None):
        return unreadable(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
    if "ignore_mismatched_sizes" in message:
        return "its weights have other shapes than its config.json says; one of the two belongs to another model."
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")) and any(Path(name).glob("*.bin")):
        return "its weights are no safetensors; those in other formats can run code and are not read. Save it again."
    if type(error).__name__ == "SafetensorError":
        return f"its safetensors file is cut off or damaged ({first}); copy the model again."
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
        inside = [other.name for other in sorted(folder.iterdir()) if (other / "tokenizer_config.json").is_file()]
        if len(inside) > 1:  # an ensemble's stage
            return (
                f"no model but a folder of {len(inside)}, {', '.join(inside)}: name one of them, or give this folder to "
                "`rlhf serve`, which answers with the mean of an ensemble."
            )
        named = f"; one lies in {folder / inside[0]}" if inside else ""
        return f"no model there (neither config.json nor adapter_config.json){named}."
    if str(name).startswith(("/", ".", "~")) and not Path(expand(name)).exists():
        return "no model there (no such folder)."
    return f"can't be opened as a model ({type(error).__name__}: {first})"


def _closed_file(folder: Path) -> Path | None:
    """Return a file of a folder that is there and that this user may not read; None where there is none."""
    files = sorted(folder.glob("*")) if folder.is_dir() and os.access(folder, os.X_OK) else []
    return next((file for file in files if file.is_file() and not os.access(file, os.R_OK)), None)


def expand(path: str | Path) -> str:
    """Return a folder or hub id with `~` spelt out."""
    return str(Path(path).expanduser()) if str(path).startswith("~") else str(path)


def _place(name: str | Path) -> tuple[str, dict[str, str]]:
    """Return what `from_pretrained` takes as the place of a model, and how it is told of a GGUF file there."""
    file = gguf_file(name)
    return (expand(name), {}) if file is None else (str(file.parent), {"gguf_file": file.name})


def open_config(name: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Read a model's configuration.

    Raises:
        UserError: it can't be read, or wants code of its own.
    """
    with one_sentence(name):
        place, arguments = _place(name)
        if "gguf_file" in arguments:
            file = Path(place) / arguments["gguf_file"]
            seen = file.stat()
            return copy.deepcopy(_config_of_gguf(file, seen.st_size, seen.st_mtime_ns))
        _check_layers(name, Path(place) / "config.json")
        return AutoConfig.from_pretrained(place, revision=revision or "main", trust_remote_code=False)


@lru_cache(maxsize=4)
def _config_of_gguf(file: Path, size: int, changed: int) -> PreTrainedConfig:
    """Read the configuration in a GGUF file once while the file stays as it is: transformers reads all its words for that."""
    return AutoConfig.from_pretrained(file.parent, trust_remote_code=False, gguf_file=file.name)


def _check_layers(name: str | Path, file: Path) -> None:
    """Refuse a local configuration that claims more layers than any model has, before anything is made of it."""
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    sections = [values, *values.values()] if isinstance(values, dict) else []
    for section in sections:
        for key in LAYERS:
            layers = section.get(key) if isinstance(section, dict) else None
            if isinstance(layers, int) and layers > MOST_LAYERS:
                raise UserError(f"{name}: its config.json says {key}: {layers}, and no model has so many; correct it.")


def open_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Read a tokenizer, padding on the right, as it was saved.

    A Mistral checkpoint's is read as transformers reads it, also where vLLM has brought the package mistral-common along, whose
    tokenizer has no chat template.

    Raises:
        UserError: it can't be read, wants code of its own, or has no number as its length.
    """
    with one_sentence(name):
        place, arguments = _place(name)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place,
            trust_remote_code=False,
            padding_side="right",
            revision=revision or "main",
            mistral_format=False,
            **arguments,
        )
        # Half a character is read, but can't be written again, which would be found out after training.
        json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str).encode()
    if not (isinstance(tokenizer.model_max_length, int | float) and tokenizer.model_max_length >= 1):
        raise UserError(
            f"{name}: model_max_length in its tokenizer_config.json is {tokenizer.model_max_length!r:.40}, no number of tokens."
        )
    if getattr(getattr(tokenizer, "backend_tokenizer", None), "fix_mistral_regex", None) is False:
        warnings.warn(
            f"{name}: transformers says that this tokenizer may split words by a pattern that Mistral has corrected since, so that "
            "texts are read as other tokens than in pretraining. If the checkpoint's publisher says so too, load its tokenizer "
            "once with fix_mistral_regex=True, save it into a copy of the folder, and name that.",
            stacklevel=2,
        )
    return tokenizer


def open_network(
    kind: Any, name: str | Path, arguments: Mapping[str, object], *, new_head: bool = False
) -> tuple[PreTrainedModel, set[str]]:
    """Read a network's weights from safetensors or a GGUF file, and account for every tensor.

    Args:
        kind: the Auto class of the network.
        arguments: what `from_pretrained` takes beside the name.
        new_head: whether a head on top may start random; transformers' warning about it is silenced then.

    Returns:
        the network, and the parameters that start random.

    Raises:
        UserError: it can't be read; tensors are missing that are no part of a new head, have another shape, or hold values
            that are no numbers.
    """
    before = logging.get_verbosity()
    with one_sentence(name):
        logging.set_verbosity_error()
        try:
            place, of_place = _place(name)
            _check_layers(name, Path(place) / "config.json")
            formats: dict[str, object] = {**of_place} or {"use_safetensors": True}
            model, report = kind.from_pretrained(
                place, **{**arguments, **formats, "trust_remote_code": False, "output_loading_info": True}
            )
        finally:
            logging.set_verbosity(before)
    missing, unused = set(report["missing_keys"]), set(report["unexpected_keys"])
    prefix = f"{model.base_model_prefix}."
    random = {key for key in missing if not (new_head and (not key.startswith(prefix) or ".pooler." in key))}
    if random:
        raise UserError(
            f"{name}: the checkpoint has no {_names(random)}, so these weights would be random; it is not whole, or not a "
            f"model of this kind ({type(model).__name__})."
        )
    if new_head:  # an old head is left behind on purpose; of one that is used, what it has beside its weight is not
        has_head = not any("score" in key or "classifier" in key for key in missing)
        unused = {key for key in unused if key.startswith(prefix) or (has_head and not key.startswith("lm_head"))}
    if unused:
        warnings.warn(f"{name}: {type(model).__name__} has no place for {_names(unused)}; not used.", stacklevel=3)
    check_finite(name, {key: value for key, value in model.named_parameters() if key not in missing})
    return model, missing


def check_finite(name: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights with values that are no numbers; quantised ones and those without data are not looked at.

    A sum that is finite proves it, at a third of the cost of looking at every value.
    """
    bad = {
        key
        for key, values in weights.items()
        if values.is_floating_point() and not values.is_meta
        if not values.detach().sum(dtype=torch.float32).isfinite() and not values.isfinite().all()
    }
    if bad:
        raise UserError(
            f"{name}: {len(bad)} tensors hold values that are not finite numbers, the first is {min(bad)}; train or copy the "
            "model again."
        )


def _names(keys: set[str]) -> str:
    """Return the first of some tensors' names, and how many more there are."""
    listed = sorted(keys)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def adapter_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read an adapter's weights from its safetensors file, on the CPU.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = Path(expand(folder))
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder}: no {ADAPTER_WEIGHTS}; weights in other formats can run code and are not read.")
    with one_sentence(folder):
        weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    check_finite(folder, weights)
    return weights


def put_adapter(model: PreTrainedModel, folder: str, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base, which may lie elsewhere than when it was saved, and account for every tensor.

    Raises:
        UserError: it can't be read; tensors of the adapter are missing or fit nowhere.
    """
    saved = set(adapter_weights(folder))
    with one_sentence(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # named below
        warnings.filterwarnings("ignore", message="for .* copying from a non-meta")  # a base without data
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        adapted.peft_config["default"].base_model_name_or_path = model.name_or_path
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    missing = {key for key in expected - saved if key.rpartition(".")[0]}
    if missing:
        raise UserError(f"{folder}: the adapter has no {_names(missing)}, so it is not whole; copy or train it again.")
    unused = {key for key in saved - expected if "lora_" in key}
    if unused:
        raise UserError(
            f"{folder}: the base model has no place for {_names(unused)}; the adapter belongs to another architecture."
        )
    return adapted
