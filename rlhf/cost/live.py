"""How many bytes live at once: every tensor that an operation makes is counted until it is gone."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are made while it is active, forward and backward, and their most at any time.

    What an operation takes for itself while it runs is not seen.

    Attributes:
        live: bytes now.
        peak: the most so far.

    Args:
        left_out: storages that are not counted.
    """

    def __init__(self, left_out: Iterable[int] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._known = set(left_out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is gone."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Return what `LiveBytes` knows the storages of some tensors by."""
    return {tensor.untyped_storage()._cdata for tensor in tensors}
