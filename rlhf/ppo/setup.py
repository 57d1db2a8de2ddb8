"""What `PPOTrainer` is given, made ready: reward sources, the critic, demonstrations."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.models.load import score_head
from rlhf.ppo.backbone import on_backbone, sharing_obstacle
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.ptx import Demonstrations
from rlhf.ppo.rewards import RewardSource, is_server
from rlhf.ppo.roles import POLICY_ADAPTER, AdapterHead, Reference


def rewards_and_critic(
    policy: nn.Module,
    reward_funcs: Any,
    tokenizers: Any,
    critic: nn.Module | None,
    processing_class: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> tuple[list[RewardSource], nn.Module]:
    """The reward sources and the critic; the first source and the critic on the policy's base where that is possible.

    Raises:
        UserError: weights for another number of sources, ensemble members on unknown scales, no critic to be had.
    """
    # 1. One source or a list.
    functions = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
    if not isinstance(tokenizers, list):
        tokenizers = [tokenizers] * len(functions)
    weights = args.reward_weights
    if weights is not None and len(weights) != len(functions):
        raise UserError(f"ppo: reward_weights has {len(weights)} entries for {len(functions)} reward functions.")

    # 2. On the policy's base, where it is one that both fit.
    first = functions[0]
    if isinstance(policy, PeftModel) and isinstance(first, str) and not is_server(first) and critic is None:
        reason = sharing_obstacle(policy, first, processing_class)
        if reason is None:
            functions[0], critic = on_backbone(policy, first)
        else:
            warnings.warn(f"ppo: the policy's base is not shared with critic and reward model: {reason}.", stacklevel=3)

    # 3. Elsewhere.
    sources = [RewardSource(f, t) for f, t in zip(functions, tokenizers, strict=True)]
    if args.reward_ensemble is not None:
        _check_one_scale(sources, args)
    if not isinstance(critic, AdapterHead):
        critic = _check_critic(critic or _copy_of_reward_model(sources[0], processing_class))
    return sources, critic


def longest_prompt(policy: Any, args: PPOConfig) -> int | None:
    """Tokens of a prompt that are read: `max_prompt_length`, or what an answer leaves of the model's context.

    Raises:
        UserError: an answer leaves nothing.
    """
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return args.max_prompt_length
    room: int = positions - args.max_completion_length
    if room < 1:
        raise UserError(
            f"ppo: max_completion_length={args.max_completion_length} leaves no room for a prompt in the model's context of "
            f"{positions} tokens."
        )
    return room if args.max_prompt_length is None else min(room, args.max_prompt_length)


def check_reference(reference: Reference, args: PPOConfig) -> None:
    """Refuse to move a reference that is the shared base itself.

    Raises:
        UserError: it is.
    """
    if args.reference_mixup > 0 and not reference.weights():
        raise UserError(
            "ppo: reference_mixup moves the reference, which is the base without an adapter here; start from an SFT adapter."
        )


def _check_one_scale(sources: Sequence[RewardSource], args: PPOConfig) -> None:
    """The worst of two scores means something only where both are counted from the same origin in the same unit."""
    without = [source.name for source in sources if not source.has_scale]
    if len(sources) < 2:
        raise UserError(f"ppo: reward_ensemble={args.reward_ensemble} needs two reward models or more; there is one.")
    if without:
        raise UserError(
            f"ppo: reward_ensemble={args.reward_ensemble} compares its members, but nobody knows the scale of "
            f"{', '.join(map(repr, without))}; use reward-model folders of this pipeline, or reward_weights for a sum."
        )
    if not args.normalize_reward:
        raise UserError("ppo: reward_ensemble compares its members on one scale; leave normalize_reward on.")


def _copy_of_reward_model(source: RewardSource, processing_class: PreTrainedTokenizerBase) -> nn.Module:
    """A trainable copy of a reward model, if it can read the policy's token ids."""
    reward: Any = source.function
    model = getattr(reward, "model", None)
    if model is None:
        raise UserError(
            f"ppo: the first reward function ({source.name}) is no model to copy the critic from; pass `critic=` "
            "(any decoder with one label on the policy's tokenizer)."
        )
    if reward.tokenizer.get_vocab() != processing_class.get_vocab():
        raise UserError(
            "ppo: the reward model has another vocabulary than the policy, so the critic can't start from it; "
            "pass `critic=`."
        )
    critic = copy.deepcopy(model)
    if isinstance(critic, PeftModel):
        for name in set(critic.peft_config) - {POLICY_ADAPTER}:
            critic.delete_adapter(name)  # of experts, the critic starts from the first
        critic.set_adapter(POLICY_ADAPTER)
    for name, parameter in critic.named_parameters():
        adapter_part = "lora_" in name or "modules_to_save" in name
        parameter.requires_grad_(adapter_part or not isinstance(critic, PeftModel))
    return critic


def _check_critic(critic: nn.Module) -> nn.Module:
    if score_head(critic) is None:
        raise UserError(
            "ppo: the critic has no linear head named `score`; use a decoder loaded for sequence classification."
        )
    return critic


def read_demonstrations(
    dataset: Dataset | None,
    args: PPOConfig,
    processing_class: PreTrainedTokenizerBase,
    *,
    processes: int,
    shares_backbone: bool,
) -> Demonstrations:
    """Demonstrations for `ptx_coef`.

    Raises:
        UserError: none were given, or separate models are trained by several processes.
    """
    if dataset is None or not {"prompt", "completion"} <= set(dataset.column_names):
        raise UserError("ppo: ptx_coef is above 0, so ptx_dataset must have the columns `prompt` and `completion`.")
    if processes > 1 and not shares_backbone:
        raise UserError(
            "ppo: ptx_coef with several processes needs the four roles on one base (LoRA); the wrapper of separate models "
            "sees one forward a step."
        )
    longest = None if args.max_prompt_length is None else args.max_prompt_length + args.max_completion_length
    return Demonstrations(processing_class, dataset.to_list(), max_length=longest)
