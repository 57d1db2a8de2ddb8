"""Every private name of TRL that we use, in one place. Checked against TRL 1.16.0; a new minor version starts here.

`_BaseTrainer` and `_BaseConfig` are the bases of TRL's own trainers (no public equivalent); the functions are those that these
trainers use.
"""

from collections.abc import Callable, Iterator
from typing import Any

from peft import PeftModel
from torch import Tensor
from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, print_prompt_completions_sample


def vllm_generation(merged_weights: Callable[[PeftModel], Iterator[tuple[str, Tensor]]]) -> Any:
    """Return TRL's wrapper around a vLLM engine or server; import it only when it is asked for.

    Args:
        merged_weights: yields the weights of a base with its adapter. TRL's own way adds the adapter to the base and takes it off
            again, which leaves the base rounded otherwise each time; where other roles stand on it, they move too.
    """
    from trl.generation.vllm_generation import VLLMGeneration

    class Generation(VLLMGeneration):
        def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
            yield from merged_weights(self.model) if isinstance(self.model, PeftModel) else super()._iter_named_params()

    return Generation


__all__ = [
    "BaseConfig",
    "BaseTrainer",
    "DataCollatorForPreference",
    "add_fused_lm_head",
    "print_prompt_completions_sample",
    "vllm_generation",
]
