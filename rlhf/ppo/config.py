"""The settings of PPO: TRL's training arguments with the values that PPO needs, and PPO's own."""

from dataclasses import dataclass, field
from math import ceil
from typing import Any

from rlhf._trl import BaseConfig


@dataclass
class PPOConfig(BaseConfig):
    """Configuration of `PPOTrainer`; every argument of `transformers.TrainingArguments` is one too.

    One rollout is `per_device_train_batch_size` x `gradient_accumulation_steps` x `num_mini_batches` episodes a
    process. It is used for `num_ppo_epochs` passes of `num_mini_batches` optimizer steps each. To the Trainer, one
    rollout is one epoch: `logging_strategy`, `save_strategy` and `eval_strategy` of "epoch" mean "rollout", and
    step-based ones are moved to the end of the rollout in which they fall.

    Different from `TrainingArguments`: learning_rate 3e-6, adam_epsilon 1e-5, adam_beta2 0.95, logging_strategy
    "epoch", remove_unused_columns False (TRL PPO 1.12 and Huang et al. 2023).
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Policy learning rate; 1e-5 to 5e-5 with LoRA."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "1e-8 is far more aggressive early (N details, 19)."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second-moment decay of AdamW."})
    logging_strategy: str = field(default="epoch", metadata={"help": "'epoch' is one row a rollout."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Reward functions may read any column."})

    # Length and sampling
    total_episodes: int | None = field(
        default=None, metadata={"help": "Answers sampled in all; None: num_train_epochs passes over the prompts."}
    )
    max_prompt_length: int | None = field(default=512, metadata={"help": "Longer prompts lose their beginning."})
    max_completion_length: int = field(default=256, metadata={"help": "Answers are cut after this many tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of every log-probability."})
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Answers that transformers samples together on a process; None: all of its rollout."},
    )

    use_vllm: bool = field(
        default=False, metadata={"help": "Sample with vLLM; how to install it: recipes/guides/ppo.md."}
    )
    vllm_mode: str = field(
        default="colocate", metadata={"help": "colocate: in this process; server: `trl vllm-serve`."}
    )
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Where the server is."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU for a colocated engine."}
    )
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Its context; None: the model's."})
    vllm_importance_sampling_clip_max: float = field(
        default=2.0, metadata={"help": "Bound on a token's weight π / π_vLLM."}
    )

    # The algorithm
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout, reshuffled every time."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in each pass."})
    critic_learning_rate: float | None = field(default=None, metadata={"help": "None: 3 x learning_rate."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "λ of generalised advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "ε of the policy clip."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "Value clip, normalised score units; None: off."}
    )
    cliprange_dual: float | None = field(
        default=None,
        metadata={
            "help": "Bound on the loss of a token of negative advantage, in advantages; the usual value is 3; None: off."
        },
    )
    critic_warmup: int = field(
        default=0,
        metadata={"help": "First rollouts that train the critic alone; no demonstration is drawn in them either."},
    )
    calibrate_values: bool = field(
        default=False,
        metadata={"help": "Make advantages of values on the line that takes them nearest to the rollout's returns."},
    )
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of demonstrations' loss (PPO-ptx); 0: none."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Over the rollout, over all processes."})

    # The reward
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference."})
    kl_estimator: str = field(default="k1", metadata={"help": "k1: inside the reward, per token. k2, k3: in the loss."})
    kl_target: float | None = field(
        default=None, metadata={"help": "Nats an answer that kl_coef adapts towards; None: kl_coef stays."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes in which kl_coef may change by a fifth."})
    kl_limit: float | None = field(
        default=None, metadata={"help": "Stop, with a checkpoint, where a rollout's KL is above this; nats an answer."}
    )
    reference_mixup: float = field(
        default=0.0, metadata={"help": "Share of the policy mixed into the reference before each rollout; 0: it stays."}
    )
    missing_eos_penalty: float | None = field(
        default=1.0, metadata={"help": "Taken from the normalised score of an answer that did not end."}
    )
    normalize_reward: bool = field(
        default=True, metadata={"help": "By the reward model's mean and deviation on SFT samples, where it has them."}
    )
    running_reward_norm: bool = field(
        default=False, metadata={"help": "Also by mean and deviation of all rewards so far (PPO-max)."}
    )
    reward_ensemble: str | None = field(
        default=None,
        metadata={"help": "mean, worst, uncertainty, soft_min over the sources; None: their weighted sum."},
    )
    reward_ensemble_strength: float = field(default=0.5, metadata={"help": "λ of uncertainty, b of soft_min."})
    baseline_samples: int = field(
        default=0,
        metadata={"help": "Answers of the reference a prompt, whose mean score is subtracted (contrastive reward)."},
    )
    shaping_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of shaping by the first reward model's scores of an answer's beginnings; 0: none."},
    )
    shaping_tokens: int = field(default=8, metadata={"help": "Tokens from one such beginning to the next."})
    self_certainty_coef: float = field(
        default=0.0, metadata={"help": "Weight of an answer's mean KL of the uniform distribution from the policy's."}
    )
    novelty_coef: float = field(
        default=0.0, metadata={"help": "Weight of an answer's mean surprise to the reference, -log π_ref."}
    )
    adversarial_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the log-odds that an answer is a demonstration, by a discriminator of each rollout."
        },
    )
    reward_clip: float | None = field(
        default=5.0, metadata={"help": "Bound on an answer's score, not on single tokens'; None: off."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One a reward function; None: all 1."})

    # Models
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "For `from_pretrained`, where `model` is a name."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Ratios and rewards are noise with it on."})

    # What a person sees
    stop_when_unhealthy: bool = field(
        default=False,
        metadata={"help": "End training, with a checkpoint, at the first thing the monitor worries about."},
    )
    num_completions_to_print: int | None = field(default=0, metadata={"help": "Samples shown at each log; 0: none."})

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = (
            "max_completion_length",
            "temperature",
            "num_ppo_epochs",
            "num_mini_batches",
            "kl_target",
            "kl_limit",
            "shaping_tokens",
            "generation_batch_size",
        )
        for name in (*positive, "kl_horizon", "reward_ensemble_strength"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("gamma", "lam", "reference_mixup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1].")
        if not 0 < self.cliprange < 1:
            raise ValueError(f"cliprange={self.cliprange} must lie in (0, 1).")
        not_negative = ("shaping_coef", "self_certainty_coef", "novelty_coef", "adversarial_coef")
        for name in ("kl_coef", "ptx_coef", "baseline_samples", *not_negative):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name, allowed in (
            ("kl_estimator", ("k1", "k2", "k3")),
            ("vllm_mode", ("colocate", "server")),
            ("reward_ensemble", (None, "mean", "worst", "uncertainty", "soft_min")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(str, allowed))}.")
        if self.vllm_importance_sampling_clip_max < 1:
            raise ValueError(
                f"vllm_importance_sampling_clip_max={self.vllm_importance_sampling_clip_max} must be 1 or more."
            )
        if self.cliprange_dual is not None and self.cliprange_dual <= 1:
            raise ValueError(f"cliprange_dual={self.cliprange_dual} must be above 1.")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target adapts kl_coef, which must start above 0.")
        if self.reward_ensemble is not None and self.reward_weights is not None:
            raise ValueError("reward_weights are for a weighted sum; with reward_ensemble leave them out.")
        if self.critic_learning_rate is None:
            self.critic_learning_rate = 3 * self.learning_rate
        self._refuse_what_rollouts_have_not()

    def check_warmup(self, rollouts: int) -> None:
        """Refuse a warm-up of the critic that lasts as long as training.

        Raises:
            ValueError: in so many rollouts the policy would never be trained.
        """
        if self.critic_warmup >= rollouts:
            raise ValueError(
                f"critic_warmup={self.critic_warmup} is no less than the {rollouts} rollouts of the run, so the policy would never "
                "be trained; lower it, or raise total_episodes."
            )

    def _refuse_what_rollouts_have_not(self) -> None:
        """Refuse arguments of the Trainer that would be ignored, or end in an error when training begins."""
        if self.auto_find_batch_size or self.load_best_model_at_end:
            raise ValueError(
                "auto_find_batch_size and load_best_model_at_end do not work with rollouts; leave them off."
            )
        if self.fp16:
            raise ValueError("fp16 scales and clips all gradients as one, and PPO clips two roles apart; set bf16.")
        if self.neftune_noise_alpha is not None or self.label_smoothing_factor > 0:
            raise ValueError("neftune_noise_alpha and label_smoothing_factor are for demonstrations; leave them out.")
        if self.max_steps > 0:
            raise ValueError(f"max_steps={self.max_steps}: PPO counts answers; give total_episodes in its place.")
        if self.stop_when_unhealthy and self.logging_strategy == "no":
            raise ValueError(
                "stop_when_unhealthy looks at what is logged; logging_strategy='no' leaves nothing to look at."
            )
        if self.total_episodes is not None:
            self.check_warmup(self.rollouts(0, self.world_size))

    @property
    def reads_demonstrations(self) -> bool:
        """Tell whether demonstrations are mixed in, or answers told apart from them."""
        return self.ptx_coef > 0 or self.adversarial_coef > 0

    @property
    def stop_rules(self) -> dict[str, float | bool | None]:
        """Return the settings under which training may end before its time."""
        return {"kl_limit": self.kl_limit, "stop_when_unhealthy": self.stop_when_unhealthy}

    @property
    def local_rollout_size(self) -> int:
        """Return the number of episodes that a process samples for one rollout."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    def rollouts(self, prompts: int, processes: int) -> int:
        """Return how many rollouts training makes: as many as hold all the answers that are asked for."""
        episodes = self.total_episodes or int(self.num_train_epochs * prompts)
        return max(1, ceil(episodes / (self.local_rollout_size * processes)))

    @property
    def steps_per_rollout(self) -> int:
        """Return the number of optimizer steps made with one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches
