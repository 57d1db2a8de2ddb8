"""The four roles of PPO. Policy and critic are trained in one container; the reference is frozen; the reward is text in, score out.

Two layouts answer to the same interface: separate models, and one backbone whose adapters are the roles (`AdapterHead`,
and a reference that is the policy's own model under another adapter; `rlhf.ppo.backbone` puts them there).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig
from trl import ModelConfig

from rlhf.errors import UserError
from rlhf.models.adapters import beside_others
from rlhf.models.load import find_source, load_policy, model_settings
from rlhf.models.logprobs import (
    ExpectedCounts,
    response_logprobs,
    response_statistics,
)
from rlhf.models.score import token_scores
from rlhf.models.unpadded import token_states

POLICY_ADAPTER, REFERENCE_ADAPTER, CRITIC_ADAPTER, REWARD_ADAPTER = "default", "reference", "critic", "reward"
ROLES = ("policy", "critic")


class TokenOutputs(NamedTuple):
    """The outputs of policy and critic for each token of the answers; what was not asked for is None.

    Attributes:
        logprobs: [b, r] log π(token), nats, at the sampling temperature.
        entropy: [b, r] nats; None while gradients are recorded, since nothing is made of it then.
        values: [b, r] V before the token was chosen, in normalised score units.
        variance, third: [b, r] second and third central moment of the surprise -log π, nats² and nats³; where entropy is.
        certainty: [b, r] KL of the uniform distribution from the policy's, nats; where entropy is.
    """

    logprobs: Any
    entropy: Any
    values: Any
    variance: Any = None
    third: Any = None
    certainty: Any = None


class AdapterHead(nn.Module):
    """A scalar role on the policy's backbone: an adapter there, and a linear head of its own.

    Attributes:
        policy: holds the backbone; no submodule of this one, so that it is saved and counted once.
        adapter: its name there.
    """

    def __init__(self, policy: PeftModel, adapter: str, head: nn.Linear):
        super().__init__()
        self.head, self.adapter = head, adapter
        self._policy = [policy]

    @property
    def policy(self) -> PeftModel:
        """Return the PEFT model whose base this role lives on."""
        return self._policy[0]

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the adapter's weights, by their names in the policy."""
        return [(name, p) for name, p in self.policy.named_parameters() if belongs_to(name, self.adapter)]

    def role_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of adapter and head."""
        return [p for _, p in self.adapter_parameters()] + list(self.head.parameters())

    def active(self) -> AbstractContextManager[None]:
        """Return the context in which the backbone acts for this role; its backward belongs inside too."""
        return active_adapter(self.policy, self.adapter)

    def token_scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the head's scores at every token and 0 at padding, [b, t], under whichever adapter is active."""
        inner = self.policy.base_model.model
        states = token_states(getattr(inner, inner.base_model_prefix), input_ids, attention_mask)
        scores: Tensor = self.head(states.to(self.head.weight.dtype)).squeeze(-1)
        return scores.new_zeros(attention_mask.shape).masked_scatter(attention_mask.bool(), scores)


