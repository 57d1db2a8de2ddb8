"""Every private name of TRL that we use, in one place. Checked against TRL 1.16.0; a new minor version starts here.

`_BaseTrainer` and `_BaseConfig` are the bases of TRL's own trainers (no public equivalent); the functions are those that these
trainers use.
"""

from typing import Any

from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import print_prompt_completions_sample


def vllm_generation() -> Any:
    """Return TRL's wrapper around a vLLM engine or server; import it only when it is asked for."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration


__all__ = [
    "BaseConfig",
    "BaseTrainer",
    "DataCollatorForPreference",
    "print_prompt_completions_sample",
    "vllm_generation",
]
