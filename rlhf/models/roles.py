"""The four roles of PPO. Policy and critic are trained in one container; the reference is frozen; the reward is text in, score out.

Two layouts answer to the same interface: separate models (here), and one backbone with adapters, where the reference is
the policy's own model under another adapter.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf._trl import entropy_from_logits, selective_log_softmax
from rlhf.models.score import token_scores

POLICY_ADAPTER, REFERENCE_ADAPTER = "default", "reference"


class TokenOutputs(NamedTuple):
    """What policy and critic say about each token of the answers.

    Attributes:
        logprobs: [b, r] log π(token), nats, at the sampling temperature.
        entropy: [b, r] nats, without gradient.
        values: [b, r] V before the token was chosen, in normalised score units.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that do not count padding on the left: [b, t]; padding itself gets 0.

    >>> position_ids(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 0, 0, 1, 2]])
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def response_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
    """Logits [b, r, vocabulary] from which each of the last `response_length` tokens was sampled."""
    arguments: dict[str, Any] = {}
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    keeps_last = "logits_to_keep" in inspect.signature(inner.forward).parameters
    if keeps_last:
        arguments["logits_to_keep"] = response_length + 1
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
        **arguments,
    ).logits
    return logits[:, -response_length - 1 : -1]


def response_logprobs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [b, r] of the last `response_length` tokens, nats, at the sampling temperature."""
    logits = response_logits(model, input_ids, attention_mask, response_length).float() / temperature
    logprobs = selective_log_softmax(logits, input_ids[:, -response_length:])
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return logprobs, entropy


class PolicyAndCritic(nn.Module):
    """The trainable roles in one module, so that one optimizer, one wrapper and one backward serve both.

    Args:
        policy: a causal model.
        critic: a decoder with a linear `score` head, usually a copy of the reward model.
        value_mean, value_std: the scores' mean and deviation on SFT samples; values are given in these units, so that
            a critic that starts as the reward model predicts normalised rewards from its first step.
    """

    def __init__(self, policy: nn.Module, critic: nn.Module, *, value_mean: float = 0.0, value_std: float = 1.0):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.value_mean, self.value_std = value_mean, value_std

    @property
    def config(self) -> Any:
        """The policy's configuration: what the Trainer asks of a model."""
        return self.policy.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float
    ) -> TokenOutputs:
        """Both roles on the same tokens: prompts padded on the left, answers of width `response_length` on the right."""
        logprobs, entropy = response_logprobs(self.policy, input_ids, attention_mask, response_length, temperature)
        scores = token_scores(self.critic, input_ids, attention_mask, position_ids(attention_mask)).float()
        values = (scores[:, -response_length - 1 : -1] - self.value_mean) / self.value_std
        return TokenOutputs(logprobs, entropy, values)

    def gradient_checkpointing_enable(self, **arguments: Any) -> None:
        """Switch on checkpointing in both roles."""
        models: list[Any] = [self.policy, self.critic]
        for model in models:
            model.gradient_checkpointing_enable(**arguments)
            if isinstance(model, PeftModel):
                model.enable_input_require_grads()


class Reference:
    """The frozen policy that the KL is measured to.

    Args:
        model: a frozen model of its own, or a PEFT model that also holds the policy.
        adapter: with a PEFT model, the adapter that is the reference, or None for the base without any.
        shared: whether `model` also holds the policy, so that adapters must be switched.
    """

    def __init__(self, model: nn.Module, *, adapter: str | None = None, shared: bool = False):
        self.model, self.adapter, self.shared = model, adapter, shared

    @torch.no_grad()
    def logprobs(self, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float) -> Tensor:
        """Log π_ref of the answers' tokens [b, r], nats."""
        if not self.shared:
            return response_logprobs(self.model, input_ids, attention_mask, response_length, temperature)[0]
        assert isinstance(self.model, PeftModel)
        with active_adapter(self.model, self.adapter):
            return response_logprobs(self.model, input_ids, attention_mask, response_length, temperature)[0]


def make_reference(policy: nn.Module, *, adapter_was_trained: bool) -> Reference:
    """The reference of a policy at the moment PPO starts.

    Without LoRA it is a frozen copy. With an adapter fresh from PPO's own settings it is the base without adapters;
    with an adapter that SFT trained it is a frozen copy of that adapter beside it.
    """
    if not isinstance(policy, PeftModel):
        return Reference(copy.deepcopy(policy).eval().requires_grad_(False))
    if not adapter_was_trained:
        return Reference(policy, adapter=None, shared=True)
    policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[POLICY_ADAPTER])
    for name, parameter in policy.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            source = policy.get_parameter(name.replace(f".{REFERENCE_ADAPTER}.", f".{POLICY_ADAPTER}."))
            parameter.data.copy_(source.data)
            parameter.requires_grad_(False)
    return Reference(policy, adapter=REFERENCE_ADAPTER, shared=True)


@contextmanager
def active_adapter(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Run under another adapter, or under none, without touching any parameter's `requires_grad`.

    PEFT's own `set_adapter` also turns gradients on and off. Do not leave this context between a checkpointed forward
    and its backward: the recomputation would use the wrong adapter, silently.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            if adapter is None:
                layer._disable_adapters = True
            else:
                layer._active_adapter = [adapter]
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
