"""Builds a part of the model as one rank holds it, cut by the shard plan, and sets what its layers compute in.

The layers themselves know only an `Axis` each (`tp`, `sp`, `ep` and its two hops), which `attach_axes` sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.init import initial_weight
from model.kernels.weight_gradients import BackwardSplit
from model.layers.fp8 import fp8_grouped_linear, fp8_linear
from model.layers.linear import Linear
from model.layers.rope import rotary_table
from model.moe.experts import RoutedExperts
from model.moe.router import Router
from model.parallel.mesh import Mesh
from model.parallel.shard_plan import cut, shard_of
from model.transformer import Block, Transformer

_OF_WEIGHTS = ("tp", "ep", "ep_near", "ep_far")  # axes over which weights lie


def attach_axes(model: nn.Module, mesh: Mesh, axes: tuple[str, ...] = (*_OF_WEIGHTS, "sp")) -> None:
    """Give every layer that splits work the axes it splits it over."""
    for module in model.modules():
        for name in axes:
            if hasattr(module, name):
                setattr(module, name, mesh.axis(name))


def build_part(
    config: ModelConfig, layers: range, mesh: Mesh, *, seed: int = 0, initial: Mapping[str, Tensor] | None = None
) -> Transformer:
    """One pipeline stage with this rank's slice of every parameter, on the CPU.

    No whole model is ever in memory: parameters are made one by one, whole, and cut.

    Args:
        initial: whole parameters by name; else weights are drawn from the seed.
    """
    with torch.device("meta"):
        part = Transformer(config, layers)
    tp, ep = ((axis.index, axis.size) for axis in (mesh.axis("tp"), mesh.axis("ep")))
    for name, meta in list(part.named_parameters()):
        full = initial[name] if initial is not None else initial_weight(name, meta.shape, config, seed)
        _replace(part, name, nn.Parameter(cut(full, shard_of(name), tp=tp, ep=ep).detach().clone()))
    for name, buffer in list(part.named_buffers()):
        stored = None if initial is None else initial.get(name)
        fresh = torch.zeros(buffer.shape, dtype=buffer.dtype)
        _replace(part, name, fresh if stored is None else stored.detach().clone())
    part.rotary = rotary_table(config)
    attach_axes(part, mesh)
    return part


def part_over(part: Transformer, mesh: Mesh) -> Transformer:
    """The same layers without a weight of their own, for reading the tensors that `point_at` names: no adapters, hooks
    or 8-bit products, and no rows that are cut over sequence-parallel ranks."""
    with torch.device("meta"):
        reader = Transformer(part.config, part.layer_range)
    tp, ep = ((axis.index, axis.size) for axis in (mesh.axis("tp"), mesh.axis("ep")))
    for name, whole in list(reader.named_parameters()):
        _replace(reader, name, nn.Parameter(cut(whole.detach(), shard_of(name), tp=tp, ep=ep), requires_grad=False))
    reader.rotary = part.rotary
    attach_axes(reader, mesh, _OF_WEIGHTS)
    return reader.eval()


def point_at(part: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Make these tensors, by name in the whole model, the part's own, without copying any."""
    for name, _ in list(part.named_parameters()):
        _replace(part, name, nn.Parameter(tensors[name], requires_grad=False))
    for name, _ in list(part.named_buffers()):
        if name in tensors:
            _replace(part, name, tensors[name])


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    table: dict[str, Any] = module._parameters if isinstance(value, nn.Parameter) else module._buffers
    assert last in table
    table[last] = value


def use_fp8(model: Transformer) -> None:
    """Let attention's projections, feed-forwards and routed experts of every block compute in 8 bits.

    Embedding, head, router, norms, attention itself, MTP's joining projection and the indexer stay as they are
    (DeepSeek-V3, arXiv:2412.19437, §3.3.1).
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for name, module in ((name, module) for block in blocks for name, module in block.named_modules()):
        if isinstance(module, RoutedExperts):
            module.product = fp8_grouped_linear
        elif isinstance(module, Linear) and "indexer" not in name:
            module.product = fp8_linear


def use_fp8_dispatch(model: Transformer) -> None:
    """Let routed experts read tokens in 8 bits, so that they can be sent so."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.fp8_dispatch = True


def split_backward(model: nn.Module, split: BackwardSplit) -> None:
    """Let every layer with a matrix product put off its weight gradient while `split` says so."""
    for module in model.modules():
        if isinstance(module, Linear | Router | RoutedExperts):
            module.backward_split = split
