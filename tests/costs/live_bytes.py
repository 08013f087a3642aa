"""Counts the bytes of live tensors, to hold the plan's memory figure against a real step.

Every operation's outputs are watched by storage, so views cost nothing and a freed tensor is gone at once. Scratch
memory inside kernels, and what the process itself takes, are not seen.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Context in which `live` is the number of bytes that tensors hold now, and `peak` its maximum.

    Args:
        existing: tensors made before the context that count too (weights, gradients, optimizer state).
    """

    def __init__(self, existing: Iterable[Tensor] = ()):
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in existing:
            self.watch(tensor)

    def watch(self, tensor: Tensor) -> None:
        """Count the tensor's storage until it is freed."""
        if tensor.device.type == "meta":
            return  # a shape without memory
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._storages:
            reference, before = self._storages[key]
            if before != size:  # resized in place, as ZeRO 3 does with a parameter it lets go
                self._storages[key] = (reference, size)
                self._change(size - before)
            return
        self._storages[key] = (weakref.ref(storage, lambda _: self._freed(key)), size)
        self._change(size)

    def _freed(self, key: int) -> None:
        _, size = self._storages.pop(key)
        self._change(-size)

    def _change(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter((out, args)):
            if isinstance(value, Tensor):
                self.watch(value)
        return out


def reachable_tensors() -> list[Tensor]:
    """Every tensor that Python can reach: weights, optimizer state, and what a library keeps to itself."""
    gc.collect()
    # By type, not isinstance: that would ask every object for its class, which some answer with a warning.
    return [found for found in gc.get_objects() if issubclass(type(found), Tensor)]


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes that tensors of this process held at once while `step()` ran, those made before it included."""
    live = LiveBytes(reachable_tensors())
    with live:
        step()
    return live.peak
