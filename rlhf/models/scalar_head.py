"""The linear head of a decoder reward model, and how it stays exact where the layers below have 16 bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

# The head's weight in an adapter's file, and what it may have beside it.
SAVED_HEAD = {"weight": "base_model.model.score.weight", "bias": "base_model.model.score.bias"}


def score_head(model: nn.Module) -> nn.Linear | None:
    """Return the linear head of a decoder reward model; None for encoders, whose classifier has layers of its own."""
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    head = getattr(inner, "score", None)
    if head is not None and not isinstance(head, nn.Linear):  # PEFT wraps a saved module
        head = head.modules_to_save[head.active_adapter]
    return head


def last_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layer that gives the score, an encoder's too; two where an adapter keeps the untrained one beside it."""
    head = score_head(model)
    if head is not None:
        return [head]
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    layers = getattr(inner, "classifier", nn.Identity()).modules()
    return [layer for layer in layers if isinstance(layer, nn.Linear) and layer.out_features == inner.config.num_labels]


def start_near_zero(model: nn.Module) -> None:
    """Draw the weights of a model's new head from N(0, 1/(d+1)²), in place, where d is the number of its inputs.

    First scores are near 0 then, and what a trained model says comes from its labels. With the variance 1/(d+1) they begin with
    about a unit of noise, which a few dozen steps of LoRA do not unlearn; where all weights are trained it was no better, and
    worse in the lab (recipes/results/first_head.md).
    """
    for head in last_layers(model):
        nn.init.normal_(head.weight, std=1 / (head.in_features + 1))


def make_exact(head: nn.Linear) -> None:
    """Put a head into float32, in place, and let it read states of any type.

    PEFT puts LoRA factors into float32, but a head that is trained beside them stays in the 16 bits of its base. There a step of
    1e-5 on a weight of 0.02 is rounded away, and scores between 8 and 16 have steps of 0.06.
    """
    if head.weight.dtype != torch.float32:
        head.float()
    if _read_any_type not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_read_any_type)


def score_exactly(head: nn.Linear) -> None:
    """Let a head in float32 compute in float32 under autocast too, in place; in 16 bits scores of 2 are 0.05 nats off.

    Args:
        head: of any type; one in 16 bits stays as it is.
    """
    if _in_full_precision not in head._forward_hooks.values():
        head.register_forward_hook(_in_full_precision)


def saved_head(folder: Path) -> dict[str, Tensor]:
    """Return the head of a whole checkpoint in a folder, by the names of an adapter's file; empty where there is none."""
    head: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            head |= {
                key: tensors.get_tensor(f"score.{name}") for name, key in SAVED_HEAD.items() if f"score.{name}" in names
            }
    return head


def restore_exact(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give a loaded head, in place, the float32 that its file holds, where the type of the other weights made 16 bits of it.

    Args:
        model: a sequence classifier, with an adapter or without.
        saved: the head's tensors by the names of an adapter's file, among others.
    """
    head, weight = score_head(model), saved.get(SAVED_HEAD["weight"])
    if head is None or weight is None or weight.itemsize <= head.weight.itemsize:
        return
    make_exact(head)
    for name, parameter in head.named_parameters():
        parameter.data.copy_(saved[SAVED_HEAD[name]])


def _read_any_type(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    states, *others = arguments
    return states.to(head.weight.dtype), *others


def _in_full_precision(head: Any, arguments: tuple[Any, ...], scores: Tensor) -> Tensor:
    states = arguments[0]
    if head.weight.dtype != torch.float32 or scores.dtype == torch.float32:
        return scores
    with torch.autocast(states.device.type, enabled=False):
        return functional.linear(states.float(), head.weight, head.bias)
