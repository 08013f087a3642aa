"""What a checkpoint holds, and how a rank's slices become places in the whole: the one file that knows the format.

A checkpoint is a folder of torch DCP files beside `trainer.json`. Tensors go by global name, `model.X` and the
optimizer's `exp_avg.X`, `exp_avg_sq.X` for the parameter X of the whole model, and `step`. Nothing in it tells which
layout wrote it: a tensor that is cut over ranks is a DTensor with its true placements, and DCP reads any other cut.

Experts' gate_up_proj [experts, 2 * width, hidden] is stored as [experts, 2, width, hidden]: tensor parallelism cuts
gate rows and up rows each by itself, which is one contiguous slice per rank only in that view.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parallel.mesh import Mesh
from model.parallel.shard_plan import Shard, shard_of

FORMAT = 2
STATE_FILE = "trainer.json"
SOURCE_FOLDER = "source"  # files of the source of batches, beside it
STEP = "step"  # a number, not a parameter's


def parameter_of(key: str) -> str:
    """`exp_avg.layers.0.x` -> `layers.0.x`."""
    return key.partition(".")[2]


def _shard(key: str) -> Shard:
    return Shard() if key == STEP else shard_of(parameter_of(key))


def stored(key: str, local: Tensor) -> Tensor:
    """A rank's slice in the shape files have; a view."""
    shard = _shard(key)
    if not shard.gated:
        return local
    assert shard.tp_dim is not None
    shape = local.shape
    return local.unflatten(shard.tp_dim, (2, shape[shard.tp_dim] // 2))


def loaded(key: str, tensor: Tensor) -> Tensor:
    """Inverse of `stored`."""
    shard = _shard(key)
    if not shard.gated:
        return tensor
    assert shard.tp_dim is not None
    return tensor.flatten(shard.tp_dim, shard.tp_dim + 1)


def cut_dims(key: str) -> dict[str, int]:
    """Mesh axis -> dimension of the stored tensor that is cut evenly along it."""
    shard = _shard(key)
    dims = {"ep": 0} if shard.expert else {}
    if shard.tp_dim is not None:
        dims["tp"] = shard.tp_dim + shard.gated
    return dims


def global_shape(key: str, local: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape in the file of a tensor whose local slice, as stored, is `local`.

    Args:
        sizes: ranks along each axis.
    """
    shape = list(local.shape)
    for axis, dim in cut_dims(key).items():
        shape[dim] *= sizes.get(axis, 1)
    return tuple(shape)


def placed(key: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """A slice as stored, as a DTensor that knows its place; as it is where no rank holds another part of it."""
    dims = {axis: dim for axis, dim in cut_dims(key).items() if mesh.axis(axis).size > 1}
    if not dims:
        return tensor
    # Imported here: one process without torch.distributed has no DTensors.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Cut

    groups = [mesh.axis(axis).group for axis in dims]
    if len(dims) == 1:
        (axis,) = dims
        device_mesh = DeviceMesh.from_group(groups[0], "cpu", mesh_dim_names=(axis,))
    else:
        device_mesh = DeviceMesh.from_group(groups, "cpu", mesh=_expert_grid(mesh), mesh_dim_names=("ep", "tp"))
    return DTensor.from_local(tensor, device_mesh, [Cut(dim) for dim in dims.values()], run_check=False)


def _expert_grid(mesh: Mesh) -> Tensor:
    """Global ranks [ep, tp] that together hold my stage's experts."""
    rows = []
    for rank in mesh.axis("ep").ranks:
        place = mesh.sizes.coordinate(rank)
        rows.append([mesh.sizes.rank(place | {"tp": tp}) for tp in range(mesh.sizes.tp)])
    return torch.tensor(rows)


def shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Which of `count` ranks that hold the same tensors writes which of them: largest first to the least loaded."""
    loads, out = [0] * count, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        out[name] = loads.index(min(loads))
        loads[out[name]] += sizes[name]
    return out


def my_share(keys: Mapping[str, int], mesh: Mesh) -> list[str]:
    """The keys of `keys` (name -> bytes) that this rank writes, so that every slice is written exactly once.

    Every rank decides alone and all decide alike: ranks with the same slices see the same names and sizes.
    """
    kinds: dict[tuple[bool, bool], dict[str, int]] = {}
    for key, size in keys.items():
        if key != STEP:
            kinds.setdefault((_shard(key).expert, "tp" in cut_dims(key)), {})[key] = size
    mine = [STEP] if STEP in keys and mesh.rank == 0 else []
    for (expert, cut), sizes in kinds.items():
        holders, tp = mesh.axis("expert_replica" if expert else "replica"), mesh.axis("tp")
        index, count = (holders.index, holders.size)
        if not cut:  # tensor-parallel ranks hold it whole
            index, count = index * tp.size + tp.index, count * tp.size
        mine += [key for key, writer in shares(sizes, count).items() if writer == index]
    return mine


def page(step: int, model: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of trainer.json."""
    return {"format": FORMAT, "step": step, "model": asdict(model), "extra": dict(extra)}


def differences(written: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """`model.hidden_size is 32 there and 64 here`, for every key of the architecture that differs."""
    here = json.loads(json.dumps(asdict(model)))  # as it was written: lists for tuples
    keys = [key for key in {**written, **here} if written.get(key) != here.get(key)]
    return [f"model.{key} is {written.get(key)} there and {here.get(key)} here" for key in keys]


def shape_differences(there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What of the tensors that are needed here is absent there, or has another shape."""
    out = []
    for name, shape in here.items():
        if name not in there:
            out.append(f"{name} is not in it")
        elif there[name] != shape:
            out.append(f"{name} is {list(there[name])} there and {list(shape)} here")
    return out


def some(lines: Iterable[str], most: int = 3) -> str:
    """The first few, and how many more."""
    listed = list(lines)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return "; ".join(listed[:most]) + more
