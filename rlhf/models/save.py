"""Reading weights back into a model that is already built."""

from pathlib import Path

from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn


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
    weights = {}
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise RuntimeError(f"{folder}: no model*.safetensors")
    for file in files:
        weights.update(load_file(file))
    outcome = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name in outcome.missing_keys if name not in tied]
    if outcome.unexpected_keys or missing:
        raise RuntimeError(
            f"{folder}: weights do not fit: missing {missing[:3]}, unexpected {outcome.unexpected_keys[:3]}"
        )
