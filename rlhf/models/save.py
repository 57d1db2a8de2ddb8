"""Models are written so that they are the same wherever they are read, and weights are read back."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.files import share_weights
from rlhf.models.open import one_sentence

ADAPTER_BASE = "adapter_base.json"
# Of a configuration, what does not change a model's outputs.
BOOKKEEPING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write an ordinary Hugging Face folder; of a policy with a reference adapter, write the policy's adapter only.

    Beside an adapter stands the fingerprint of its base, which every loader of this package compares: an adapter fits
    any base of the same shape, and no other program would notice a wrong one.

    Args:
        weights: by their names in the model, where the model itself holds only shards of them.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=weights)
    else:
        config: Any = model.peft_config["default"]
        if Path(config.base_model_name_or_path).is_dir():  # so that it is found from any working directory
            config.base_model_name_or_path = str(Path(config.base_model_name_or_path).absolute())
        model.save_pretrained(
            folder, selected_adapters=["default"], **({} if weights is None else {"state_dict": weights})
        )
        base = config.base_model_name_or_path
        facts = {"base": base, "sha256": base_fingerprint(base, config.revision)}
        (folder / ADAPTER_BASE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    share_weights(folder)


def base_fingerprint(base: str, revision: str | None = None) -> str:
    """Return the sha256 of a checkpoint's configuration and of a sample of every tensor in its safetensors files.

    They are read from the files, so that the fingerprint does not depend on the precision in which the model is loaded.
    The sample is each tensor's name, dtype, shape, first and last row: it takes seconds for a large model, and any
    training changes some of it.

    Args:
        base: a folder, or the id of a hub model that was loaded before (nothing is downloaded).
    """
    folder = Path(base)
    if not folder.is_dir():
        folder = Path(snapshot_download(base, revision=revision, local_files_only=True))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                part = tensors.get_slice(name)
                shape = part.get_shape()
                digest.update(f"{name} {part.get_dtype()} {shape}".encode())
                if shape and shape[0]:
                    for row in (part[:1], part[shape[0] - 1 :]):
                        digest.update(row.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_base(adapter: str, base: str, revision: str | None = None) -> None:
    """Refuse an adapter whose base is not the one that it was trained on.

    Adapters that were not saved by this package carry no fingerprint and are not refused.

    Raises:
        UserError: the fingerprints differ.
    """
    file = Path(adapter) / ADAPTER_BASE
    if not file.is_file():
        return
    with one_sentence(adapter):
        trained_on = str(json.loads(file.read_text(encoding="utf-8"))["sha256"])
        fingerprint = base_fingerprint(base, revision)
    if fingerprint != trained_on:
        raise UserError(
            f"{adapter}: this adapter was trained on another base than {base} now is (fingerprint {trained_on[:12]}, "
            f"found {fingerprint[:12]}); it would load, and answer with wrong numbers. Put the old base back or train it again."
        )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Replace a model's weights by those of a checkpoint folder that the same model wrote.

    Raises:
        RuntimeError: a weight is missing or has another shape.
    """
    if isinstance(model, PeftModel):
        outcome = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        if outcome.unexpected_keys:
            raise RuntimeError(f"{folder}: unexpected adapter weights {outcome.unexpected_keys[:3]}")
        return
    weights: dict[str, Tensor] = {}
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise RuntimeError(f"{folder}: no model*.safetensors")
    for file in files:
        weights.update(load_file(file))
    if isinstance(model, PreTrainedModel) and not weights.keys() <= model.state_dict().keys():
        # A mixture of experts is saved expert by expert, and held with all of them in one tensor: transformers knows how.
        loaded, report = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
        if any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise RuntimeError(f"{folder}: weights do not fit: {dict(report)}")
        weights = loaded.state_dict()
    outcome = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name in outcome.missing_keys if name not in tied]
    if outcome.unexpected_keys or missing:
        raise RuntimeError(
            f"{folder}: weights do not fit: missing {missing[:3]}, unexpected {outcome.unexpected_keys[:3]}"
        )
