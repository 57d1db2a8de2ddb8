"""Setting up `PPOTrainer`: policy and tokenizer, reward sources, the critic, demonstrations; refusals in a sentence."""

import warnings
from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.models.adapters import rewrites_base
from rlhf.models.coarse import coarse_weights
from rlhf.models.critiques import drop_output_layer
from rlhf.models.four_bit import keep_gradients
from rlhf.models.open import open_tokenizer
from rlhf.models.scalar_head import make_exact, score_head
from rlhf.models.text import check_tokenizer, encode
from rlhf.ppo.backbone import add_to_backbone, sharing_obstacle
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.ptx import Demonstrations
from rlhf.ppo.rewards import RewardFunction, RewardSource
from rlhf.ppo.roles import POLICY_ADAPTER, AdapterHead, Reference
from rlhf.ppo.source_kinds import FOLDER, kind_of
from rlhf.ppo.verdict_reward import OPPONENT
from rlhf.reward.load import RewardModel


def check_data(dataset: Dataset | None) -> Dataset:
    """Return the training data, if there are prompts in them.

    Raises:
        UserError: no column `prompt`, or no row.
    """
    if dataset is None or "prompt" not in dataset.column_names or len(dataset) == 0:
        raise UserError("ppo: train_dataset needs a column `prompt` and at least one row.")
    return dataset


def check_opponents(dataset: Dataset) -> None:
    """Refuse rows without an answer that a reward is to compare with, beside a column of them.

    Raises:
        UserError: saying how many, and which is the first.
    """
    if OPPONENT not in dataset.column_names:
        return
    without = [i for i, text in enumerate(dataset[OPPONENT]) if not isinstance(text, str)]
    if without:
        first = without[0]
        raise UserError(
            f"ppo: {len(without)} of {len(dataset)} rows of train_dataset have no text in the column {OPPONENT!r}, the first "
            f"of them row {first} ({dataset[first][OPPONENT]!r}); give each row one, or leave the column out, and the "
            "reference answers."
        )


def check_prompts(tokenizer: PreTrainedTokenizerBase, **datasets: Dataset | None) -> None:
    """Refuse data with a prompt of no tokens before anything is trained; `encode_prompts` would in the middle.

    Args:
        datasets: by the names of the trainer's arguments; conversations have the tokens of their chat template.

    Raises:
        UserError: naming the first such row.
    """
    for name, dataset in datasets.items():
        if dataset is None or len(dataset) == 0 or not isinstance(dataset[0]["prompt"], str):
            continue
        for i, prompt in enumerate(dataset["prompt"]):
            if not prompt.strip() and encode(tokenizer, [prompt], conversational=False) == [[]]:
                raise UserError(
                    f"ppo: row {i} of {name} has a prompt of no tokens ({prompt!r}), and an answer needs one before it; leave such "
                    "rows out, or write a token that begins a text."
                )


