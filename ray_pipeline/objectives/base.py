"""What a training stage minimises. Objectives return sums and weights, never averages: token weighting then stays right
across ranks, micro-batches and packed documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch


class Objective(Protocol):
    """A loss on the last pipeline stage."""

    @property
    def section(self) -> str:
        """Where its figures and those of its batches are logged: `train`, `grpo`."""
        ...

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the sums that `__call__` returns besides the loss; `mtp/` is a section of its own, whose sums are
        divided by `mtp/tokens`."""
        ...

    def weight(self, batch: Batch) -> float:
        """What the loss sum is divided by, summed over all ranks and micro-batches first (usually trained tokens)."""
        ...

    def __call__(self, model: Transformer, hidden: Tensor, embeddings: Tensor | None, batch: Batch) -> Tensor:
        """Stack [loss sum, *metric sums] as a vector; gradients flow through element 0 alone.

        Args:
            hidden: [rows, seq / sp, hidden_size] after the final norm; `batch.local` cuts per-token tensors to match.
            embeddings: what `Transformer.predict_ahead` wants, when MTP modules exist.
        """
        ...


@dataclass
class ScaledLoss:
    """An objective as what the last pipeline stage computes in training: its part of the loss of the global batch.

    Attributes:
        scale: the engine's loss scale. weight: that of the global batch.
        sums: what the objective returned for each micro-batch, in order, detached.
    """

    objective: Objective
    scale: float
    weight: float
    sums: list[Tensor] = field(default_factory=list)

    def __call__(self, model: Transformer, hidden: Tensor, embeddings: Tensor | None, batch: Batch) -> Tensor:
        """The scalar that backward starts from."""
        values = self.objective(model, hidden, embeddings, batch)
        self.sums.append(values.detach())
        return values[0] * self.scale / self.weight
