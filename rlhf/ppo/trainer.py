"""`PPOTrainer`: proximal policy optimisation with a critic, on TRL's `_BaseTrainer`.

How it meets the Trainer: one rollout is one epoch of the Trainer. The training dataloader is a small object that, when
iterated, samples a rollout and yields its micro-batches, reshuffled for every PPO epoch. Accumulation, clipping,
scheduling, logging, evaluation, saving and resuming stay the Trainer's; because checkpoints fall between rollouts, a
resumed run restores the random state exactly where the next rollout begins.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    set_seed,
)

from rlhf._trl import BaseTrainer, disable_dropout_in_model, print_prompt_completions_sample
from rlhf.data.rows import Prompt
from rlhf.errors import TrainingError, UserError
from rlhf.models.batching import run_batches
from rlhf.models.generate import Completions, generate
from rlhf.models.text import check_tokenizer, plain
from rlhf.objectives.advantage import generalized_advantage, token_rewards
from rlhf.objectives.kl import kl_k1, kl_k2, kl_k3
from rlhf.objectives.masked import masked_sums, mean_and_variance, whiten
from rlhf.objectives.ppo import (
    clipped_policy,
    clipped_share,
    clipped_value,
    explained_variance,
    truncated_importance,
)
from rlhf.ppo.batches import EndOfRollout, RolloutBatches, update
from rlhf.ppo.checkpoint import read_checkpoint, write_checkpoint
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.metrics import Meter
from rlhf.ppo.ptx import Demonstrations, demonstration_loss
from rlhf.ppo.rewards import RewardFunction, Rewards
from rlhf.ppo.roles import (
    ROLES,
    PolicyAndCritic,
    Reference,
    TokenOutputs,
    make_reference,
)
from rlhf.ppo.rollout import (
    Experience,
    Rollout,
    Sample,
    hash_seed,
    prompt_indices,
    used_columns,
)
from rlhf.ppo.setup import check_reference, longest_prompt, read_demonstrations, rewards_and_critic
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
        reward_funcs: one source of rewards or a list: a reward-model folder, a `RewardModel`, a one-label classifier,
            or a function as TRL calls it. Raw scores are normalised by the source's scale, weighted and added.
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
        ptx_dataset: demonstrations (`prompt`, `completion`) that are mixed in by `args.ptx_coef`.

    Metrics of a rollout (means over its answers or answer tokens, on all processes): `episodes`; `reward_proxy`,
    the raw score; `reward_gold`; `reward`, what was optimised, before the KL; `kl`, Σ_t k1 in nats an answer, and
    `kl_k3`, the same by the estimator that is never negative (far apart means trouble); `entropy`, nats a token;
    `nll_reference`, nats a token, of which the reference's perplexity is the exponential; `sampler_difference`,
    |log π − log π_vLLM|, nats a token, where vLLM samples; `kl_coef`; `policy_loss`, `value_loss`; `clip_fraction`;
    `approx_kl`, ½ (log ratio)², nats a token; `ratio_first`, the mean ratio of the first minibatch (1 if nothing is
    wrong); `explained_variance` of the critic before its update; `distinct_2`, different pairs of neighbouring tokens
    among all; `clipped_rewards`, the share at `reward_clip`; `disagreement` of an ensemble's members, deviations of a
    score; `length`, tokens an answer; `share_without_eos`; `prompts_cut`, the share of prompts that fill all the room
    there is; `grad_norm` of the policy, `grad_norm_critic`.
    """

    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "rlhf", "ppo"]
    _name = "PPO"
    _paper = {"title": "Fine-Tuning Language Models from Human Preferences", "id": "1909.08593"}

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        critic: nn.Module | None = None,
        monitor_funcs: dict[str, Callable[[list[str], list[str]], list[float]]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        adapter_was_trained: bool | None = None,
        ptx_dataset: Dataset | None = None,
    ):
        # 1. Settings and data.
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PPOConfig(f"{name.split('/')[-1]}-PPO")
        if train_dataset is None or "prompt" not in train_dataset.column_names or len(train_dataset) == 0:
            raise UserError("ppo: train_dataset needs a column `prompt` and at least one row.")
        set_seed(args.seed)

        # 2. Policy, tokenizer and reference.
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))
        if adapter_was_trained is None:
            adapter_was_trained = isinstance(model, PeftModel)
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise UserError("ppo: the model has an adapter already, which PPO will train; drop peft_config.")
            model = get_peft_model(model, peft_config)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        conversational = not isinstance(train_dataset[0]["prompt"], str)
        check_tokenizer(processing_class, conversational=conversational, name="ppo")
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        self.reference: Reference = make_reference(model, adapter_was_trained=adapter_was_trained)
        check_reference(self.reference, args)
        self.longest_prompt = longest_prompt(model, args)

        # 3. Rewards and critic.
        self.monitors = dict(monitor_funcs or {})
        sources, critic = rewards_and_critic(
            model, reward_funcs, reward_processing_classes, critic, processing_class, args
        )
        self.rewards = Rewards(sources, args)
        mean, std = self.rewards.scale
        container = PolicyAndCritic(model, critic, value_mean=mean, value_std=std)
        if args.disable_dropout:
            for part in (container, self.reference.model):
                disable_dropout_in_model(part)

        # 4. Rollouts are the Trainer's epochs.
        episodes = args.total_episodes or int(args.num_train_epochs * len(train_dataset))
        args.num_train_epochs = max(1, round(episodes / (args.local_rollout_size * args.world_size)))
        args.max_steps = -1

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
        if args.n_gpu > 1:
            raise UserError(
                "ppo: several GPUs are visible to one process; launch with `torchrun` or `accelerate launch`."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                "ppo: FSDP and DeepSpeed are not supported; use data parallelism (`torchrun`), LoRA and 4-bit weights."
            )
        self.add_callback(EndOfRollout(self))
        self.demonstrations: Demonstrations | None = None
        if args.ptx_coef > 0:
            self.demonstrations = read_demonstrations(
                ptx_dataset,
                args,
                processing_class,
                processes=self.accelerator.num_processes,
                shares_backbone=container.shares_backbone,
            )
        self.vllm = None
        if args.use_vllm:
            self.vllm = VllmSampler(container.policy, self.accelerator, processing_class, args)
        self.reference.model.to(self.accelerator.device)
        self.rewards.to(self.accelerator.device)

        # 5. What is counted between two logs, and every process's own random numbers.
        self.progress = PPOState(kl_coef=args.kl_coef)
        self.meter = Meter(self.accelerator)
        self.latest_samples: list[Sample] = []
        self.stopped: str | None = None  # why training ended before its time
        set_seed(hash_seed(args.seed, self.accelerator.process_index) & 0x7FFFFFFF)

    @property
    def episodes(self) -> int:
        """Answers sampled so far, over all processes."""
        return self.progress.episodes

    # ---- Rollout ----

    def prompts_of(self, rollout: int) -> list[dict[str, Any]]:
        """This process's rows of the training data for a rollout."""
        size = self.args.local_rollout_size * self.accelerator.num_processes
        indices = prompt_indices(len(self.train_dataset), size, seed=self.args.seed, rollout=rollout)
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        return self.train_dataset.select(mine).to_list()

    def sample(self, rows: Sequence[dict[str, Any]]) -> Completions:
        """One answer to each row's prompt from the current policy, by transformers or by vLLM."""
        if self.vllm is not None:
            prompts = [row["prompt"] for row in rows]
            return self.vllm(prompts, version=self.state.global_step, max_prompt_length=self.longest_prompt)
        return self._generate(self.accelerator.unwrap_model(self.model).policy, rows)

    def _generate(self, model: Any, rows: Sequence[dict[str, Any]]) -> Completions:
        model.eval()
        return generate(
            model,
            self.processing_class,
            [row["prompt"] for row in rows],
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            max_prompt_length=self.longest_prompt,
        )

    def baseline(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        """What the reference's own answers to these prompts score, [b]: the mean of `baseline_samples` fresh ones each.

        Subtracted from the reward (contrastive reward, arXiv:2403.07708): a prompt whose answers all score high teaches no
        more than another.
        """
        repeated = [row for row in rows for _ in range(self.args.baseline_samples)]
        with self.reference.acting() as model:
            completions = self._generate(model, repeated)
        return self.rewards(repeated, completions).total.view(len(rows), -1).mean(dim=1)

    @torch.no_grad()
    def experience(self, rows: Sequence[dict[str, Any]]) -> Experience:
        """Sample answers to these prompts and let every role say what it thinks of them. No process waits for another.

        Raises:
            TrainingError: a reward or a log-probability is not finite; nothing has been updated then.
        """
        # 1. Sample answers and score them; text crosses to the reward functions, never ids.
        prompts = [row["prompt"] for row in rows]
        completions = self.sample(rows)
        raw, scores, dense, disagreement = self.rewards(rows, completions)
        if self.args.baseline_samples > 0:
            scores = scores - self.baseline(rows)

        # 2. Log-probabilities and values by a full forward of the trained roles (not from the decoding pass: the
        #    ratio of the first minibatch must be 1), and of the reference.
        input_ids = torch.cat([completions.prompt_ids, completions.response_ids], dim=1)
        attention_mask = torch.cat([completions.prompt_mask, completions.response_mask], dim=1)
        mask = completions.response_mask
        outputs, logprobs_reference = self._forward_in_parts(input_ids, attention_mask, mask)
        kl = kl_k1(outputs.logprobs, logprobs_reference)
        if not torch.isfinite(kl[mask.bool()]).all():
            raise TrainingError(
                "ppo: a log-probability of the policy or the reference is not finite; nothing was updated.",
                rows=[{"prompt": p, "completion": text} for p, text in zip(prompts, completions.texts, strict=True)],
            )

        weights = torch.ones_like(kl)
        if completions.logprobs_sampler is not None:
            limit = self.args.vllm_importance_sampling_clip_max
            weights = truncated_importance(outputs.logprobs, completions.logprobs_sampler, limit=limit)
        seen = Experience(
            input_ids, attention_mask, mask, scores, dense, completions.ended, kl, outputs, logprobs_reference, weights
        )

        # 3. Numbers and samples for people.
        monitored = self.monitor(prompts, completions.texts)
        clip, everywhere = self.args.reward_clip, torch.ones_like(completions.ended)
        self.meter.count_experience(
            seen,
            completions,
            raw=raw,
            shaped=self.shaped(scores, completions.ended),
            at_clip=None if clip is None else self.shaped(scores, everywhere).abs() >= clip,
            disagreement=disagreement,
            longest_prompt=self.longest_prompt,
            monitored=monitored,
        )
        kl_sequence = torch.where(mask.bool(), kl, torch.zeros_like(kl)).sum(dim=1)
        gold: Sequence[float | None] = monitored.get("gold", [None] * len(rows))
        columns = (prompts, completions.texts, raw.tolist(), gold, kl_sequence.tolist(), completions.ended.tolist())
        self.latest_samples = [Sample(*values) for values in zip(*columns, strict=True)]
        return seen

    def _or_all_stop(self, procedure: Callable[..., Any], *arguments: Any) -> Any:
        """What a procedure returns; where it fails on one process, all of them stop here instead of waiting for that one."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = procedure(*arguments)
        except Exception as error:  # raised again, below
            failure = error
        failed = self.accelerator.reduce(
            torch.tensor(float(failure is not None), device=self.accelerator.device), reduction="sum"
        )
        if failure is not None:
            raise failure
        if failed > 0:
            raise TrainingError("ppo: another process stopped (its error says why); nothing was updated.")
        return result

    @torch.no_grad()
    def rollout(self, rows: Sequence[dict[str, Any]]) -> Rollout:
        """One batch of experience with an advantage for every token, whitened over all processes."""
        # 1. Experience, with a reference that has followed so far; the history of rewards grows by it before it is used.
        if self.args.reference_mixup > 0 and self.episodes > 0:
            self.reference.approach(self.accelerator.unwrap_model(self.model).policy, self.args.reference_mixup)
        seen = self._or_all_stop(self.experience, rows)
        mask, values = seen.response_mask, seen.outputs.values
        if self.args.running_reward_norm:
            count, center, spread = self._moments(seen.scores)
            self.progress.see_rewards(count, center, spread * count)

        # 2. A reward for every token: the score at the answer's last one, what sources said of single tokens, the KL.
        scores = self.shaped(seen.scores, seen.ended)
        kl_coef = self.progress.kl_coef if self.args.kl_estimator == "k1" else 0.0
        rewards = token_rewards(scores, seen.kl, mask, kl_coef=kl_coef) + seen.dense

        # 3. Advantages, whitened over all processes.
        advantages, returns = generalized_advantage(rewards, values, mask, gamma=self.args.gamma, lam=self.args.lam)
        returns_variance = mean_and_variance(self._sum_over_processes(masked_sums(returns, mask)))[1]
        residual_variance = mean_and_variance(self._sum_over_processes(masked_sums(returns - values, mask)))[1]
        self.meter.count("explained_variance", explained_variance(returns_variance, residual_variance), 1)
        if self.args.whiten_advantages:
            mean, variance = mean_and_variance(self._sum_over_processes(masked_sums(advantages, mask)))
            advantages = whiten(advantages, mask, mean=mean, variance=variance)
        self._end_of_sampling(seen)
        return Rollout(
            seen.input_ids,
            seen.attention_mask,
            mask,
            seen.outputs.logprobs,
            seen.logprobs_reference,
            values,
            advantages,
            returns,
            seen.sampler_weights,
        )

    def shaped(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Scores as they are optimised, [b]: normalised by their history where asked for, clipped, end penalty applied."""
        if self.args.running_reward_norm:
            mean, std = self.progress.reward_scale
            scores = (scores - mean) / std
        if self.args.reward_clip is not None:
            scores = scores.clamp(-self.args.reward_clip, self.args.reward_clip)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * (~ended).to(scores.dtype)
        return scores

    def _moments(self, values: Tensor) -> tuple[float, float, float]:
        """Number, mean and variance (1/n) of a vector over all processes."""
        ones = torch.ones_like(values)
        sums = self._sum_over_processes(masked_sums(values, ones))
        mean, variance = mean_and_variance(sums)
        count = self._sum_over_processes(ones.sum())
        return count.item(), mean.item(), variance.item()

    def _end_of_sampling(self, seen: Experience) -> None:
        """Count the episodes, and let the KL of this rollout decide the coefficient of the next, or the end."""
        args, mask = self.args, seen.response_mask
        count, kl, _ = self._moments(torch.where(mask.bool(), seen.kl, torch.zeros_like(seen.kl)).sum(dim=1))
        self.progress.episodes += int(count)
        self.meter.count("kl_coef", self.progress.kl_coef, 1)
        if args.kl_target is not None:
            self.progress.adapt(kl, target=args.kl_target, horizon=args.kl_horizon, episodes=int(count))
        if args.kl_limit is not None and kl > args.kl_limit:
            self.stopped = (
                f"ppo: stopped after {self.episodes} episodes: the KL, {kl:.1f} nats an answer, is over "
                f"kl_limit={args.kl_limit:g}."
            )
            if self.accelerator.is_main_process:
                warnings.warn(self.stopped, stacklevel=2)

    def monitor(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, list[float]]:
        """What the monitoring functions say of these answers."""
        readable = [plain(prompt) for prompt in prompts]
        return {name: [float(x) for x in function(readable, list(texts))] for name, function in self.monitors.items()}

    def _forward_in_parts(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> tuple[TokenOutputs, Tensor]:
        """What policy, critic and reference say, [b, r] each; rows of like length together, so that little is padding."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()

        def forward(rows: list[int]) -> Iterator[tuple[Tensor, ...]]:
            prompt, answer = used_columns(attention_mask[rows], mask[rows])
            ids, attention = (x[rows, prompt.start : answer.stop] for x in (input_ids, attention_mask))
            width = answer.stop - prompt.stop
            with self.accelerator.autocast():
                outputs = model(ids, attention, width, self.args.temperature)
                reference = self.reference.logprobs(ids, attention, width, self.args.temperature)
            return zip(*(nn.functional.pad(x, (0, mask.shape[1] - width)) for x in (*outputs, reference)), strict=True)

        # Not batches_by_length: torch puts rows of one length in another order, and sums depend on who meets in a batch.
        order = attention_mask.sum(dim=1).argsort()
        batches = [rows.tolist() for rows in order.split(self.args.per_device_train_batch_size)]
        *outputs, reference = (torch.stack(column) for column in zip(*run_batches(forward, batches), strict=True))
        return TokenOutputs(*outputs), reference

    # ---- Update ----

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from one rollout: every optimizer step of its PPO epochs, at a constant learning rate.

        For loops of one's own: `for i in range(n): trainer.update(trainer.rollout(trainer.prompts_of(i)))` does what `train()`
        does with `lr_scheduler_type="constant"`, and nothing is logged, evaluated or saved on the way.

        Returns:
            the metrics of this rollout, means as in the log.
        """
        return update(self, rollout)

    def get_train_dataloader(self) -> Any:
        """Rollouts in place of a dataset."""
        return RolloutBatches(self, self.train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        tokens = torch.stack([batch["response_mask"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(tokens).sum()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch: of both roles at once, or, on one backbone, of one after the other.

        There each role's backward runs before the next adapter is switched on: with gradient checkpointing the
        recomputation would otherwise use the last one, silently.
        """
        container = self.accelerator.unwrap_model(self.model)
        if not container.shares_backbone:
            return super().training_step(model, inputs, num_items_in_batch)
        total = torch.zeros((), device=self.accelerator.device)
        for role in ROLES:
            with container.acting(role):
                total += super().training_step(container, {**inputs, "roles": (role,)}, num_items_in_batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            # The wrapper for several processes reduces after one backward; here there are two, so it is left out.
            for parameter in container.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return total

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Clipped policy and value losses: a mean over the answer tokens of the whole optimizer step, on all processes."""
        args, mask, roles = self.args, inputs["response_mask"], inputs.get("roles", ROLES)
        outputs = model(inputs["input_ids"], inputs["attention_mask"], mask.shape[1], args.temperature, roles)
        losses = torch.zeros(mask.shape, device=mask.device)
        if "policy" in roles:
            losses = losses + self._policy_losses(outputs.logprobs, inputs)
        if "critic" in roles:
            value_losses = clipped_value(
                outputs.values, inputs["values_old"], inputs["returns"], cliprange=args.cliprange_value
            )
            losses = losses + value_losses
            self.meter.count("value_loss", torch.where(mask.bool(), value_losses.detach(), 0.0).sum(), mask.sum())
        losses = torch.where(mask.bool(), losses, torch.zeros_like(losses))
        share = self.accelerator.num_processes / num_items_in_batch
        loss = losses.sum() * share
        if self.demonstrations is not None and "policy" in roles:
            # Mixed in by this micro-batch's share of the step's tokens, so that accumulation changes nothing in the mean.
            ids, is_completion = self.demonstrations.draw(len(mask), mask.device)
            policy = self.accelerator.unwrap_model(model).policy
            demonstrated = demonstration_loss(policy, ids, is_completion)
            self.meter.count("ptx_loss", demonstrated.detach(), 1)
            loss = loss + args.ptx_coef * demonstrated * mask.sum() * share
        if not torch.isfinite(loss):
            raise TrainingError(
                f"ppo: the loss is {loss.item()} at step {self.state.global_step}; nothing was updated."
            )
        return loss

    def _policy_losses(self, logprobs: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Unreduced [b, r], and the numbers that describe the step."""
        args, mask, logprobs_old = self.args, inputs["response_mask"], inputs["logprobs_old"]
        losses = clipped_policy(
            logprobs, logprobs_old, inputs["advantages"], cliprange=args.cliprange, cliprange_dual=args.cliprange_dual
        )
        losses = losses * inputs["sampler_weights"]
        with torch.no_grad():
            keep = mask.to(losses.dtype)
            log_ratio, tokens = (logprobs - logprobs_old) * keep, keep.sum()
            self.meter.count("policy_loss", (losses * keep).sum(), tokens)
            self.meter.count("approx_kl", 0.5 * (log_ratio**2).sum(), tokens)
            clipped = clipped_share(logprobs, logprobs_old, cliprange=args.cliprange)
            self.meter.count("clip_fraction", (clipped * keep).sum(), tokens)
            if self.state.global_step % args.steps_per_rollout == 0:
                self.meter.count("ratio_first", (log_ratio.exp() * keep).sum(), tokens)
        if args.kl_estimator != "k1":
            penalty = (kl_k2 if args.kl_estimator == "k2" else kl_k3)(logprobs, inputs["logprobs_reference"])
            losses = losses + self.progress.kl_coef * penalty
        if self.state.global_step // args.steps_per_rollout < args.critic_warmup:
            losses = 0.0 * losses  # the critic learns first what the policy is worth
        return losses

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with one learning rate for the policy and another for the critic."""
        if self.optimizer is None:
            optimizer: Any = super().create_optimizer(model)
            critic = {id(p) for p in self.accelerator.unwrap_model(self.model).role_parameters("critic")}
            groups = []
            for group in optimizer.param_groups:
                for is_critic, rate in ((False, self.args.learning_rate), (True, self.args.critic_learning_rate)):
                    chosen = [p for p in group["params"] if (id(p) in critic) == is_critic]
                    if chosen:
                        groups.append({**group, "params": chosen, "lr": rate})
            optimizer.param_groups.clear()
            for group in groups:
                optimizer.add_param_group(group)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip policy and critic apart: one norm over both would let the critic's gradient decide the policy's step."""
        container = self.accelerator.unwrap_model(model)
        norms = [
            self.accelerator.clip_grad_norm_(container.role_parameters(role), self.args.max_grad_norm) for role in ROLES
        ]
        self.meter.count("grad_norm_critic", norms[1], 1)
        return norms[0]

    # ---- Logging and evaluation ----

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was counted since the last log."""
        if "loss" in logs:
            logs = {**logs, "episodes": self.episodes, **self.meter.take()}
            for sentence in self.progress.health.look(logs):  # the same on every process
                if self.args.stop_when_unhealthy:
                    self.stopped = self.stopped or sentence
                    self.control.should_save = self.control.should_training_stop = True
                if self.accelerator.is_main_process:
                    warnings.warn(sentence, stacklevel=2)
            if self.args.num_completions_to_print and self.accelerator.is_main_process:
                shown = self.latest_samples[: self.args.num_completions_to_print]
                print_prompt_completions_sample(
                    [plain(s.prompt) for s in shown],
                    [s.completion for s in shown],
                    {"proxy": [s.proxy for s in shown]},
                    [s.kl for s in shown],
                    self.state.global_step,
                )
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample and score the evaluation prompts with the current policy; nothing is trained."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise UserError("ppo: evaluation was asked for but there is no eval_dataset.")
        if len(dataset) < self.accelerator.num_processes:
            raise UserError(
                f"ppo: {len(dataset)} evaluation prompts for {self.accelerator.num_processes} processes; give one to each."
            )
        kept_meter, kept_samples = self.meter, self.latest_samples
        self.meter = Meter(self.accelerator)
        rank, world, size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.args.per_device_eval_batch_size,
        )
        mine = list(range(len(dataset)))[rank::world]
        for start in range(0, len(mine), size):
            self.experience(dataset.select(mine[start : start + size]).to_list())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.meter.take().items()}
        self.meter, self.latest_samples = kept_meter, kept_samples
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Saving and resuming ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy at the root as an ordinary model, the critic under `critic/`, what PPO remembers beside them."""
        write_checkpoint(self, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_checkpoint(self, Path(resume_from_checkpoint), self.model if model is None else model)
