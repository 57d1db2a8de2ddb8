"""What several processes do together: means and variances over all, weights in shards and whole, stopping where one fails."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.errors import OtherProcessError
from rlhf.models.sharding import shard_frozen, unsharded
from rlhf.objectives.masked import masked_sums, mean_and_variance

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def mean_and_variance_of_all(accelerator: Accelerator, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (1/n) of the values under a mask, over all processes; called by all of them together."""
    return mean_and_variance(accelerator.reduce(masked_sums(values, mask), reduction="sum"))


def moments_of_all(accelerator: Accelerator, values: Tensor) -> tuple[float, float, float]:
    """Return number, mean and variance (1/n) of a vector over all processes; called by all of them together."""
    ones = torch.ones_like(values)
    mean, variance = mean_and_variance_of_all(accelerator, values, ones)
    count = accelerator.reduce(ones.sum(), reduction="sum")
    return count.item(), mean.item(), variance.item()


def run_or_stop_all(
    accelerator: Accelerator,
    procedure: Callable[Arguments, Result],
    *arguments: Arguments.args,
    **keywords: Arguments.kwargs,
) -> Result:
    """Return what a procedure returns; where it fails on one process, stop all of them instead of waiting for that one.

    Raises:
        OtherProcessError: another process failed; on that one, what it raised.
    """
    results: list[Result] = []
    failure: Exception | None = None
    try:
        results.append(procedure(*arguments, **keywords))
    except Exception as error:  # raised again, below
        failure = error
    failed = accelerator.reduce(torch.tensor(float(failure is not None), device=accelerator.device), reduction="sum")
    if failure is not None:
        raise failure
    if failed > 0:
        raise OtherProcessError("ppo: another process stopped (its error says why); nothing was updated.")
    return results[0]


def shard_frozen_roles(trainer: "PPOTrainer") -> None:
    """Shard the reference and the reward models that are models of their own, where policy and critic are sharded.

    A reference computes in the policy's dtype, since their log-probabilities are compared; scores stay in the dtype in
    which a reward model was measured.
    """
    shard_frozen(trainer, trainer.reference.model, mixed_precision=True)
    for model in trainer.rewards.models:
        shard_frozen(trainer, model, mixed_precision=False)


@contextmanager
def whole_roles(trainer: "PPOTrainer") -> Iterator[None]:
    """Hold all roles whole on every process for a while, where they are sharded; all processes come together."""
    container = trainer.accelerator.unwrap_model(trainer.model)
    frozen = [trainer.reference.model, *trainer.rewards.models]
    with ExitStack() as stack:
        for model in (container, *frozen):
            stack.enter_context(unsharded(model))
        yield
