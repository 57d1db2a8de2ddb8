"""`MetaRewardTrainer`: MetaRM (arXiv:2405.00438), which keeps a reward model telling apart what the policy now answers.

Before each optimizer step the parameters ascend from θ to θ' on the difference loss J, computed on unlabelled answers of the
present policy; the preference loss takes its gradient at θ'; the optimizer applies it to θ.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict, TypeGuard

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import RewardConfig

from rlhf.data.messages import ended_of
from rlhf.data.read import BadRow
from rlhf.data.rows import Prompt, prompt_key
from rlhf.errors import UserError
from rlhf.models.coarse import mostly_16_bits
from rlhf.models.packing import pack
from rlhf.models.sharding import check_sharding, whole
from rlhf.models.text import encode_answers
from rlhf.objectives.meta import ascent, reward_spread
from rlhf.reward.contrastive import ContrastiveRewardTrainer


class SampledAnswers(TypedDict):
    """Several answers to one prompt; `ended` says of each response whether it came to its end."""

    prompt: Prompt
    responses: list[str]
    ended: list[bool]


def group_samples(rows: Sequence[Mapping[str, object]]) -> tuple[list[SampledAnswers], dict[str, int]]:
    """Group the answers of a stage's `samples.jsonl` by prompt, and count the prompts that were left out, by reason.

    Args:
        rows: `prompt`, `completion`, and whether it `ended`; one row an answer.

    Returns:
        the prompts with two different responses at least, in the order of their first answers; reason → prompts left out.

    Raises:
        UserError: a row is no text; no prompt has two different answers.
    """
    groups: dict[str, SampledAnswers] = {}
    for number, row in enumerate(rows):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(completion, str) or not prompt or not _is_prompt(prompt):
            raise UserError(
                f"meta samples: row {number} has no 'prompt' and 'completion' as text; ids of another tokenizer can't be read."
            )
        entry = groups.setdefault(prompt_key(prompt), {"prompt": prompt, "responses": [], "ended": []})
        entry["responses"].append(completion)
        entry["ended"].append(_ended(row, number))
    kept, dropped = [], {"a single response": 0, "identical responses": 0}
    for entry in groups.values():
        if len(entry["responses"]) == 1:
            dropped["a single response"] += 1
        elif len(set(entry["responses"])) == 1:
            dropped["identical responses"] += 1
        else:
            kept.append(entry)
    if not kept:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in dropped.items() if count)
        raise UserError(
            f"meta samples: of {len(groups)} prompts none has two different responses ({reasons or 'no rows'}); sample several "
            "per prompt."
        )
    return kept, {reason: count for reason, count in dropped.items() if count}


def _ended(row: Mapping[str, object], number: int) -> bool:
    try:
        return ended_of(row)
    except BadRow as error:
        raise UserError(f"meta samples: row {number}: {error}.") from error


def _is_prompt(value: object) -> TypeGuard[Prompt]:
    """Tell whether a value is a text, or messages whose role and content are texts."""
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )


class MetaRewardTrainer(ContrastiveRewardTrainer):
    """Any pair loss and any contrastive term, with MetaRM's extra step (arXiv:2405.00438 algorithm 1, first order).

    One θ' per optimizer step, whatever the accumulation: all micro-batches take their gradient there. The ascent draws
    its prompts from (seed, step) and leaves the random state as it was, so a step of 0 is the plain trainer bit for
    bit, and a resumed run goes on exactly. Over several processes the prompts are dealt out and ∇J is summed.

    Args:
        meta_samples: answers by prompt, as `group_samples` makes them.
        meta_step: η. With `meta_normalized` it is the length of the step, else the factor of ∇J (the paper: 5e-6).
        meta_prompts: how many prompts an ascent looks at, over all processes (the paper: 16).
        extra: see `ContrastiveRewardTrainer`; none by default.

    Raises:
        UserError: DeepSpeed, reentrant checkpointing.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        meta_samples: Sequence[SampledAnswers],
        meta_step: float = 0.01,
        meta_normalized: bool = True,
        meta_prompts: int = 16,
        extra: str | None = None,
        **arguments: Any,
    ):
        super().__init__(model, args, extra=extra, **arguments)
        check_sharding(self, stage="reward.meta")
        if self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError("reward.meta: reentrant checkpointing can't give ∇J; set use_reentrant to false.")
        if mostly_16_bits(self.model) is not None and not self.is_fsdp_enabled:
            warnings.warn(
                "reward.meta: the trained weights have 16 bits, in which the ascent's step is rounded away for most of them, so it "
                "hardly moves the model. Load them in float32; `bf16: true` computes in bfloat16 all the same.",
                stacklevel=2,
            )
        self.meta_step, self.meta_normalized, self.meta_prompts = meta_step, meta_normalized, meta_prompts
        prompts = [row["prompt"] for row in meta_samples for _ in row["responses"]]
        responses = [response for row in meta_samples for response in row["responses"]]
        ended = [is_end for row in meta_samples for is_end in row["ended"]]
        encoded, cut = encode_answers(
            self.processing_class, prompts, responses, ended=ended, max_length=self.args.max_length
        )
        if cut:
            warnings.warn(
                f"reward.meta: {cut} of {len(encoded)} samples lost the beginning of their prompt.", stacklevel=2
            )
        ids = iter(encoded)
        self.meta_groups = [[next(ids) for _ in row["responses"]] for row in meta_samples]
        self._before: list[Tensor] = []
        self.add_callback(_Restoring(self))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return all micro-batches of one optimizer step; the parameters ascend before the first of them."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.ascend()
        return batches, count

    def ascend(self) -> None:
        """Move the parameters from θ to θ' = θ + η ∇J, and keep θ for `restore`."""
        # 1. This step's prompts, dealt out over the processes.
        seed = (self.args.seed * 1_000_003 + self.state.global_step) % 2**62
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self.meta_groups), generator=generator)[: self.meta_prompts].tolist()
        of_this_process = drawn[self.accelerator.process_index :: self.accelerator.num_processes]

        # 2. J and its gradient, over all processes. A resumed Trainer restores the random state only after this.
        with torch.random.fork_rng(), self.compute_loss_context_manager():
            torch.manual_seed(seed + self.accelerator.process_index)
            gradient_of = self._sharded_gradient if self.is_fsdp_enabled else self._gradient
            gradients, spread = gradient_of([self.meta_groups[i] for i in of_this_process], len(drawn))

        # 3. θ' = θ + step. θ is kept, since θ' - step is not θ in floating point.
        norm = whole(torch.nn.utils.get_total_norm([gradient.float() for gradient in gradients])).item()
        metrics = self._metrics["train"]
        metrics["meta_spread"].append(self.accelerator.reduce(spread.detach(), reduction="sum").item())
        metrics["meta_gradient"].append(norm)
        steps = ascent(gradients, step=self.meta_step, norm=norm if self.meta_normalized else None)
        self._before = [p.detach().clone() for p in self._trained()]
        with torch.no_grad():
            for parameter, step in zip(self._trained(), steps, strict=True):
                parameter.add_(step)

    def _trained(self) -> list[nn.Parameter]:
        """Return the trained parameters as they now are: FSDP2 puts shards in their place before the first step."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _gradient(self, groups: list[list[list[int]]], total: int) -> tuple[list[Tensor], Tensor]:
        """Return ∇J for each parameter, summed over processes, and this process's part of J.

        The model is taken without its wrappers, which are not to count this backward as theirs.

        Args:
            groups: this process's prompts, each as the token rows of its answers.
            total: the number of prompts of all processes, of which J is the mean.
        """
        parameters = self._trained()
        gradients, spread = [torch.zeros_like(p) for p in parameters], torch.zeros((), device=self.args.device)
        if groups:
            spread = self._spread(groups) / total
            computed = torch.autograd.grad(spread, parameters, allow_unused=True)
            gradients = [zero if g is None else g for g, zero in zip(computed, gradients, strict=True)]
        if self.accelerator.num_processes > 1:
            gradients = [self.accelerator.reduce(g, reduction="sum") for g in gradients]
        return gradients, spread

    def _sharded_gradient(self, groups: list[list[list[int]]], total: int) -> tuple[list[Tensor], Tensor]:
        """Return what `_gradient` does, of a model that FSDP2 shards: each process's shard of ∇J.

        Only a backward reduces into shards, so one is run, and what it leaves in `grad` is taken out again. Every process
        runs one, also one that has no prompt: its own counts 0.
        """
        weight, read = (1.0, groups) if groups else (0.0, self.meta_groups[:1])
        spread = weight * self._spread(read) / total
        (spread * self.accelerator.num_processes).backward()  # FSDP2 takes the mean over processes, the sum is meant
        gradients = []
        for parameter in self._trained():
            gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return gradients, spread

    def _spread(self, groups: list[list[list[int]]]) -> Tensor:
        """Return the sum of J over some prompts, each given as the token rows of its answers."""
        collator: Any = self.data_collator
        packed = pack(groups, pad_token_id=collator.pad_token_id, long_row=collator.long_row)
        packed = type(packed)(**{name: value.to(self.args.device) for name, value in vars(packed).items()})
        inner = self.accelerator.unwrap_model(self.model)
        inner.train()
        no_pairs = torch.empty(0, 2, dtype=torch.long)
        rewards = self.score_packed(inner, packed, no_pairs).rewards
        sizes = [len(group) for group in groups]
        return torch.stack([reward_spread(part[None])[0] for part in rewards.split(sizes)]).sum()

    def restore(self) -> None:
        """Restore θ, before the optimizer steps from there."""
        with torch.no_grad():
            for parameter, before in zip(self._trained(), self._before, strict=True):
                parameter.copy_(before)
        self._before = []


class _Restoring(TrainerCallback):
    """Restores θ after the gradients were taken at θ', before the optimizer steps."""

    def __init__(self, trainer: MetaRewardTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.trainer.restore()
