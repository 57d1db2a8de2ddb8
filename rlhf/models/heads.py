"""A head of several labels made into one of a single score, so that what is saved is an ordinary reward model."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.load import REWARD_LABEL


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
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    name = "score" if hasattr(inner, "score") else "classifier"
    head = getattr(inner, name)
    if isinstance(head, nn.Linear):
        setattr(inner, name, _combined(head, weights))
    else:  # an encoder's head with layers of its own, or PEFT's wrapper of a head
        for parent in list(head.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child.out_features == len(weights):
                    setattr(parent, child_name, _combined(child, weights))
    inner.config.id2label, inner.config.label2id = {0: REWARD_LABEL}, {REWARD_LABEL: 0}
    inner.num_labels = 1


def _combined(linear: nn.Linear, weights: Tensor) -> nn.Linear:
    """Return a linear layer of one output, the weighted sum of another's outputs."""
    exact = weights.to(linear.weight.device, torch.float64)
    place = {"dtype": linear.weight.dtype, "device": linear.weight.device}
    single = nn.Linear(linear.in_features, 1, bias=linear.bias is not None, **place)
    single.weight.copy_((exact @ linear.weight.double())[None])
    if linear.bias is not None:
        single.bias.copy_((exact @ linear.bias.double())[None])
    return single.train(linear.training)
