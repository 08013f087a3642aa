"""What every competitor trains: the same model, the same tokens, the same optimizer. And the table of competitors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from model.config import ModelConfig
from ray_pipeline.data.rows.batch import IGNORE, Batch
from ray_pipeline.settings.schema import OptimizerConfig

SEED = 1234
MTP_WEIGHT = 0.3


@dataclass(frozen=True)
class Task:
    """One optimizer step is `rows` rows of `seq_len` tokens; `micro_batch` rows pass the model at a time."""

    model: ModelConfig
    rows: int
    seq_len: int
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-3, warmup_steps=0, schedule="constant", grad_clip=0.5)
    )

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.rows * self.seq_len


def full_task() -> Task:
    """14.3M parameters, 7.2M active: MLA, group-limited MoE and one MTP module."""
    model = ModelConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, moe_intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=8, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
    )  # fmt: skip
    return Task(model, rows=8, seq_len=256)


def quick_task() -> Task:
    """The same shape, small enough to see within seconds that everything runs."""
    model = ModelConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=6,
        num_attention_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    return Task(model, rows=8, seq_len=32)


def make_batch(task: Task, step: int) -> Batch:
    """The global batch of a step: new tokens each time, so that routing changes; two packed documents per row.

    Tokens follow a skewed distribution, so that there is something to learn and losses move.
    """
    rows, seq_len = task.rows, task.seq_len
    generator = torch.Generator().manual_seed(SEED + step)
    uniform = torch.rand(rows, seq_len, generator=generator)
    tokens = (uniform**3 * task.model.vocab_size).long().clamp_(max=task.model.vocab_size - 1)
    cuts = torch.randint(1, seq_len, (rows, 1), generator=generator)
    doc_ids = (torch.arange(seq_len)[None] >= cuts).long()
    labels = torch.cat([tokens[:, 1:], torch.full((rows, 1), IGNORE)], 1)
    labels[:, :-1][doc_ids[:, 1:] != doc_ids[:, :-1]] = IGNORE
    return Batch(tokens, labels, doc_ids)


@dataclass(frozen=True)
class Row:
    """One competitor.

    Attributes:
        kind: which builder makes its step: "ours", "plain", "ddp", "fsdp2", "pipelining".
        peer: name of the row that ours is held against.
        ranks: processes. micro_batch: rows of one forward pass.
    """

    name: str
    kind: str
    ranks: int
    micro_batch: int
    settings: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None

    @property
    def needs_deepspeed(self) -> bool:
        return self.settings.get("zero_stage", 0) > 0


SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv", "dualpipev")


def _replicas(micro: int) -> list[Row]:
    return [
        Row("torch ddp", "ddp", 2, micro),
        Row("ddp", "ours", 2, micro, {"dp": 2}, "torch ddp"),
        # ZeRO 1 keeps gradients whole until the last micro-batch, ZeRO 2 shards those of each, ZeRO 3 weights too.
        Row("torch fsdp2 once", "fsdp2", 2, micro, {"stage": 1}),
        Row("zero1", "ours", 2, micro, {"dp": 2, "zero_stage": 1}, "torch fsdp2 once"),
        Row("torch fsdp2", "fsdp2", 2, micro, {"stage": 2}),
        Row("zero2", "ours", 2, micro, {"dp": 2, "zero_stage": 2}, "torch fsdp2"),
        Row("torch fsdp2 reshard", "fsdp2", 2, micro, {"stage": 3}),
        Row("zero3", "ours", 2, micro, {"dp": 2, "zero_stage": 3}, "torch fsdp2 reshard"),
        # Nothing in torch runs this model with these, so they stand beside plain replicas.
        Row("ep2", "ours", 2, micro, {"dp": 2, "ep": 2}, "torch ddp"),
        Row("tp2", "ours", 2, micro, {"tp": 2}, "torch ddp"),
        Row("sp2", "ours", 2, micro, {"sp": 2}, "torch ddp"),
    ]


def _pipelines(micro: int) -> list[Row]:
    rows = []
    for schedule in SCHEDULES:
        peer = f"torch pipelining {schedule}"
        rows.append(Row(peer, "pipelining", 3, micro, {"schedule": schedule}))
        rows.append(Row(f"pp3 {schedule}", "ours", 3, micro, {"pp": 3, "schedule": schedule}, peer))
    return rows


REFERENCE = Row("plain torch", "plain", 1, 2)


def table() -> list[Row]:
    """Every row; those to be compared stand next to each other, so that they are timed next to each other."""
    return [
        REFERENCE,
        Row("one process", "ours", 1, REFERENCE.micro_batch, {}, REFERENCE.name),
        *_replicas(2),
        # dualpipev needs twice as many micro-batches as there are pipeline ranks.
        *_pipelines(1),
    ]
