"""A pretended accelerator: tensors say on which device they would be, and what mixes devices fails as it would there.

Everything is computed on the CPU. Where a tensor would be is an attribute of it, which `to`, `device=` and every operation
pass on; operations on tensors of two devices raise, but for what CUDA allows too: single numbers, copies, and indices that
lie on the CPU. What is computed is not compared with a real accelerator, and operations inside of C++ are not seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments

CPU, ACCELERATOR = torch.device("cpu"), torch.device("hpu", 0)
COPIES = ("copy_", "set_", "__set__", "__setitem__", "index_put_")  # the first tensor stays where it is
NO_MATTER = ("type_as", "_has_compatible_shallow_copy_type", "is_set_to")


class MixedDevices(RuntimeError):
    """Tensors of two devices met."""


def place(tensor: Tensor) -> torch.device:
    """Where a tensor would be."""
    return tensor.__dict__.get("pretended_device", CPU) if not tensor.is_meta else torch.device("meta")


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """Say that it is there."""
    tensor.__dict__["pretended_device"] = device
    return tensor


def read(device: Any) -> torch.device:
    """What a caller means by a device."""
    device = torch.device(device) if isinstance(device, str) else device
    return ACCELERATOR if device.type == ACCELERATOR.type else device


class PretendedAccelerator(TorchFunctionMode):
    """While it is active, devices are pretended."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, keys = getattr(func, "__name__", ""), dict(kwargs or {})
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__":
            if attribute == "is_meta" or args[0].is_meta:
                return func(*args)
            if attribute in ("device", "is_cpu"):
                return place(args[0]) if attribute == "device" else place(args[0]) == CPU
        if name in ("to", "cpu") and not args[0].is_meta:
            return self.moved(func, name, args, keys)
        tensors = [x for x in tree_leaves((args, keys)) if isinstance(x, Tensor) and not x.is_meta]
        self.check(name, args, tensors)
        wanted = read(keys["device"]) if keys.get("device") is not None else None
        if wanted == ACCELERATOR:
            keys["device"] = CPU
        found = func(*args, **keys)
        if wanted is not None:
            where = wanted
        elif name in (*COPIES, "__getitem__", "__get__"):
            where = place(args[1]) if name == "__set__" and isinstance(args[1], Tensor) else place(args[0])
        else:
            where = ACCELERATOR if any(place(x) == ACCELERATOR for x in tensors) else CPU
        if name == "__set__" and attribute == "data":
            put(args[0], where)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                put(tensor, where)
        return found

    def moved(self, func: Any, name: str, args: Any, keys: dict[str, Any]) -> Tensor:
        """`tensor.to(...)` and `tensor.cpu()`: the same object where nothing changes, else another."""
        tensor, where, others = args[0], place(args[0]), []
        for value in (*args[1:], keys.pop("device", None), keys.pop("other", None), CPU if name == "cpu" else None):
            if isinstance(value, Tensor):
                where = place(value)
                others.append(value.dtype)
            elif isinstance(value, str | torch.device):
                where = read(value)
            elif isinstance(value, torch.dtype | torch.memory_format):
                others.append(value)
        if where.type == "meta":
            return tensor.new_empty(tensor.shape, device=where)
        found: Tensor = tensor.to(*others, **keys) if others or keys else tensor
        if found is tensor and where != place(tensor):
            found = tensor.view_as(tensor) if tensor.requires_grad else tensor.clone()
        return put(found, where)

    def check(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Raise where an accelerator would."""
        if name in ("numpy", "__array__") and place(args[0]) == ACCELERATOR:
            raise MixedDevices(f"{name}() of a tensor on the accelerator")
        if name in ("__getitem__", "__setitem__", "index_put_"):
            indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            if place(args[0]) == CPU and any(place(x) == ACCELERATOR for x in indices):
                raise MixedDevices(f"{name}: indices on the accelerator into a tensor on the CPU")
            gathers = any(isinstance(x, Tensor | list) for x in (args[1] if isinstance(args[1], tuple) else (args[1],)))
            value = args[2] if len(args) > 2 else None
            if gathers and isinstance(value, Tensor) and value.dim() > 0 and place(value) != place(args[0]):
                raise MixedDevices(f"{name}: a value on {place(value)} at places of a tensor on {place(args[0])}")
        elif name not in (*COPIES, *NO_MATTER) and len({place(x) for x in tensors if x.dim() > 0}) > 1:
            raise MixedDevices(f"{name}: " + ", ".join(f"{tuple(x.shape)} on {place(x)}" for x in tensors[:6]))


@contextmanager
def pretended_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainers put their models and batches on an accelerator that is none."""
    where = property(lambda self: ACCELERATOR, lambda self, value: None)
    for state in (PartialState, AcceleratorState):
        monkeypatch.setattr(state, "device", where, raising=False)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: (self._setup_devices, ACCELERATOR)[1]))
    made = torch.nn.Parameter.__new__

    def new(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        parameter = made(cls, data, requires_grad)
        return parameter if data is None or data.is_meta else put(parameter, place(data))

    monkeypatch.setattr(torch.nn.Parameter, "__new__", new)
    with PretendedAccelerator():
        yield
