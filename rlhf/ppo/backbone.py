"""Critic and reward model as adapters on the policy's own base: one base in memory for all four roles.

base, frozen ── default     the policy's adapter, trained
             ├─ reference   a frozen copy of what SFT trained (none after a full SFT: there the base is the reference)
             ├─ critic      starts as the reward model's adapter, trained, with a head of its own
             └─ reward      the reward model's adapter and head, frozen
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf.errors import UserError
from rlhf.models.adapters import rewrites_base, saved_name
from rlhf.models.load import computed_dtype, find_source
from rlhf.models.open import open_tokenizer
from rlhf.models.save import base_fingerprint
from rlhf.ppo.roles import CRITIC_ADAPTER, POLICY_ADAPTER, REWARD_ADAPTER, AdapterHead
from rlhf.reward.load import RewardModel, is_gated, load_reward_model, reward_card

HEAD = "base_model.model.score.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class AdapterScorer(nn.Module):
    """A reward adapter and its head behind the interface of a one-label classifier, for `RewardModel`."""

    def __init__(self, role: AdapterHead):
        super().__init__()
        self.role = role

    @property
    def config(self) -> PretrainedConfig:
        """Return the backbone's configuration."""
        return self.role.policy.config

    @property
    def score(self) -> nn.Linear:
        """Return the head, by the name that classifiers give it."""
        return self.role.head

    @property
    def dtype(self) -> torch.dtype:
        """Return the type that the backbone computes in."""
        return computed_dtype(self.role.policy)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """Return scores [n, 1] at the last token of rows padded on the right; in evaluation mode, whatever the policy is in."""
        policy = self.role.policy
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        was_training = policy.training
        policy.eval()
        with self.role.active():
            scores = self.role.token_scores(input_ids, attention_mask)
        policy.train(was_training)
        last = attention_mask.sum(dim=1, keepdim=True) - 1
        return SequenceClassifierOutput(logits=scores.gather(1, last))


def sharing_obstacle(policy: PeftModel, folder: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Say why a reward model can't live on the policy's base, or return None."""
    if is_gated(folder):
        return "the reward model weighs several attributes by the prompt"
    source = find_source(folder)
    if source.adapter is None:
        return "the reward model is a whole model, not an adapter"
    if reward_card(folder).get("critiques") is not None:
        return "it writes critiques, with a decoder of its own"
    weights = load_peft_weights(source.adapter, device="cpu")
    if any("lora_" not in name and name != HEAD for name in weights):
        return "its adapter holds more than LoRA weights and a head"
    base = policy.peft_config[POLICY_ADAPTER]
    if rewrites_base(base) or rewrites_base(LoraConfig.from_pretrained(source.adapter)):
        return "an adapter of one of the two (PiSSA, OLoRA, …) began by changing the base"
    if base_fingerprint(base.base_model_name_or_path, base.revision) != base_fingerprint(source.base, source.revision):
        return "it was trained on another base than the policy's"
    if bool(reward_card(folder).get("load_in_4bit")) != bool(getattr(policy, "is_loaded_in_4bit", False)):
        return "one of the two has 4-bit weights and the other has not"
    if open_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        return "it has another vocabulary"
    return None


def add_to_backbone(policy: PeftModel, folder: str) -> tuple[RewardModel, AdapterHead]:
    """Add a reward model and a critic that starts from it to the policy's base; the reward model is checked on its probe.

    The head is read from the file by name: a causal model would drop it without a word.

    Raises:
        UserError: an adapter's places are not there; the scores are not those that it was saved with.
    """
    weights = load_peft_weights(folder, device="cpu")
    roles = []
    for name, is_trained in ((REWARD_ADAPTER, False), (CRITIC_ADAPTER, True)):
        config: Any = LoraConfig.from_pretrained(folder)
        config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, not is_trained
        policy.add_adapter(name, config)
        head = nn.Linear(weights[HEAD].shape[1], 1, bias=False)
        role = AdapterHead(policy, name, head)
        load_role(role, weights)
        role.to(next(policy.parameters()).device)
        for parameter in role.role_parameters():
            parameter.requires_grad_(is_trained)
        roles.append(role)
    reward, critic = roles
    return load_reward_model(folder, network=AdapterScorer(reward)), critic


def load_role(role: AdapterHead, weights: dict[str, torch.Tensor]) -> None:
    """Copy adapter and head of a reward model's or critic's file into their places.

    Raises:
        UserError: the file and the places don't match.
    """
    places = {saved_name(name, role.adapter): p for name, p in role.adapter_parameters()}
    wrong = sorted(
        name
        for name in {*places, *weights} - {HEAD}
        if name not in places or name not in weights or places[name].shape != weights[name].shape
    )
    if wrong:
        raise UserError(f"ppo: an adapter does not fit the policy's base, first at {wrong[0]}.")
    for name, place in places.items():
        place.data.copy_(weights[name])
    role.head.weight.data.copy_(weights[HEAD])


def save_role(role: AdapterHead, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a critic as an ordinary one-label LoRA adapter.

    Args:
        weights: of policy and critic by their names in the trainer's model, where that holds only shards of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapter = dict(role.adapter_parameters())
    head: torch.Tensor = role.head.weight
    tensors: dict[str, torch.Tensor] = {**adapter}
    if weights is not None:
        tensors, head = {name: weights[f"policy.{name}"] for name in adapter}, weights["critic.head.weight"]
    state = {saved_name(name, role.adapter): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file({**state, HEAD: head.detach().cpu().contiguous()}, folder / WEIGHTS)
    config = copy.deepcopy(role.policy.peft_config[role.adapter])
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.SEQ_CLS, ["score"], True
    config.save_pretrained(str(folder))
    assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["task_type"] == "SEQ_CLS"


def restore_role(role: AdapterHead, folder: Path) -> None:
    """Read what `save_role` wrote."""
    load_role(role, load_file(folder / WEIGHTS))
