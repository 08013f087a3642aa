"""Bytes that a rank really sends in a training step, by its group of ranks and operation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

FEW = 110  # numbers: sums for the report (109 with MTP), norms, loads of experts, which a plan leaves out
OPERATIONS = {
    "allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all", "send": "send",
}  # fmt: skip
Sent = Counter[tuple[tuple[int, ...], str]]  # ranks of the group, operation -> bytes


class SentBytes(TorchDispatchMode):
    """Collects them while it is entered; a ring is taken for reductions, as in `ray_pipeline.costs.traffic`."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Sent = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d" and name != "recv_":
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        [group] = (
            dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg)
        )
        ranks, mine = tuple(dist.get_process_group_ranks(group)), dist.get_rank(group)
        n = len(ranks)
        if name == "alltoall_base_":
            given, splits = args[1], args[4] or [len(args[1]) // n] * n
            size = (given.nbytes // max(1, len(given))) * (sum(splits) - splits[mine])
            size *= given.dtype != torch.int64  # how many rows will come
        else:
            tensors = [t for t in tree_iter(args[0]) if isinstance(t, torch.Tensor) and t.numel() > FEW]
            size = sum(t.nbytes for t in tensors)
            if name == "allreduce_":
                size = 2 * size * (n - 1) // n
            elif name == "_allgather_base_":  # what is put together
                size = size * (n - 1) // n
            elif name == "_reduce_scatter_base_":  # what each gets of it
                size = size * (n - 1)
        if size:
            self.sent[ranks, OPERATIONS.get(name, name)] += size


def _is_group(arg: Any) -> bool:
    return "ProcessGroup" in str(arg._type())
