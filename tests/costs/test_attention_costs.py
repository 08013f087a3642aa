"""The indexer's messages as gloo sees them, and its arithmetic as torch counts it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from model.attention import indexer
from model.attention.kinds import build_attention
from model.build import attach_axes
from model.layers.auxiliary import Counting, LayerLosses
from model.layers.rope import rotary_table
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.costs import attention_costs
from ray_pipeline.costs.traffic import layer_messages
from ray_pipeline.costs.workload import Workload
from ray_pipeline.layout.layout import Layout
from tests.costs.test_memory import MODEL
from tests.distributed import run_ranks

SEQ = 16
SPARSE = replace(MODEL, attention="dsa", index_n_heads=3, index_head_dim=20, index_topk=6)


class _Counted(TorchDispatchMode):
    """Bytes given to collectives."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # An all-to-all has its output first, then its input.
            given = args[1] if "alltoall" in func.__name__ else args[0]
            self.total += sum(t.numel() * t.element_size() for t in tree_iter(given) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def given(rank: int, sizes: dict[str, int]) -> list[list[int]]:
    """Per kind of attention, what a rank gives to collectives in forward and in backward of a layer's attention."""
    mesh, out = Mesh(MeshSizes(**sizes)), []
    for model in (replace(SPARSE, attention="mla"), SPARSE):
        attention = build_attention(replace(model, num_attention_heads=model.num_attention_heads // mesh.sizes.tp))
        attach_axes(attention, mesh)
        window = SEQ // mesh.sizes.sp
        x = torch.randn(2, window, model.hidden_size, requires_grad=True)
        with _Counted() as forward:
            y = attention(x, rotary_table(model)[None, :window], None, Counting(losses=LayerLosses(1.0)))
        with _Counted() as backward:
            y.sum().backward()
        out.append([forward.total, backward.total])
    dist.barrier()
    return out


@pytest.mark.parametrize("axis", ["tp", "sp"])
def test_messages_are_what_collectives_are_given(axis: str) -> None:
    [[dense, sparse], _] = run_ranks(given, 2, {axis: 2})
    layout = Layout(gpus=2, **{axis: 2})
    work = Workload("pretrain", SPARSE, layout, rows=2, seq_len=SEQ, micro_batch=2, steps=1)
    predicted = attention_costs.indexer_messages(work)[axis]
    share = 2 if axis == "tp" else 1  # an all-reduce goes twice around the ring
    assert [share * (s - d) for s, d in zip(sparse, dense, strict=True)] == list(predicted)
    before = layer_messages(replace(work, model=replace(SPARSE, attention="mla")), 0)[axis]
    after = layer_messages(work, 0)[axis]
    assert [a - b for a, b in zip(after, before, strict=True)] == [size // 2 for size in predicted]


def test_arithmetic_of_the_loss_is_what_torch_counts_in_one_block() -> None:
    """Blocks end where their last query is; a single one meets every key for every query, twice the mean."""
    model, tokens = replace(SPARSE, index_topk=SEQ), 2 * SEQ
    work = Workload("pretrain", model, Layout(), rows=2, seq_len=SEQ, micro_batch=2, steps=1)
    attention = build_attention(model)
    x, rotation = torch.randn(2, SEQ, model.hidden_size), rotary_table(model)[None, :SEQ]
    with FlopCounterMode(display=False) as with_loss:
        attention(x, rotation, None, Counting(losses=LayerLosses(1.0)))
    with FlopCounterMode(display=False) as without:
        attention(x, rotation, None)
    assert model.q_lora_rank is not None
    heads, width = model.index_n_heads, model.index_head_dim
    weights = heads * model.q_lora_rank * width + model.hidden_size * (width + heads)
    summed = 3 * 2 * heads * SEQ * tokens  # over heads, small beside the products of their queries and keys
    counted = with_loss.get_total_flops() - without.get_total_flops() - 2 * weights * tokens - summed
    third = attention_costs.indexer_flops(work)  # rounded down
    assert counted / (2 * tokens) == pytest.approx(3 * third, abs=3)


def test_the_block_is_the_one_that_scores_are_made_in() -> None:
    assert attention_costs.INDEXER_BLOCK == indexer.BLOCK