class PolicyAndCritic(nn.Module):
    """The trainable roles in one module, so that one optimizer and one wrapper serve both.

    Args:
        policy: a causal model.
        critic: a decoder with a linear `score` head, usually a copy of the reward model; or a role on the policy's
            backbone.
        value_mean, value_std: the scores' mean and deviation on SFT samples; values are given in these units, so that
            a critic that starts as the reward model predicts normalised rewards from its first step.
    """

    def __init__(self, policy: nn.Module, critic: nn.Module, *, value_mean: float = 0.0, value_std: float = 1.0):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.value_mean, self.value_std = value_mean, value_std

    @property
    def config(self) -> PretrainedConfig:
        """Return the policy's configuration: what the Trainer asks of a model."""
        return self.policy.config

    @property
    def shares_backbone(self) -> bool:
        """Tell whether both roles are adapters on one base; then only one of them may be between forward and backward."""
        return isinstance(self.critic, AdapterHead)

    @property
    def _no_split_modules(self) -> list[str]:
        """Return the names of the layers that FSDP shards one by one: those of both roles."""
        layers = (getattr(part, "_no_split_modules", None) or () for part in (self.policy, self.critic))
        return sorted({name for names in layers for name in names})

    def role_parameters(self, role: str) -> list[nn.Parameter]:
        """Return the parameters that are trained for a role."""
        critic = (
            self.critic.role_parameters() if isinstance(self.critic, AdapterHead) else list(self.critic.parameters())
        )
        of_critic = {id(p) for p in critic}
        parameters = critic if role == "critic" else [p for p in self.policy.parameters() if id(p) not in of_critic]
        return [p for p in parameters if p.requires_grad]

    def acting(self, role: str) -> AbstractContextManager[None]:
        """Return the context of a role's forward and backward."""
        return self.critic.active() if role == "critic" and isinstance(self.critic, AdapterHead) else nullcontext()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_length: int,
        temperature: float,
        roles: Sequence[str] = ROLES,
        expected: ExpectedCounts | None = None,
    ) -> TokenOutputs:
        """Run both roles, or one, on the same tokens.

        Args:
            input_ids, attention_mask: [b, p + r] prompts padded on the left, answers padded on the right.
            response_length: r, the width of the answers.
            temperature: by which the policy's logits are divided.
            expected: where the policy's expected counts of tokens are added up; not while gradients are recorded.
        """
        logprobs = entropy = values = variance = third = certainty = None
        if "policy" in roles:
            statistics = response_statistics(
                self.policy,
                input_ids,
                attention_mask,
                response_length,
                temperature,
                moments=not torch.is_grad_enabled(),
                expected=expected,
            )
            logprobs = statistics.logprobs
            if statistics.surprise is not None:
                entropy, variance, third, certainty = statistics.surprise
        if "critic" in roles:
            with self.acting("critic"):
                if isinstance(self.critic, AdapterHead):
                    scores = self.critic.token_scores(input_ids, attention_mask).float()
                else:
                    scores = token_scores(self.critic, input_ids, attention_mask).float()
            values = (scores[:, -response_length - 1 : -1] - self.value_mean) / self.value_std
        return TokenOutputs(logprobs, entropy, values, variance, third, certainty)

    def gradient_checkpointing_enable(self, **arguments: object) -> None:
        """Switch on checkpointing in both roles."""
        models: list[Any] = [self.policy] if self.shares_backbone else [self.policy, self.critic]
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
        is_policy: whether it is the policy as PPO finds it, until `load` gives it other weights.
    """

    def __init__(self, model: nn.Module, *, adapter: str | None = None, shared: bool = False, is_policy: bool = True):
        self.model, self.adapter, self.shared, self.is_policy = model, adapter, shared, is_policy

    @torch.no_grad()
    def logprobs(self, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float) -> Tensor:
        """Return log π_ref of the answers' tokens [b, r], nats."""
        with self.acting() as model:
            return response_logprobs(model, input_ids, attention_mask, response_length, temperature)

    @contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """Give the reference as an ordinary model."""
        if not self.shared:
            yield self.model
            return
        assert isinstance(self.model, PeftModel)
        with active_adapter(self.model, self.adapter):
            yield self.model

    def weights(self) -> dict[str, Tensor]:
        """Return what makes this reference another model than its base, by the policy's names of it; empty where it is the base."""
        if not self.shared:
            return dict(self.model.named_parameters())
        if self.adapter is None:
            return {}
        named = self.model.named_parameters()
        return {renamed(name, self.adapter, POLICY_ADAPTER): p for name, p in named if belongs_to(name, self.adapter)}

    def load(self, source: str | Path, config: ModelConfig | None = None) -> None:
        """Take the weights of another policy: of an adapter on the same base, or of a whole model.

        A reference that is the base itself stays what it is.

        Args:
            source: a folder or a model of the hub. Of an adapter a reference of its own takes the merged weights.
            config: how that is opened; by default in float32.

        Raises:
            UserError: it can't be opened, or its adapter lacks a weight that the reference has a place for.
        """
        self.is_policy = False
        if not self.weights():
            return
        if not self.shared:
            self.model.load_state_dict(load_policy(source, config or model_settings({})).state_dict())
            return
        assert isinstance(self.model, PeftModel)
        saved = load_peft_weights(str(find_source(source).adapter), device="cpu")
        places = get_peft_model_state_dict(self.model, adapter_name=REFERENCE_ADAPTER, save_embedding_layers=False)
        missing = sorted(set(places) - set(saved))
        if missing:
            raise UserError(f"ppo: {source} does not fit the reference, which also has {missing[0]}.")
        set_peft_model_state_dict(self.model, saved, adapter_name=REFERENCE_ADAPTER)

    @torch.no_grad()
    def approach(self, policy: nn.Module, rate: float) -> None:
        """Move towards the policy, weight by weight: w_ref ← (1 - rate) w_ref + rate w_policy.

        LoRA's factors move one by one, so their product is exact at rate 1 alone.
        """
        for name, weight in self.weights().items():
            weight.lerp_(policy.get_parameter(name).to(weight), rate)


