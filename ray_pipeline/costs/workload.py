"""What one optimizer step of a stage has to do and on which ranks: the question that the other files answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from model.config import ModelConfig
from model.parallel.placement import layers_by_hand, num_stages, parts_of, stage_layers
from ray_pipeline.costs.whole_copies import WholeCopies, whole_copies
from ray_pipeline.layout.layout import Layout
from ray_pipeline.settings.chain import is_top_k
from ray_pipeline.settings.post_training import LoraConfig
from ray_pipeline.settings.schema import PipelineFields, TrainingConfig

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class Part:
    """Consecutive layers that one pipeline rank runs as a unit.

    Attributes:
        stage: global index. first: with the embedding. last: with the final norm, the head and the MTP modules.
    """

    stage: int
    layers: range
    first: bool
    last: bool

    def text(self) -> str:
        """`E+4`, `4`, `4+H`: how `--pp-layout` writes it."""
        return "E+" * self.first + str(len(self.layers)) + "+H" * self.last


@dataclass(frozen=True)
class Workload:
    """One training stage in one layout.

    Attributes:
        rows: per optimizer step, over all replicas. micro_batch: rows per rank and forward pass.
        trains_mtp: the MTP modules take part in the loss.
        frozen: a second model that is only read (GRPO's reference, distillation's teacher).
        moments: fp32 numbers that the optimizer keeps per weight. muon: one less for each weight of a matrix product,
            unless it equalises the steps of neurons.
        lora: adapters that are trained in place of the weights.
        fp8_dispatch: tokens go to experts, and gradients of what those made, in 8 bits.
        node: ranks of a node; None: all are on one.
        copies: whole models beside it. main: the model that `layout.pp_layout` is written for; None: this one.
    """

    stage: str
    model: ModelConfig
    layout: Layout
    rows: int
    seq_len: int
    micro_batch: int
    steps: int
    bf16: bool = False
    trains_mtp: bool = True
    frozen: ModelConfig | None = None
    moments: int = 2
    muon: bool = False
    equalises: bool = False
    lora: LoraConfig | None = None
    main: ModelConfig | None = None
    fp8_dispatch: bool = False
    node: int | None = None
    copies: WholeCopies = field(default_factory=WholeCopies)

    @property
    def element(self) -> int:
        """Bytes of one operand of a matrix product."""
        return BF16 if self.bf16 else FP32

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.layout.dp * self.layout.sp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same routed experts."""
        return self.replicas // self.layout.ep

    @property
    def rows_per_replica(self) -> int:
        return -(-self.rows // self.layout.dp)

    @property
    def rows_at_once(self) -> int:
        """Rows of a full micro-batch."""
        return min(self.micro_batch, self.rows_per_replica)

    @property
    def micro_batches(self) -> int:
        """Forward passes per rank and step. Rollouts are padded to as many as dualpipev needs."""
        needed = 2 * self.layout.pp if self.layout.schedule == "dualpipev" else 1
        return max(needed, -(-self.rows_per_replica // self.rows_at_once))

    @property
    def tokens_at_once(self) -> int:
        """Positions of a micro-batch that one rank computes."""
        return self.rows_at_once * self.seq_len // self.layout.sp

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.seq_len

    @cached_property
    def parts(self) -> list[Part]:
        """Every part of the pipeline, first layer to last."""
        return self.cut(self.model)

    def cut(self, model: ModelConfig) -> list[Part]:
        """`parts` of another model in the same layout."""
        layout = self.layout
        by_hand = layers_by_hand(layout.pp_layout, self.main or self.model, model)
        ranges = stage_layers(model, num_stages(layout.schedule, layout.pp), by_hand)
        last = len(ranges) - 1
        return [Part(stage, layers, stage == 0, stage == last) for stage, layers in enumerate(ranges)]

    def parts_of_rank(self, pp_rank: int) -> list[Part]:
        """What pipeline rank `pp_rank` holds, in the order of the model."""
        return [self.parts[stage] for stage in parts_of(self.layout.schedule, self.layout.pp, pp_rank)]


def workload(config: PipelineFields, layout: Layout, stage: str, node: int | None = None) -> Workload:
    """The work of training stage `stage`, `node` as `Workload` has it; rollouts are taken to fill their rows."""
    settings: TrainingConfig = getattr(config, stage)
    grpo, model, rows = config.grpo, config.model, settings.batch_size
    frozen: ModelConfig | None = None
    if stage == "grpo":
        rows = max(1, grpo.prompts_per_step * grpo.group_size // grpo.updates_per_rollout)
        frozen = model if grpo.beta else None
    elif stage == "distillation":
        # Tokens alone, or log-probabilities on disk, need no teacher beside the student.
        alone = config.distillation.loss == "cross_entropy" or is_top_k(config.distillation.teacher)
        frozen, model = None if alone else model, config.distillation.student.applied_to(model)
    return Workload(
        stage, model, layout, rows=rows, seq_len=config.data.seq_len, micro_batch=config.layout.micro_batch,
        steps=settings.steps, bf16=settings.precision != "fp32", frozen=frozen,
        trains_mtp=model.num_nextn_predict_layers > 0 and getattr(settings, "mtp_loss_weight", 0.0) > 0,
        moments=0 if settings.optimizer.name == "sgd" else 2, muon=settings.optimizer.name == "muon",
        equalises=settings.optimizer.muon_equalise,
        lora=config.sft.lora if stage == "sft" and config.sft.lora.r else None, main=config.model,
        fp8_dispatch=settings.fp8_dispatch, node=node, copies=whole_copies(config, stage, model, layout),
    )  # fmt: skip


def without_checkpointing(work: Workload) -> Workload:
    """The same with every activation kept."""
    return replace(work, layout=replace(work.layout, activation_checkpointing="none"))
