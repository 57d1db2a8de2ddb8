"""Nothing lost: are the tensors that one stage saved found again in the model that the next one loaded from them?"""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from rlhf.invariants.checks import Check
from rlhf.models.adapters import ADAPTER, INSIDE, saved_name
from rlhf.models.load import computed_dtype

SHOWN = 3


def nothing_lost(folder: Path, model: nn.Module) -> Check:
    """Compare a saved model, whole or an adapter, with a model that was loaded or built from it.

    Names are mapped through PEFT's prefixes, and a value must be equal bit by bit once it has the loaded tensor's type, so
    the bound is 0. Around 4-bit weights, norms and embeddings may be rounded to the type that these are read as. Tensors are
    read one at a time: no more memory than the largest of them.

    Not compared, since nobody could tell: what the loaded model has no use for by its task (an output layer in a reward
    model), LoRA factors that were merged into the weights, 4-bit weights, parameters that are sharded already, and the
    missing names of a whole model whose tensors a library renames on loading.

    Args:
        folder: holds `model*.safetensors` or `adapter_model.safetensors`, as a stage of this package wrote it.
        model: on any device, before it is trained.
    """
    adapter = folder / "adapter_model.safetensors"
    files = [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))
    loaded = _loaded_tensors(model)
    rounded = computed_dtype(model) if getattr(model, "is_loaded_in_4bit", False) else None
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    backbone = f"{inner.base_model_prefix}."
    saved_names: set[str] = set()
    missing: list[str] = []
    changed: list[str] = []
    for written, tensor in _saved_tensors(files):
        if ".base_layer." in written and not isinstance(model, PeftModel):
            continue  # PEFT's copy of the untrained embeddings, into which factors were merged
        name = written.replace(".base_layer.", ".")
        saved_names.add(name)
        place = loaded.get(name)
        if place is None:
            is_merged = "lora_" in name and not isinstance(model, PeftModel)
            if name.startswith(backbone) and not is_merged:
                missing.append(name)
        elif place.is_floating_point() and not hasattr(place, "ds_id"):
            types = (place.dtype, rounded) if rounded is not None and "lora_" not in name else (place.dtype,)
            if not any(_equal(tensor.to(kind), place) for kind in types):
                changed.append(name)
    renamed = not adapter.is_file() and any(name.startswith(backbone) for name in loaded.keys() - saved_names)
    lost = changed + ([] if renamed else missing) + ([] if files else ["any weight, as no *.safetensors is there"])
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    return Check(
        name="nothing lost",
        statistic=float(len(lost)),
        bound=0.0,
        unit="tensors",
        sentence=f"Of what lies in {folder}, the model that was loaded from it has not the same {', '.join(lost[:SHOWN])}{more}. "
        "It would go on from something else than what was trained. Likely causes: an adapter key of one stage that the next does "
        "not take over (lora_modules_to_save, lora_target_modules), weights that are tied in one model and not in the other, or "
        "another version of peft or transformers than the one that saved it.",
    )


def _saved_tensors(files: Iterable[Path]) -> Iterable[tuple[str, Tensor]]:
    """Yield each tensor of some files by its name, without PEFT's prefix."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name.removeprefix(INSIDE), tensors.get_tensor(name)


def _loaded_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors by their names in an ordinary model: of adapters the trained one, of whole modules the copy."""
    saved = model.state_dict(
        keep_vars=True
    ).keys()  # a buffer that no file holds, such as Llama's rotary one, is nobody's loss
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **buffers}
    if not isinstance(model, PeftModel):
        return tensors
    others = [name for name in model.peft_config if name != ADAPTER]
    marks = (".original_module.", *(f".{name}." for name in others))
    return {
        saved_name(name).removeprefix(INSIDE).replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if not any(mark in f"{name}." for mark in marks)
    }


def _equal(saved: Tensor, loaded: Tensor) -> bool:
    if saved.shape != loaded.shape:
        return False
    return torch.equal(saved.to(loaded.dtype), loaded.detach().cpu())
