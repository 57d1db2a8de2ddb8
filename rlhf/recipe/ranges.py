"""Which numbers a key of TRL, or of a model built from nothing, may have: outside its range a key stops a run or is meaningless.

Keys of ours have their ranges in `rlhf.recipe.schema`. A test requires a range of every numeric key that a recipe may set.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Attributes:
        low, high: its ends.
        has_low, has_high: whether an end belongs to it.
    """

    low: float
    high: float = math.inf
    has_low: bool = True
    has_high: bool = True

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        above = value >= self.low if self.has_low else value > self.low
        below = value <= self.high if self.has_high else value < self.high
        return above and below

    def __str__(self) -> str:
        """Return how a sentence has it.

        >>> str(Range(1)), str(Range(0, has_low=False)), str(Range(0, 1, has_high=False))
        ('1 or more', 'above 0', '0 or more and below 1')
        """
        above = f"{self.low:g} or more" if self.has_low else f"above {self.low:g}"
        if self.high == math.inf:
            return above
        return f"{above} and {'at most' if self.has_high else 'below'} {self.high:g}"


POSITIVE, NOT_NEGATIVE, COUNT = Range(0, has_low=False), Range(0), Range(1)
SHARE, SHARE_BELOW_ONE = Range(0, 1), Range(0, 1, has_high=False)


def _named(range_: Range, names: str) -> Iterable[tuple[str, Range]]:
    return ((name, range_) for name in names.split())


RANGES: dict[str, Range] = dict(
    [
        # Counts and sizes.
        *_named(
            COUNT,
            """
            per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_ppo_epochs num_mini_batches
            max_completion_length max_prompt_length max_length total_episodes lora_r lora_alpha kl_horizon dataset_num_proc
            dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout eval_accumulation_steps pad_to_multiple_of
            shaping_tokens generation_batch_size save_total_limit torch_empty_cache_steps vllm_max_model_length
            num_attention_heads num_key_value_heads head_dim sliding_window pretraining_tp
            """,
        ),
        *_named(Range(1, 1_000_000), "hidden_size intermediate_size max_position_embeddings vocab_size"),
        *_named(Range(1, 1000), "num_hidden_layers"),
        # Rates, factors and limits that are nothing at 0.
        *_named(
            POSITIVE,
            """
            learning_rate critic_learning_rate num_train_epochs logging_steps save_steps eval_steps adam_epsilon reward_clip
            cliprange_value kl_target kl_limit reward_ensemble_strength neftune_noise_alpha initializer_range rms_norm_eps
            """,
        ),
        # Those that 0 switches off.
        *_named(
            NOT_NEGATIVE,
            """
            weight_decay max_grad_norm kl_coef ptx_coef baseline_samples shaping_coef self_certainty_coef novelty_coef
            adversarial_coef center_rewards_coefficient critic_warmup
            dataloader_num_workers eval_delay missing_eos_penalty num_completions_to_print router_aux_loss_coef warmup_steps
            chunk_size_feed_forward max_window_layers
            """,
        ),
        # Shares and probabilities.
        *_named(SHARE, "gamma lam reference_mixup"),
        *_named(SHARE_BELOW_ONE, "adam_beta1 adam_beta2 lora_dropout attention_dropout label_smoothing_factor"),
        *_named(Range(0, 1, has_low=False), "vllm_gpu_memory_utilization"),
        *_named(Range(0, 1, has_low=False, has_high=False), "cliprange"),
        # Others.
        *_named(Range(1, has_low=False), "cliprange_dual"),
        *_named(Range(1), "vllm_importance_sampling_clip_max"),
        *_named(Range(0.01, 100), "temperature"),  # logits are divided by it
        *_named(Range(-1), "local_rank"),
    ]
)


def out_of_range(key: str, value: object) -> str | None:
    """Say what a number must be that is outside the range of its key; None where it is inside, or no number.

    >>> out_of_range("weight_decay", -1), out_of_range("weight_decay", 0.1), out_of_range("report_to", "none")
    ('0 or more', None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or key not in RANGES or value in RANGES[key]:
        return None
    return str(RANGES[key])
