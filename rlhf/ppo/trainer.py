"""`PPOTrainer`: proximal policy optimisation with a critic, on TRL's `_BaseTrainer`.

How it meets the Trainer: one rollout is one epoch of the Trainer. The training dataloader is a small object that, when
iterated, samples a rollout and yields its micro-batches, reshuffled for every PPO epoch. Accumulation, clipping,
scheduling, logging, evaluation, saving and resuming stay the Trainer's; because checkpoints fall between rollouts, a
resumed run restores the random state exactly where the next rollout begins.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, set_seed

from rlhf._trl import BaseTrainer
from rlhf.data.functions import TextFunction
from rlhf.errors import TrainingError
from rlhf.invariants.checks import CheckBook
from rlhf.models.dropout import switch_off_dropout
from rlhf.models.generate import Completions, generate
from rlhf.models.prompt_length import longest_prompt
from rlhf.models.sharding import check_sharding, whole
from rlhf.objectives.kl import kl_k2, kl_k3
from rlhf.objectives.ppo import clipped_policy, clipped_value
from rlhf.ppo.batches import EndOfRollout, RolloutBatches, update
from rlhf.ppo.checkpoint import read_checkpoint, write_checkpoint
from rlhf.ppo.checks import check_first_ratio, require_reference
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.experience import gather_experience, make_rollout
from rlhf.ppo.metrics import RolloutMetrics
from rlhf.ppo.processes import whole_roles
from rlhf.ppo.reporting import evaluate, print_samples, warn_of_trouble
from rlhf.ppo.rewards import RewardFunction, Rewards
from rlhf.ppo.roles import ROLES, PolicyAndCritic, Reference, make_reference
from rlhf.ppo.rollout import Experience, MicroBatch, PromptRow, Rollout, Sample, hash_seed, prompt_indices
from rlhf.ppo.setup import (
    check_data,
    check_opponents,
    check_parallelism,
    check_prompts,
    check_reference,
    count_rollouts,
    policy_and_tokenizer,
    read_demonstrations,
    rewards_and_critic,
    split_groups,
)
from rlhf.ppo.state import PPOState
from rlhf.ppo.vllm import VllmSampler


class PPOTrainer(BaseTrainer):
    """Train a causal model to raise a reward while staying near a reference.

    Example:
        trainer = PPOTrainer(
            model="runs/x/round-0/sft/model",
            reward_funcs="runs/x/round-1/reward/model",
            args=PPOConfig("out", total_episodes=4096),
            train_dataset=Dataset.from_list([{"prompt": "..."}]),
        )
        trainer.train()

    Args:
        model: a causal model, a PEFT model, a name or a folder. A PEFT model's own adapter is trained, and a frozen
            copy of it is the reference.
        reward_funcs: one source of rewards or a list, of the kinds in `rlhf.ppo.source_kinds`: a reward-model folder, the
            address of a reward server, `FILE.py:function`, a `RewardModel`, a one-label classifier, or a function as TRL
            calls it. Raw scores are normalised by the source's scale, weighted and added.
        args: the settings.
        train_dataset: a column `prompt` (strings, or conversations); other columns reach the reward functions.
        eval_dataset: the same, sampled and scored at each evaluation.
        processing_class: the policy's tokenizer; loaded from the model's folder where absent.
        critic: a decoder with a linear `score` head. Default: a copy of the first reward model, which must then be one.
        monitor_funcs: named functions of (prompts, completions) texts, logged and never optimised; `gold` is the true
            reward of the samples, where one is known.
        reward_processing_classes: tokenizers of reward functions that are bare models.
        callbacks, optimizers, peft_config: as in `trl.RLOOTrainer`.
        adapter_was_trained: of a PEFT model, whether its adapter holds what SFT learnt (then a frozen copy of it is the
            reference) or is fresh (then the base is). Default: a PEFT model's was, one made from `peft_config` was not.
        ptx_dataset: demonstrations (`prompt`, `completion`), for `args.ptx_coef` and `args.adversarial_coef`.

    The metrics of a rollout are explained at `rlhf.ppo.metrics.RolloutMetrics`.
    """

    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "rlhf", "ppo"]
    _name = "PPO"
    _paper = {"title": "Fine-Tuning Language Models from Human Preferences", "id": "1909.08593"}
    first_rollout = 0  # how many rollouts an earlier round took of the same prompts, in the same order

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        *,
        critic: nn.Module | None = None,
        monitor_funcs: dict[str, TextFunction] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
        adapter_was_trained: bool | None = None,
        ptx_dataset: Dataset | None = None,
    ):
        # 1. Settings and data.
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PPOConfig(f"{name.split('/')[-1]}-PPO")
        train_dataset = check_data(train_dataset)
        set_seed(args.seed)

        # 2. Policy, tokenizer and reference.
        if adapter_was_trained is None:
            adapter_was_trained = isinstance(model, PeftModel)
        conversational = not isinstance(train_dataset[0]["prompt"], str)
        model, processing_class = policy_and_tokenizer(
            model, processing_class, peft_config, args, conversational=conversational
        )
        check_prompts(processing_class, train_dataset=train_dataset, eval_dataset=eval_dataset)
        self.reference: Reference = make_reference(model, adapter_was_trained=adapter_was_trained)
        check_reference(self.reference, args)
        self.longest_prompt = longest_prompt(
            model.config, max_new_tokens=args.max_completion_length, max_prompt_length=args.max_prompt_length
        )

        # 3. Rewards and critic.
        self.monitors = dict(monitor_funcs or {})
        sources, critic, is_copy = rewards_and_critic(
            model, reward_funcs, reward_processing_classes, critic, processing_class, args
        )
        self.rewards = Rewards(sources, args)
        if self.rewards.compares:
            check_opponents(train_dataset)
        mean, std = self.rewards.scale_of_copy if is_copy else self.rewards.scale
        container = PolicyAndCritic(model, critic, value_mean=mean, value_std=std)
        if args.disable_dropout:
            for part in (container, self.reference.model):
                switch_off_dropout(part)

        # 4. Rollouts are the Trainer's epochs.
        args.num_train_epochs, args.max_steps = count_rollouts(args, len(train_dataset)), -1

        super().__init__(
            model=container,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_parallelism(args, fsdp=self.is_fsdp_enabled)
        check_sharding(self, stage="ppo")
        self.add_callback(EndOfRollout(self))
        self.demonstrations = read_demonstrations(
            ptx_dataset,
            args,
            processing_class,
            longest_prompt=self.longest_prompt,
            processes=self.accelerator.num_processes,
            shares_backbone=container.shares_backbone,
        )
        self.vllm = None
        if args.use_vllm:
            self.vllm = VllmSampler(container.policy, self.accelerator, processing_class, args)
        self.reference.model.to(self.accelerator.device)
        self.rewards.to(self.accelerator.device)

        # 5. What is counted between two logs, and every process's own random numbers.
        self.progress = PPOState(kl_coef=args.kl_coef, steps_per_rollout=args.steps_per_rollout)
        self.metrics = RolloutMetrics(self.accelerator)
        self.latest_samples: list[Sample] = []
        set_seed(hash_seed(args.seed, self.accelerator.process_index) & 0x7FFFFFFF)

    @property
    def episodes(self) -> int:
        """Return the number of answers sampled so far, over all processes."""
        return self.progress.episodes

    @property
    def stopped(self) -> str | None:
        """Return why training ended before its time, or None."""
        return self.progress.stopped

    def stop(self, reason: str) -> None:
        """End training after this rollout, for good: a checkpoint keeps it, and goes on under other rules only."""
        self.progress.stopped, self.progress.stop_rules = reason, self.args.stop_rules

    @property
    def checks(self) -> CheckBook:
        """Return what was checked so far, of a resumed run since its beginning."""
        return self.progress.checks

    # ---- Rollout ----

    def prompts_of(self, rollout: int) -> list[PromptRow]:
        """Return this process's rows of the training data for a rollout, which goes on behind `first_rollout` earlier ones."""
        size = self.args.local_rollout_size * self.accelerator.num_processes
        place = self.first_rollout + rollout
        indices = prompt_indices(len(self.train_dataset), size, seed=self.args.seed, rollout=place)
        local_indices = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        rows: list[PromptRow] = self.train_dataset.select(local_indices).to_list()
        return rows

    def sample(self, rows: Sequence[PromptRow]) -> Completions:
        """Sample one answer to each row's prompt from the current policy, by transformers or by vLLM."""
        if self.vllm is not None:
            prompts = [row["prompt"] for row in rows]
            return self.vllm(prompts, version=self.state.global_step, max_prompt_length=self.longest_prompt)
        return self.generate(self.accelerator.unwrap_model(self.model).policy, rows)

    def generate(self, model: nn.Module, rows: Sequence[PromptRow]) -> Completions:
        """Sample one answer to each row's prompt from a model, by transformers."""
        model.eval()
        return generate(
            model,
            self.processing_class,
            [row["prompt"] for row in rows],
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            max_prompt_length=self.longest_prompt,
            batch_size=self.args.generation_batch_size,
        )

    def experience(self, rows: Sequence[PromptRow]) -> Experience:
        """Sample answers to these prompts and run every role on them; no process waits for another.

        Raises:
            TrainingError: a reward or a log-probability is not finite; nothing has been updated then.
        """
        return gather_experience(self, rows)

    def rollout(self, rows: Sequence[PromptRow]) -> Rollout:
        """Return one batch of experience with an advantage for every token, whitened over all processes."""
        with whole_roles(self):
            return make_rollout(self, rows)

    # ---- Update ----

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Update policy and critic from one rollout: every optimizer step of its PPO epochs, at a constant learning rate.

        In a loop of one's own, `for i in range(n): trainer.update(trainer.rollout(trainer.prompts_of(i)))` does what `train()`
        does with `lr_scheduler_type="constant"`, and nothing is logged, evaluated or saved on the way.

        Returns:
            the metrics of this rollout, means as in the log.
        """
        return update(self, rollout)

    def get_train_dataloader(self) -> RolloutBatches:
        """Return rollouts in place of a dataset."""
        return RolloutBatches(self, self.train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[MicroBatch], device: torch.device) -> Tensor:
        none = torch.zeros((), dtype=torch.long, device=device)
        tokens = torch.stack([none, *(batch["response_mask"].sum().to(device) for batch in batch_samples)]).sum()
        return self.accelerator.gather(tokens).sum()

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """Return the roles that this optimizer step trains: the critic alone in the first `critic_warmup` rollouts."""
        is_warmup = self.state.global_step // self.args.steps_per_rollout < self.args.critic_warmup
        return ("critic",) if is_warmup else ROLES

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward of a micro-batch: of both roles at once, or of one role after the other.

        On one backbone each role's backward runs before the next adapter is switched on: with gradient checkpointing the
        recomputation would otherwise use the last one, silently. While the critic warms up, nothing of the policy has a
        gradient, so the optimizer passes over it: no weight decays, no moment and no step is counted.
        """
        container = self.accelerator.unwrap_model(self.model)
        roles = self.trained_roles
        if roles == ROLES and not container.shares_backbone:
            return super().training_step(model, inputs, num_items_in_batch)
        total = torch.zeros((), device=self.accelerator.device)
        for role in roles:
            with container.acting(role):
                total += super().training_step(container, {**inputs, "roles": (role,)}, num_items_in_batch)
        if "policy" not in roles:
            self._measure_policy(container, inputs)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1 and not self.is_fsdp_enabled:
            # The wrapper for several processes wants one backward through every parameter, so it is left out; shards reduce
            # themselves.
            for parameter in container.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return total

    @torch.no_grad()
    def _measure_policy(self, container: PolicyAndCritic, inputs: MicroBatch) -> None:
        """Count what a log says of the policy's update, of a policy that is not updated."""
        mask = inputs["response_mask"]
        with self.compute_loss_context_manager():
            outputs = container(
                inputs["input_ids"], inputs["attention_mask"], mask.shape[1], self.args.temperature, ("policy",)
            )
            self._policy_losses(outputs.logprobs, inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum the clipped policy and value losses: a mean over the answer tokens of the whole optimizer step, on all processes.

        Raises:
            TrainingError: it is not finite, or (`InvariantError`) a ratio of the rollout's first step is not 1; nothing has
                been updated by this step then.
        """
        args, mask, roles = self.args, inputs["response_mask"], inputs.get("roles", self.trained_roles)
        outputs = model(inputs["input_ids"], inputs["attention_mask"], mask.shape[1], args.temperature, roles)
        losses = torch.zeros(mask.shape, device=mask.device)
        if "policy" in roles:
            losses = losses + self._policy_losses(outputs.logprobs, inputs)
        if "critic" in roles:
            value_losses = clipped_value(
                outputs.values, inputs["values_old"], inputs["returns"], cliprange=args.cliprange_value
            )
            losses = losses + value_losses
            self.metrics.count("value_loss", torch.where(mask.bool(), value_losses.detach(), 0.0).sum(), mask.sum())
        losses = torch.where(mask.bool(), losses, torch.zeros_like(losses))
        share = self.accelerator.num_processes / num_items_in_batch
        loss = losses.sum() * share
        if self.demonstrations is not None and args.ptx_coef > 0 and "policy" in roles:
            # Mixed in by this micro-batch's share of the step's tokens, so that accumulation changes nothing in the mean.
            demonstrated = self.demonstrations.loss(self.accelerator.unwrap_model(model).policy, len(mask))
            self.metrics.count("ptx_loss", demonstrated.detach(), 1)
            loss = loss + args.ptx_coef * demonstrated * mask.sum() * share
        if not torch.isfinite(loss):
            raise TrainingError(
                f"ppo: the loss is {loss.item()} at step {self.state.global_step}; nothing was updated."
            )
        return loss

    def _policy_losses(self, logprobs: Tensor, inputs: MicroBatch) -> Tensor:
        """Return the policy's losses, unreduced [b, r], and count the numbers that describe the step."""
        args = self.args
        losses = inputs["sampler_weights"] * clipped_policy(
            logprobs,
            inputs["logprobs_old"],
            inputs["advantages"],
            cliprange=args.cliprange,
            cliprange_dual=args.cliprange_dual,
        )
        is_first = self.state.global_step % args.steps_per_rollout == 0
        if is_first:
            check_first_ratio(self, logprobs, inputs)
        self.metrics.count_update(losses, logprobs, inputs, cliprange=args.cliprange, is_first=is_first)
        if args.kl_estimator != "k1":
            penalty = (kl_k2 if args.kl_estimator == "k2" else kl_k3)(logprobs, inputs["logprobs_reference"])
            losses = losses + self.progress.kl_coef_learnt * penalty
        return losses

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW with one learning rate for the policy and another for the critic."""
        if self.optimizer is None:
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
            critic = self.accelerator.unwrap_model(self.model).role_parameters("critic")
            split_groups(optimizer, critic, self.args.learning_rate, critic_rate=self.args.critic_learning_rate)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip policy and critic apart: one norm over both would let the critic's gradient decide the policy's step."""
        container, most = self.accelerator.unwrap_model(model), self.args.max_grad_norm or math.inf
        norms = [whole(self.accelerator.clip_grad_norm_(container.role_parameters(role), most)) for role in ROLES]
        self.metrics.count("grad_norm_critic", norms[1], 1)
        return norms[0]

    # ---- Logging, evaluation, saving and resuming ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was counted since the last log."""
        if "loss" in logs:
            logs = {**logs, "episodes": self.episodes, **self.metrics.take()}
            warn_of_trouble(self, logs)
            print_samples(self)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample and score the evaluation prompts with the current policy; nothing is trained."""
        with whole_roles(self):
            means = evaluate(self, self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the policy at the root as an ordinary model, the critic under `critic/`, PPO's memory beside them.

        Where the roles are sharded, every process comes here, each with all weights.
        """
        with whole_roles(self):
            require_reference(self)
        if self.args.should_save:
            write_checkpoint(
                self, Path(output_dir or self.args.output_dir), state_dict if self.is_fsdp_enabled else None
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        read_checkpoint(self, Path(resume_from_checkpoint), self.model if model is None else model)