def make_reference(policy: nn.Module, *, adapter_was_trained: bool) -> Reference:
    """Return the reference of a policy at the moment PPO starts.

    Without LoRA it is a frozen copy. With an adapter fresh from PPO's own settings it is the base without adapters;
    with an adapter that SFT trained it is a frozen copy of that adapter beside it. Either way modules that are trained
    as a whole (`modules_to_save`) have a frozen one of their own there.

    Raises:
        UserError: weights of the base itself are trained, or the adapter is a prompt and no layer.
    """
    if not isinstance(policy, PeftModel):
        return Reference(copy.deepcopy(policy).eval().requires_grad_(False))
    check_adapter(policy)
    if not adapter_was_trained:
        return Reference(policy, adapter=None, shared=True, is_policy=adds_nothing(policy))
    policy.add_adapter(REFERENCE_ADAPTER, beside_others(policy.peft_config[POLICY_ADAPTER]))
    for name, parameter in policy.named_parameters():
        if belongs_to(name, REFERENCE_ADAPTER):
            source = policy.get_parameter(renamed(name, REFERENCE_ADAPTER, POLICY_ADAPTER))
            parameter.data.copy_(source.data)
            parameter.requires_grad_(False)
    return Reference(policy, adapter=REFERENCE_ADAPTER, shared=True)


def check_adapter(policy: PeftModel) -> None:
    """Refuse what would move the base under the other roles on it.

    Raises:
        UserError: saying what to change.
    """
    if policy.peft_config[POLICY_ADAPTER].is_prompt_learning:
        raise UserError(
            "ppo: the policy's adapter is a learnt prompt, which can't be switched off for the reference; use LoRA."
        )
    on_base = [n for n, p in policy.named_parameters() if p.requires_grad and not belongs_to(n, POLICY_ADAPTER)]
    if on_base:
        raise UserError(
            f"ppo: {len(on_base)} weights of the base are trained beside the adapter, first {on_base[0]}; the reference would move "
            "with them. Set bias='none' and freeze the base; name modules that shall be trained whole in lora_modules_to_save."
        )


def adds_nothing(policy: PeftModel) -> bool:
    """Tell whether the policy's LoRA adapter is fresh: of each pair of factors one is still zero."""
    zero = [
        not p.any().item()
        for name, p in policy.named_parameters()
        if belongs_to(name, POLICY_ADAPTER) and (".lora_B." in name or ".lora_embedding_A." in name)
    ]
    return bool(zero) and all(zero)


def belongs_to(name: str, adapter: str) -> bool:
    """Tell whether a weight of this name belongs to an adapter.

    >>> belongs_to("q.lora_A.critic.weight", "critic"), belongs_to("embed.lora_embedding_A.critic", "critic")
    (True, True)
    """
    return adapter in name.split(".")


def renamed(name: str, adapter: str, other: str | None) -> str:
    """Return the name of the same weight of another adapter; with None, as in an adapter's file.

    >>> renamed("q.lora_A.critic.weight", "critic", "default"), renamed("e.lora_embedding_A.critic", "critic", None)
    ('q.lora_A.default.weight', 'e.lora_embedding_A')
    """
    parts = [other if part == adapter else part for part in name.split(".")]
    return ".".join(part for part in parts if part is not None)


@contextmanager
def active_adapter(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Run under another adapter, or under none, without touching any parameter's `requires_grad`.

    Modules that an adapter trains as a whole are switched with it: for an adapter that has none of its own, the base's.

    PEFT's own `set_adapter` also turns gradients on and off. Do not leave this context between a checkpointed forward
    and its backward: the recomputation would use the wrong adapter, silently.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            if adapter is None or not _has_adapter(layer, adapter):
                layer._disable_adapters = True
            else:
                layer._active_adapter, layer._disable_adapters = [adapter], False
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _has_adapter(layer: BaseTunerLayer | AuxiliaryTrainingWrapper, adapter: str) -> bool:
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return adapter in layer._adapters
    return adapter in layer._get_available_adapters()
