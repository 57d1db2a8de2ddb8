"""Models whose weights FSDP2 shards over processes: what must be gathered from all of them, and what can't be done."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import Trainer

from rlhf.errors import UserError

ASKED = "ACCELERATE_USE_FSDP"  # accelerate's launcher sets it
WHOLE_OPTIMIZER, SHARDED_OPTIMIZER = "optimizer.pt", "optimizer.bin"  # the Trainer's names
ENTER = "run_nothing"  # the name of a method


def check_sharding(trainer: Trainer, *, stage: str) -> None:
    """Refuse a way of sharding that was asked for and is not at work, or under which something would silently go wrong.

    Args:
        trainer: before training, when its accelerator stands and its model is still whole.
        stage: what people know the work by.

    Raises:
        UserError: with what to do.
    """
    if trainer.is_deepspeed_enabled:
        raise UserError(
            f"{stage}: DeepSpeed is not supported, since some of what it does here is wrong without a word; take FSDP2 "
            "(fsdp_version: 2 in accelerate's configuration), or data parallelism with LoRA and 4-bit weights."
        )
    if os.environ.get(ASKED, "false").lower() == "true" and not trainer.is_fsdp_enabled:
        raise UserError(
            f"{stage}: FSDP was asked for ({ASKED}=true), but accelerate does not shard on {trainer.args.device.type}: "
            "every process would hold all of the model. Launch on GPUs, or without it for data parallelism."
        )
    if trainer.is_fsdp_enabled:
        plugin: Any = trainer.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError(f"{stage}: FSDP 1 is not supported; set fsdp_version: 2 in accelerate's configuration.")
        if "FULL" not in str(plugin.state_dict_type):
            raise UserError(
                f"{stage}: under {plugin.state_dict_type} no checkpoint holds a model; set fsdp_state_dict_type: FULL_STATE_DICT "
                "in accelerate's configuration."
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


def shard_frozen(trainer: Trainer, model: nn.Module, *, mixed_precision: bool) -> None:
    """Shard a model that is not trained, where FSDP2 shards the trained one; 4-bit weights stay whole on every process.

    Args:
        mixed_precision: whether it computes in the trained model's dtype, and not in its own.
    """
    is_quantised = not all(parameter.is_floating_point() for parameter in model.parameters())
    if not trainer.is_fsdp_enabled or is_sharded(model) or is_quantised:
        return
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy if mixed_precision else None
    fully_shard(model, mp_policy=policy or MixedPrecisionPolicy(), offload_policy=plugin.cpu_offload)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold all weights of a sharded model on every process for a while, so that each can run it, and parts of it, by itself.

    All processes enter and leave it together. What is written into weights inside is lost.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if isinstance(model, FSDPModule):
        _enter(model)
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def is_sharded_checkpoint(folder: Path) -> bool:
    """Tell whether a checkpoint holds the optimizer's state as FSDP2 gathers it: by the names of parameters."""
    return (folder / SHARDED_OPTIMIZER).is_file()


def load_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Load an optimizer's state that was saved of shards into an optimizer of whole parameters, or the other way round.

    Args:
        model: whose parameters the optimizer has, in shards or whole; the model that was saved had them in the same order.
        folder: a checkpoint of `transformers.Trainer`.
    """
    if is_sharded_checkpoint(folder):
        state = torch.load(folder / SHARDED_OPTIMIZER, map_location="cpu", weights_only=True)
    else:
        state = torch.load(folder / WHOLE_OPTIMIZER, map_location="cpu", weights_only=True)
        state = by_names(state, model, optimizer)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def by_names(state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's `state_dict()` with the names of parameters in place of their numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {ordered[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [ordered[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def _enter(model: nn.Module) -> None:
    """Run nothing between the hooks of a model's forward, once: FSDP2 wants that before parts of it run by themselves."""
    if not hasattr(model, ENTER):
        setattr(model, ENTER, lambda: None)
        register_fsdp_forward_method(model, ENTER)
        getattr(model, ENTER)()


def whole(value: Tensor) -> Tensor:
    """Return a tensor that is sharded or summed over processes as an ordinary one; all of them call it together.

    >>> whole(Tensor([1.0]))
    tensor([1.])
    """
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a parameter of a model is sharded."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
