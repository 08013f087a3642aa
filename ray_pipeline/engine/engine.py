"""One engine for every layout: micro-batches through the pipeline, gradients over replicas, one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from model.attention.sparse import set_warm_up
from model.build import build_part, split_backward, use_fp8, use_fp8_dispatch
from model.config import ModelConfig
from model.kernels.weight_gradients import BackwardSplit
from model.moe.router import Router
from model.parallel.gather import gather_state
from model.parallel.mesh import Mesh
from model.parallel.placement import V_SHAPED, parts_of, stage_layers
from model.transformer import Transformer, layer_losses
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.adapters import Adapters, base_name
from ray_pipeline.engine.expert_balance import KEPT, SAVED, ExpertBalance
from ray_pipeline.engine.optimizer import set_rate
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.engine.own_rows import fitted_rows
from ray_pipeline.engine.pipeline.parts import PartRunner, Parts, ZeroPartRunner
from ray_pipeline.engine.pipeline.pipeline import OutputFunction, Pipeline
from ray_pipeline.engine.spans import OPTIMIZER, Span
from ray_pipeline.engine.step_stats import (
    StepStats,
    auxiliary_sums,
    largest_of,
    layer_figures,
    objective_sums,
    over_ranks,
)
from ray_pipeline.engine.updater import PlainUpdater, Updater
from ray_pipeline.objectives.base import Objective, ScaledLoss


class Engine:
    """A model laid out over a mesh, with its optimizer.

    Args:
        options: everything else; the defaults are those of a model that one process reads.
        initial: whole parameters by name; else they are drawn from the seed.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        options: EngineOptions | None = None,
        *,
        initial: Mapping[str, Tensor] | None = None,
    ):
        self.config, self.mesh, self.options = config, mesh, options or EngineOptions()
        self.device = self.options.device or torch.device("cpu")
        self.parts = _build_parts(config, mesh, self.options, self.device, initial)
        lora, trained = self.options.lora, self.options.optimizer is not None
        self.adapters = Adapters(self.parts, lora, self.options.seed) if lora is not None and lora.r else None
        dtype = None if self.options.precision == "fp32" else torch.bfloat16
        self.module = Parts(self.parts, dtype, self.adapters)
        self.module.train(trained)
        self.experts = ExpertBalance(config, self.parts, mesh)
        self.updater: Updater | None = None
        split = BackwardSplit() if self.options.schedule in V_SHAPED else None  # both leave weight gradients for later
        if split is not None:
            split_backward(self.module, split)
        runner = PartRunner(self.module)
        if self.options.optimizer is not None and self.options.zero_stage == 0:
            self.updater = PlainUpdater(self.trained_parameters(), mesh, self.options.optimizer, split)
        elif self.options.optimizer is not None:
            from ray_pipeline.engine.zero import ZeroUpdater  # DeepSpeed takes seconds to import

            zero = ZeroUpdater(
                self.module, self.trained_parameters(), mesh, self.options.optimizer,
                zero_stage=self.options.zero_stage, offload_optimizer=self.options.offload_optimizer,
            )  # fmt: skip
            self.updater, runner = zero, ZeroPartRunner(self.module, zero)
        self.pipeline = Pipeline(mesh, self.options.schedule, self.device, runner, split)

    @property
    def span(self) -> Span:
        """What surrounds each part of a training step; it records nothing unless it is set."""
        return self.pipeline.span

    @span.setter
    def span(self, span: Span) -> None:
        self.pipeline.span = span

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters, or slices of them, by their names in the whole model; not those of adapters."""
        named = (item for part in self.parts for item in part.named_parameters())
        return {own: parameter for name, parameter in named if (own := base_name(name)) is not None}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves: all parameters, or those of adapters alone."""
        return self.named_parameters() if self.adapters is None else self.adapters.named_parameters()

    @property
    def routers(self) -> dict[str, Router]:
        """This rank's routers by their prefix in the whole model."""
        return self.experts.routers

    @property
    def expert_loads(self) -> dict[str, Tensor]:
        """Tokens each expert of this rank's routers got in the last step, over all replicas."""
        return self.experts.loads

    @property
    def last_part(self) -> Transformer | None:
        """The part with the head, where this rank has it."""
        return next((part for part in self.parts if part.is_last), None)

    def my_rows(self, batch: Batch) -> Batch:
        """The rows of a global batch that this replica computes, and the window of each that is this rank's."""
        (rows, seq_len), sp = batch.tokens.shape, self.mesh.sizes.sp
        index, dp = self.mesh.replica if batch.start is None else (0, 1)  # else it is those rows alone
        if rows % dp:
            raise ValueError(f"a batch of {rows} rows cannot be split over dp={dp} replicas")
        if seq_len % sp:
            raise ValueError(f"rows of {seq_len} tokens cannot be split over sp={sp} ranks")
        share = rows // dp
        mine = batch.rows(index * share, (index + 1) * share).to(self.device)
        return replace(mine, window=self.parts[0].window(seq_len) if sp > 1 else None)

    def _of_all(self, batch: Batch, counts: list[float]) -> list[float]:
        """What `counts`, taken of the rows in `batch`, come to over the global batch: one small message where every
        replica has its own rows alone. Sums of whole numbers, so exact."""
        if batch.start is None:
            return counts
        total = torch.tensor(counts, dtype=torch.float64)  # on the CPU: a GPU need not be waited for
        summed: list[float] = self.mesh.all_reduce(total, "dp").tolist()
        return summed

    def fitted(self, batch: Batch) -> Batch:
        """The batch with the fewest rows added that let a training step run on it; they are padding. A replica's rows
        come with theirs."""
        return batch.pad_rows(fitted_rows(self, *batch.tokens.shape)) if batch.start is None else batch

    def rows_at_once(self, seq_len: int) -> int:
        """Rows of a micro-batch: more of shorter ones."""
        length = self.options.row_length
        return self.options.micro_batch * (1 if length is None else max(1, length // seq_len))

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = self.rows_at_once(batch.tokens.shape[1])
        return [batch.rows(i, min(i + size, len(batch))) for i in range(0, len(batch), size)]

    def before_step(self, step: int) -> None:
        """Put the model into the phase of training step `step` (from 0)."""
        set_warm_up(self.module, step < self.options.indexer_warmup_steps)

    def train_step(
        self, batch: Batch, objective: Objective, lr: float, accept: Callable[[float, float], bool] | None = None
    ) -> StepStats:
        """One optimizer step.

        Args:
            batch: the global one, the same on every rank, or this replica's rows of it (`Batch.start`).
            accept: asked with loss and gradient norm before the weights are moved; False leaves them as they are. The
                same on every rank. Without ZeRO alone.
        """
        assert self.updater is not None
        mine = self.my_rows(batch)
        depths = range(self.config.num_nextn_predict_layers + 1)
        weight, *ahead = self._of_all(batch, [objective.weight(batch), *(batch.tokens_ahead(d) for d in depths)])
        counts = [int(count) for count in ahead]
        if weight == 0:
            raise ValueError("a batch without a single trained token")
        scale = self.updater.loss_scale
        loss = ScaledLoss(objective, scale, weight)
        micro_batches = self._micro_batches(mine)
        self.updater.expect(len(micro_batches))
        with layer_losses(self.parts, scale / counts[0]) as auxiliary:
            self.pipeline.run(micro_batches, loss, train=True)
        self.options.on_phase("optimizer step")
        set_rate(self.updater.optimizer, lr)
        totals = objective_sums(loss.sums, 1 + len(objective.metric_names), self.device)
        judged = None if accept is None else partial(self._judged, accept, totals[:1], weight)
        with self.span(OPTIMIZER):
            norm, taken = self.updater.step(judged)
        self.experts.step(taken=taken)
        own = torch.cat([totals, auxiliary_sums(auxiliary, self.device)])
        own, measured = over_ranks(self.mesh, own, self.experts.measured(counts).flatten())
        total, metrics = self._named(own[: len(totals)], objective)
        figures = layer_figures(own[len(totals) :].tolist(), measured.view(-1, 4).tolist(), self.experts)
        return StepStats(total / weight, norm, weight, metrics, figures, counts[0])

    def _judged(self, accept: Callable[[float, float], bool], total: Tensor, weight: float, norm: float) -> bool:
        """What `accept` says of the mean loss over all ranks, whose sum here is `total` [1], and the gradient norm."""
        return accept(float(over_ranks(self.mesh, total.clone())[0]) / weight, norm)

    def evaluate(self, batch: Batch, objective: Objective) -> StepStats:
        """The objective on a batch as `train_step` takes it, forward only: loss is the mean over its weight."""
        mine = self.my_rows(batch)
        [weight] = self._of_all(batch, [objective.weight(batch)])
        sums = objective_sums(self.forward(mine, objective), 1 + len(objective.metric_names), self.device)
        loss, metrics = self._named(over_ranks(self.mesh, sums)[0], objective)
        return StepStats(loss / max(weight, 1.0), 0.0, weight, metrics)

    def forward(self, mine: Batch, output: OutputFunction) -> list[Tensor]:
        """`output` of every micro-batch of this replica's rows, on the rank with the last part; elsewhere nothing."""
        training = self.module.training
        self.module.eval()
        results = self.pipeline.run(self._micro_batches(mine), output, train=False)
        self.module.train(training)
        return results

    def per_token(self, batch: Batch, output: OutputFunction) -> Tensor | None:
        """`output`'s per-token values [rows, seq / sp, ...] at their places in the batch, zero elsewhere.

        Args:
            batch: as `train_step` takes it.

        Returns:
            [rows, seq_len, ...] on the CPU, filled where this rank's replica and window are, which is all that a
            training step on the same batch reads here; None without the last part.
        """
        mine = self.my_rows(batch)
        values = self.forward(mine, output)
        if not values:
            return None
        joined = torch.cat(values).float().cpu()
        full = torch.zeros(*batch.tokens.shape, *joined.shape[2:])
        start = 0 if batch.start is not None else self.mesh.dp_rank * len(mine)
        full[start : start + len(mine), mine.window or slice(None)] = joined
        return full

    def _named(self, sums: Tensor, objective: Objective) -> tuple[float, dict[str, float]]:
        """Loss sum and metric sums by name."""
        loss, *metrics = sums.tolist()
        return loss, dict(zip(objective.metric_names, metrics, strict=True))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this rank's slices: `model.*`, `exp_avg.*`, `exp_avg_sq.*`, `step`."""
        assert self.updater is not None
        return self.updater.state() | {f"model.{name}": kept for name, kept in self.experts.buffers(KEPT).items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`, in place."""
        assert self.updater is not None
        self.updater.load_state(state)
        for name, kept in self.experts.buffers(KEPT).items():
            kept.copy_(state[f"model.{name}"])

    def largest(self) -> tuple[float, float]:
        """The largest trained weight and optimizer's average of all ranks, without signs; inf for a NaN."""
        assert self.updater is not None
        states = self.updater.optimizer.state.values()
        kept = (v for state in states for key, v in state.items() if key != "step" and isinstance(v, Tensor))
        weight, moment = largest_of((self.updater.held(), kept), self.mesh, self.device)
        return weight, moment

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        """The whole model's state dict, adapters merged, in fp32 on the CPU of every rank."""
        return gather_state(self.shards(), self.mesh)

    @torch.no_grad()
    def shards(self) -> dict[str, Tensor]:
        """This rank's slices of what is saved, by name in the whole model, adapters merged: what training moves, not
        copies, but for what ZeRO 3 brings together and adapters add to."""
        return {**self._weights(), **self.experts.buffers(SAVED)}

    def _weights(self) -> dict[str, Tensor]:
        """This rank's slices, whole on every replica."""
        named = self.named_parameters()
        if self.updater is None:
            return dict(named)
        if self.adapters is None:
            return self.updater.weights()
        with self.updater.gathered([*named.values(), *self.trained_parameters().values()]):
            return self.adapters.merged(named)

    @torch.no_grad()
    def adapter_state(self) -> dict[str, Tensor]:
        """The whole model's adapters by name, in fp32 on the CPU of every rank."""
        assert self.updater is not None
        return gather_state(self.updater.weights(), self.mesh)


def _build_parts(
    config: ModelConfig, mesh: Mesh, options: EngineOptions, device: torch.device, initial: Mapping[str, Tensor] | None
) -> list[Transformer]:
    """This rank's parts of the model, in the schedule's order."""
    indices = parts_of(options.schedule, mesh.sizes.pp, mesh.pp_rank)
    layers = stage_layers(config, len(indices) * mesh.sizes.pp, options.pp_layout)
    parts = [build_part(config, layers[i], mesh, seed=options.seed, initial=initial) for i in indices]
    for part in parts:
        part.to(device).requires_grad_(options.optimizer is not None)
        part.set_recompute(options.activation_checkpointing)
        if options.precision == "fp8":
            use_fp8(part)
        if options.fp8_dispatch:
            use_fp8_dispatch(part)
    return parts
