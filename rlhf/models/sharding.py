"""Models whose weights FSDP2 shards over processes: what must be gathered from all of them, and what can't be done."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from rlhf.errors import UserError

ASKED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def check_sharding(trainer: Trainer, *, stage: str) -> None:
    """Refuse a way of sharding that was asked for and is not at work, or under which something would silently go wrong.

    Args:
        trainer: before training, when its accelerator stands and its model is still whole.
        stage: what people know the work by.

    Raises:
        UserError: with what to do.
    """
    state = trainer.accelerator.state
    active = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    for variable, name in ASKED.items():
        if os.environ.get(variable, "false").lower() == "true" and not active[name]:
            raise UserError(
                f"{stage}: {name} was asked for ({variable}=true), but accelerate does not shard on {trainer.args.device.type}: "
                "every process would hold all of the model. Launch on GPUs, or without it for data parallelism."
            )
    if trainer.is_fsdp_enabled:
        plugin: Any = state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError(f"{stage}: FSDP 1 is not supported; set fsdp_version: 2 in accelerate's configuration.")
        if "FULL" not in str(plugin.state_dict_type):
            raise UserError(
                f"{stage}: under {plugin.state_dict_type} no checkpoint holds a model; set fsdp_state_dict_type: FULL_STATE_DICT "
                "in accelerate's configuration."
            )
    if state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3:
        raise UserError(
            f"{stage}: under DeepSpeed ZeRO-3 the saved models would be empty; take ZeRO-2, or FSDP2 "
            "(fsdp_version: 2 in accelerate's configuration)."
        )


def gathered_weights(trainer: Trainer, part: str = "") -> dict[str, Tensor] | None:
    """Return all weights of a sharded model, whole, on the CPU of every process; None where the model is whole anyway.

    Every process must call it, since each sends its shards.

    Args:
        part: the name of a module of the trainer's model, whose weights alone are wanted, by their names in it.
    """
    if not trainer.is_fsdp_enabled:
        return None
    return weights_of(trainer.model, trainer.accelerator.get_state_dict(trainer.model), part)


def weights_of(model: nn.Module, weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the weights of a part of a model, by their names in it; of weights that are tied only one name.

    Args:
        weights: of all of the model.
    """
    tied = set(getattr(model.get_submodule(part), "all_tied_weights_keys", None) or {})
    prefix = f"{part}." if part else ""
    named = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    return {name: weight for name, weight in named.items() if name not in tied}


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold all weights of a sharded model on every process for a while, so that each can run it, and parts of it, by itself.

    All processes enter and leave it together. What is written into weights inside is lost.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def whole(value: Tensor) -> Tensor:
    """Return a tensor that is sharded or summed over processes as an ordinary one; all of them call it together.

    >>> whole(Tensor([1.0]))
    tensor([1.])
    """
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a parameter of a model is sharded."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
