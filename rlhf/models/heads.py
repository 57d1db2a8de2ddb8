"""Heads that a reward model has while it trains: several labels, of which one score is made; a language model's, beside it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import ModelConfig

from rlhf.errors import UserError
from rlhf.models.load import REWARD_LABEL, load_policy
from rlhf.models.logprobs import reads_states
from rlhf.models.scalar_head import make_exact


@torch.no_grad()
def combine_labels(model: PreTrainedModel | PeftModel, weights: Tensor) -> None:
    """Replace a head of k labels, in place, by one whose only score is their weighted sum.

        Σ_a w_a (W_a x + b_a) = (w' W) x + w' b

    A sum of linear maps is one: every program that loads the saved model gets the score, and needs to know of no attribute. With
    an adapter the head that is trained and saved beside it is replaced too.

    Args:
        model: a sequence classifier of k labels whose head ends in a linear layer.
        weights: [k].
    """
    inner, name = _head_place(model)
    head = getattr(inner, name)
    if isinstance(head, nn.Linear):
        setattr(inner, name, _combined(head, weights))
    else:  # an encoder's head with layers of its own, or PEFT's wrapper of a head
        for place in _last_layers(head, len(weights)):
            parent, _, child = place.rpartition(".")
            setattr(head.get_submodule(parent), child, _combined(cast(nn.Linear, head.get_submodule(place)), weights))
    inner.config.id2label, inner.config.label2id = {0: REWARD_LABEL}, {REWARD_LABEL: 0}
    inner.num_labels = 1


def _last_layers(head: nn.Module, labels: int) -> list[str]:
    """Return the names of the last linear layers of so many outputs: of a head, or of each copy of it in PEFT's wrapper."""
    last: dict[str, str] = {}
    for name, module in head.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == labels:
            wrapped = name.startswith(("original_module", "modules_to_save."))
            last[".".join(name.split(".")[: 2 if "modules_to_save" in name else 1]) if wrapped else ""] = name
    return list(last.values())


def _combined(linear: nn.Linear, weights: Tensor) -> nn.Linear:
    """Return a linear layer of one output, the weighted sum of another's outputs."""
    exact = weights.to(linear.weight.device, torch.float64)
    place = {"dtype": linear.weight.dtype, "device": linear.weight.device}
    single = nn.Linear(linear.in_features, 1, bias=linear.bias is not None, **place)
    single.weight.copy_((exact @ linear.weight.double())[None])
    if linear.bias is not None:
        single.bias.copy_((exact @ linear.bias.double())[None])
    if linear.weight.dtype == torch.float32:
        make_exact(single)  # also on layers of 16 bits, as the head in its place was
    return single.train(linear.training)


def label_layer(model: PreTrainedModel | PeftModel, labels: int) -> nn.Linear:
    """Return the last linear layer of a head of so many labels: of an adapter's, the one that is trained."""
    inner, name = _head_place(model)
    layers = [m for m in getattr(inner, name).modules() if isinstance(m, nn.Linear) and m.out_features == labels]
    return [layer for layer in layers if layer.weight.requires_grad][-1]


def _head_place(model: PreTrainedModel | PeftModel) -> tuple[Any, str]:
    """Return the classifier without an adapter's wrapper, and under which name its head is there."""
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    return inner, "score" if hasattr(inner, "score") else "classifier"


@contextmanager
def one_label(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Let the configuration say, for a while, that the head has one label: TRL refuses every other reward model."""
    labels = dict(model.config.id2label)
    model.config.num_labels = 1
    try:
        yield
    finally:
        model.config.id2label, model.config.label2id = labels, {label: number for number, label in labels.items()}


def language_head(path: str | Path, config: ModelConfig) -> PreTrainedModel:
    """Return the output layer of an SFT checkpoint or adapter, frozen: its causal model without the decoder below.

    Args:
        path: what the reward model is built on; an adapter is merged in.
        config: of the reward model; its dtype is kept, an output layer has no LoRA and no 4-bit weights.

    Raises:
        UserError: an encoder, or an architecture whose output layer can't be read by itself.
    """
    whole = copy.copy(config)
    whole.use_peft = whole.load_in_4bit = whole.load_in_8bit = False
    model: Any = load_policy(path, whole)
    if not reads_states(model):
        raise UserError(
            f"{path}: the output layer of this architecture can't be read by itself; leave reward.extra out."
        )
    setattr(model, model.base_model_prefix, nn.Module())
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen
