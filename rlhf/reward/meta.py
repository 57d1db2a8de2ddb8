"""`MetaRewardTrainer`: MetaRM (arXiv:2405.00438), which keeps a reward model telling apart what the policy now answers.

Before each optimizer step the parameters climb from θ to θ' on the difference loss J of unlabelled answers of the present
policy; the preference loss takes its gradient at θ'; the optimizer applies it to θ.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from rlhf.data.rows import Prompt
from rlhf.errors import UserError
from rlhf.models.packing import pack
from rlhf.models.text import encode_answers
from rlhf.objectives.meta import ascent, reward_spread
from rlhf.reward.contrastive import ContrastiveRewardTrainer

Rows = list[dict[str, Any]]


def group_samples(rows: Sequence[dict[str, Any]]) -> tuple[Rows, dict[str, int]]:
    """Answers of a stage's `samples.jsonl` gathered by prompt, and how many prompts were left out and why.

    Args:
        rows: `prompt`, `completion`, and whether it `ended`; one row an answer.

    Returns:
        rows of `prompt`, `responses` and `ended`, two different responses at least.

    Raises:
        UserError: a row is no text; no prompt has two different answers.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row.get("completion"), str) or not row.get("prompt"):
            raise UserError(
                f"meta samples: row {number} has no 'prompt' and 'completion' as text; ids of another tokenizer can't be read."
            )
        entry = found.setdefault(repr(row["prompt"]), {"prompt": row["prompt"], "responses": [], "ended": []})
        entry["responses"].append(row["completion"])
        entry["ended"].append(bool(row.get("ended", True)))
    kept, dropped = [], {"a single response": 0, "identical responses": 0}
    for entry in found.values():
        if len(entry["responses"]) == 1:
            dropped["a single response"] += 1
        elif len(set(entry["responses"])) == 1:
            dropped["identical responses"] += 1
        else:
            kept.append(entry)
    if not kept:
        said = ", ".join(f"{count} with {reason}" for reason, count in dropped.items() if count)
        raise UserError(
            f"meta samples: of {len(found)} prompts none has two different responses ({said or 'no rows'}); sample several "
            "per prompt."
        )
    return kept, {reason: count for reason, count in dropped.items() if count}


class MetaRewardTrainer(ContrastiveRewardTrainer):
    """Any pair loss and any contrastive term, with MetaRM's extra step (arXiv:2405.00438 algorithm 1, first order).

    One θ' per optimizer step, whatever the accumulation: all micro-batches take their gradient there. The ascent draws
    its prompts from (seed, step) and leaves the random state as it found it, so a step of 0 is the plain trainer bit for
    bit, and a resumed run goes on exactly. Over several processes the prompts are dealt out and ∇J is summed.

    Args:
        meta_samples: `prompt`, `responses` and `ended`, as `group_samples` makes them.
        meta_step: η. With `meta_normalized` the length of the step, else the factor of ∇J (the paper: 5e-6).
        meta_prompts: how many prompts an ascent looks at, over all processes (the paper: 16).
        extra: see `ContrastiveRewardTrainer`; none by default.

    Raises:
        UserError: sharded parameters (FSDP, DeepSpeed), reentrant checkpointing.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        meta_samples: Rows,
        meta_step: float = 0.01,
        meta_normalized: bool = True,
        meta_prompts: int = 16,
        extra: str | None = None,
        **arguments: Any,
    ):
        super().__init__(model, args, extra=extra, **arguments)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                "reward.meta: the ascent needs whole parameters, not FSDP's or DeepSpeed's shards; use DDP."
            )
        if self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError("reward.meta: reentrant checkpointing can't give ∇J; set use_reentrant to false.")
        self.meta_step, self.meta_normalized, self.meta_prompts = meta_step, meta_normalized, meta_prompts
        tokenizer: Any = self.processing_class
        prompts: list[Prompt] = [row["prompt"] for row in meta_samples for _ in row["responses"]]
        responses = [response for row in meta_samples for response in row["responses"]]
        ended = [end for row in meta_samples for end in row["ended"]]
        encoded, cut = encode_answers(tokenizer, prompts, responses, ended=ended, max_length=self.args.max_length)
        if cut:
            warnings.warn(
                f"reward.meta: {cut} of {len(encoded)} samples lost the beginning of their prompt.", stacklevel=2
            )
        ids = iter(encoded)
        self.meta_groups = [[next(ids) for _ in row["responses"]] for row in meta_samples]
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._before: list[Tensor] = []
        self.add_callback(_Return(self))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """All micro-batches of one optimizer step; the parameters climb before the first of them."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._climb()
        return batches, count

    def _climb(self) -> None:
        # 1. This step's prompts, dealt out over the processes.
        seed = (self.args.seed * 1_000_003 + self.state.global_step) % 2**62
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self.meta_groups), generator=generator)[: self.meta_prompts].tolist()
        mine = drawn[self.accelerator.process_index :: self.accelerator.num_processes]

        # 2. J and its gradient, on the model without wrappers: they are not to count this backward as theirs.
        gradients, spread = [torch.zeros_like(p) for p in self._parameters], torch.zeros((), device=self.args.device)
        if mine:
            with torch.random.fork_rng(), self.compute_loss_context_manager():
                # A resumed Trainer restores the random state only after this.
                torch.manual_seed(seed + self.accelerator.process_index)
                spread = self._spread([self.meta_groups[i] for i in mine]) / len(drawn)
                found = torch.autograd.grad(spread, self._parameters, allow_unused=True)
            gradients = [z if g is None else g for g, z in zip(found, gradients, strict=True)]
        if self.accelerator.num_processes > 1:
            gradients = [self.accelerator.reduce(g, reduction="sum") for g in gradients]
            spread = self.accelerator.reduce(spread.detach(), reduction="sum")

        # 3. θ' = θ + step. What was there is kept, since θ' - step is not θ in floating point.
        norm = torch.nn.utils.get_total_norm(gradients).item()
        metrics = self._metrics["train"]
        metrics["meta_spread"].append(spread.item())
        metrics["meta_gradient"].append(norm)
        steps = ascent(gradients, step=self.meta_step, normalized=self.meta_normalized)
        self._before = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for parameter, step in zip(self._parameters, steps, strict=True):
                parameter.add_(step)

    def _spread(self, groups: list[list[list[int]]]) -> Tensor:
        """The sum of J over some prompts."""
        collator: Any = self.data_collator
        packed = pack(groups, pad_token_id=collator.pad_token_id, long_row=collator.long_row)
        packed = type(packed)(**{name: value.to(self.args.device) for name, value in vars(packed).items()})
        inner = self.accelerator.unwrap_model(self.model)
        inner.train()
        no_pairs = torch.empty(0, 2, dtype=torch.long)
        rewards = self.score_packed(inner, packed, no_pairs).rewards
        sizes = [len(group) for group in groups]
        return torch.stack([reward_spread(part[None])[0] for part in rewards.split(sizes)]).sum()

    def come_back(self) -> None:
        """θ again, before the optimizer steps from there."""
        with torch.no_grad():
            for parameter, before in zip(self._parameters, self._before, strict=True):
                parameter.copy_(before)
        self._before = []


class _Return(TrainerCallback):
    def __init__(self, trainer: MetaRewardTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.come_back()