def policy_and_tokenizer(
    model: str | PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    args: PPOConfig,
    *,
    conversational: bool,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Return the policy, under a fresh adapter where one was asked for, and its tokenizer, which has a padding token.

    Raises:
        UserError: a second adapter, or one that does not begin at the model; a tokenizer without an end token, a chat template or a
            padding token to be had.
    """
    if isinstance(model, str):
        # Not as the checkpoint is saved, which is mostly in bfloat16: it rounds away nearly all steps of PPO's size.
        model = AutoModelForCausalLM.from_pretrained(
            model, **{"trust_remote_code": False, "dtype": torch.float32, **(args.model_init_kwargs or {})}
        )
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise UserError("ppo: the model has an adapter already, which PPO will train; drop peft_config.")
        initial = getattr(peft_config, "init_lora_weights", True)
        if rewrites_base(peft_config) or initial is False:  # factors at random, neither of them zero
            raise UserError(
                f"ppo: an adapter with init_lora_weights={initial!r} does not begin at the model that was given, and the reference "
                "would be another model than the policy; leave it out, or train such an adapter first (SFT) and hand it over."
            )
        model = get_peft_model(model, peft_config)
    if processing_class is None:
        processing_class = open_tokenizer(model.config._name_or_path)
    check_tokenizer(processing_class, conversational=conversational, name="ppo")
    model.config.get_text_config().pad_token_id = processing_class.pad_token_id
    return model, processing_class


def count_rollouts(args: PPOConfig, prompts: int) -> int:
    """Return how many rollouts training makes, and say so where they hold more answers than were asked for.

    Raises:
        UserError: all of them are the critic's warm-up.
    """
    rollouts = args.rollouts(prompts, args.world_size)
    answers = rollouts * args.local_rollout_size * args.world_size
    try:
        args.check_warmup(rollouts)
    except ValueError as error:
        raise UserError(f"ppo: {error}") from error
    if args.total_episodes is not None and answers != args.total_episodes:
        warnings.warn(
            f"ppo: {answers} answers are sampled in place of total_episodes={args.total_episodes}: {rollouts} whole rollouts of "
            f"{answers // rollouts}.",
            stacklevel=3,
        )
    return rollouts


def check_parallelism(args: PPOConfig, *, fsdp: bool) -> None:
    """Refuse ways of using several GPUs under which something is wrong or was never tried.

    Raises:
        UserError: one process sees several GPUs; FSDP together with what writes into whole weights or reads them.
    """
    if args.n_gpu > 1:
        raise UserError("ppo: several GPUs are visible to one process; launch with `torchrun` or `accelerate launch`.")
    asked = {
        "reference_mixup": args.reference_mixup > 0,
        "ptx_coef": args.ptx_coef > 0,
        "use_vllm": args.use_vllm,
    }
    for name, is_asked in asked.items():
        if fsdp and is_asked:
            raise UserError(
                f"ppo: {name} does not work with FSDP yet; leave it out, or use data parallelism (`torchrun`)."
            )


def rewards_and_critic(
    policy: nn.Module,
    reward_funcs: RewardFunction | list[RewardFunction],
    tokenizers: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
    critic: nn.Module | None,
    processing_class: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> tuple[list[RewardSource], nn.Module, bool]:
    """Return the reward sources and the critic; the first source and the critic on the policy's base where that is possible.

    Returns:
        sources; the critic; whether it is a copy of what the first source opened, and has that copy's scale.

    Raises:
        UserError: weights for another number of sources, ensemble members on unknown scales, shaping or a discriminator without
            a reward model, no critic to be had.
    """
    # 1. One source or a list.
    keep_gradients(policy)
    functions = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
    if not isinstance(tokenizers, list):
        tokenizers = [tokenizers] * len(functions)
    weights = args.reward_weights
    if weights is not None and len(weights) != len(functions):
        raise UserError(f"ppo: reward_weights has {len(weights)} entries for {len(functions)} reward functions.")

    # 2. On the policy's base, where it is one that both fit.
    first = functions[0]
    if isinstance(policy, PeftModel) and isinstance(first, str) and kind_of(first) is FOLDER and critic is None:
        reason = sharing_obstacle(policy, first, processing_class)
        if reason is None:
            functions[0], critic = add_to_backbone(policy, first)
        else:
            warnings.warn(f"ppo: the policy's base is not shared with critic and reward model: {reason}.", stacklevel=3)

    # 3. Elsewhere.
    sources = [RewardSource(f, t) for f, t in zip(functions, tokenizers, strict=True)]
    if args.reward_ensemble is not None:
        _check_one_scale(sources, args)
    _check_reads_model(sources[0], args)
    is_copy = critic is None
    if not isinstance(critic, AdapterHead):
        critic = _check_critic(critic or _copy_of_reward_model(sources[0], processing_class))
    keep_gradients(critic)
    for role, network in (("policy", policy), ("critic", critic)):
        if (sentence := coarse_weights(f"ppo: the {role}'s", network, args.learning_rate)) is not None:
            warnings.warn(sentence, stacklevel=3)
    return sources, critic, is_copy


def check_reference(reference: Reference, args: PPOConfig) -> None:
    """Refuse to move a reference that is the shared base itself, or whose weights round its steps away.

    Raises:
        UserError: it is, or they do.
    """
    if args.reference_mixup > 0 and not reference.weights():
        raise UserError(
            "ppo: reference_mixup moves the reference, which is the base without an adapter here; start from an SFT adapter."
        )
    if 0 < args.reference_mixup < 1 and any(
        p.is_floating_point() and p.itemsize == 2 for p in reference.weights().values()
    ):
        raise UserError(
            f"ppo: reference_mixup={args.reference_mixup:g} moves weights of 16 bits, in which such small steps are rounded away; "
            "load the policy in float32 (`bf16: true` computes in bfloat16 all the same), or take LoRA."
        )


def _check_one_scale(sources: Sequence[RewardSource], args: PPOConfig) -> None:
    """Refuse members whose scores are not counted from one origin in one unit: the worst of two would mean nothing."""
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


def _check_reads_model(first: RewardSource, args: PPOConfig) -> None:
    """Refuse rewards that are made with the first reward model where that is none, or has no features."""
    if args.shaping_coef > 0 and not isinstance(first.function, RewardModel):
        raise UserError(
            f"ppo: shaping_coef needs scores of answers that are not finished, which a reward model gives and {first.name!r} may "
            "not; name a reward model first, or leave shaping_coef out."
        )
    if args.adversarial_coef > 0 and not (
        isinstance(first.function, RewardModel) and score_head(first.function.model) is not None
    ):
        raise UserError(
            f"ppo: adversarial_coef tells answers apart by the features of a reward model with a linear head, which {first.name!r} "
            "has not; name one first, or leave adversarial_coef out."
        )


def _copy_of_reward_model(source: RewardSource, processing_class: PreTrainedTokenizerBase) -> nn.Module:
    """Return a trainable copy of a reward model, if it can read the policy's token ids."""
    reward = source.function
    if not isinstance(reward, RewardModel):
        raise UserError(
            f"ppo: the first reward function ({source.name}) is no model to copy the critic from; pass `critic=` "
            "(any decoder with one label on the policy's tokenizer)."
        )
    if reward.tokenizer.get_vocab() != processing_class.get_vocab():
        raise UserError(
            "ppo: the reward model has another vocabulary than the policy, so the critic can't start from it; "
            "pass `critic=`."
        )
    critic = reward.copy_of_network()
    drop_output_layer(critic)  # of a model that writes critiques
    if not isinstance(critic, PeftModel):
        critic.float()  # as it will be trained, whatever its scores were computed in
    else:
        for name in set(critic.peft_config) - {POLICY_ADAPTER}:
            critic.delete_adapter(name)  # of experts, the critic starts from the first
        critic.set_adapter(POLICY_ADAPTER)
        if (head := score_head(critic)) is not None:
            make_exact(head)
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
    longest_prompt: int | None,
    processes: int,
    shares_backbone: bool,
) -> Demonstrations | None:
    """Return the demonstrations for `ptx_coef` and `adversarial_coef`, or None where both are 0.

    Raises:
        UserError: none were given, or separate models are trained by several processes.
    """
    asked = [name for name in ("ptx_coef", "adversarial_coef") if getattr(args, name) > 0]
    if not asked:
        return None
    if dataset is None or not {"prompt", "completion"} <= set(dataset.column_names):
        raise UserError(f"ppo: {asked[0]} is above 0, so ptx_dataset must have the columns `prompt` and `completion`.")
    if args.ptx_coef > 0 and processes > 1 and not shares_backbone:
        raise UserError(
            "ppo: ptx_coef with several processes needs the four roles on one base (LoRA); the wrapper of separate models "
            "sees one forward a step."
        )
    longest = None if longest_prompt is None else longest_prompt + args.max_completion_length
    return Demonstrations(processing_class, dataset.to_list(), max_length=longest)


def split_groups(
    optimizer: torch.optim.Optimizer, critic: Sequence[nn.Parameter], policy_rate: float, *, critic_rate: float
) -> None:
    """Split every group of an optimizer into policy and critic, each with a learning rate of its own."""
    of_critic = {id(parameter) for parameter in critic}
    groups = []
    for group in optimizer.param_groups:
        for is_critic, rate in ((False, policy_rate), (True, critic_rate)):
            parameters = [p for p in group["params"] if (id(p) in of_critic) == is_critic]
            if parameters:
                groups.append({**group, "params": parameters, "lr": rate})
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
