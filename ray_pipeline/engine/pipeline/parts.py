"""A rank's parts of the model as one module: what of a batch each part reads, and what it hands on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.adapters import Adapters
from ray_pipeline.engine.pipeline.pipeline import OutputFunction
from ray_pipeline.engine.row_noise import embedding_noise


class Parts(nn.Module):
    """This rank's parts of the model as one module, which is what DeepSpeed wraps."""

    def __init__(
        self, parts: Sequence[Transformer], autocast_dtype: torch.dtype | None, adapters: Adapters | None = None
    ):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.dropouts = [] if adapters is None else adapters.dropouts
        self.autocast_dtype = autocast_dtype

    def forward(self, index: int, carried: list[Tensor], batch: Batch, output: OutputFunction) -> list[Tensor]:
        """One part on one micro-batch.

        Args:
            carried: hidden states, and where later layers read them the embeddings, from the part before; empty for
                the first.
        Returns:
            What the next part is given; from the last one [`output`'s value].
        """
        part: Any = self.parts[index]
        for dropout in self.dropouts:
            dropout.read(batch)
        enabled = self.autocast_dtype is not None
        with torch.autocast(batch.tokens.device.type, self.autocast_dtype, enabled=enabled):
            rotation, mask = part.context(batch.doc_ids, batch.tokens.shape[1])
            if part.is_first:
                noise = embedding_noise(batch, part.config.hidden_size) if self.training else None
                hidden, ahead = part.embed(batch.tokens, noise)
            else:
                hidden, ahead = carried if len(carried) == 2 else (carried[0], None)
            routing = batch.extras.routing
            hidden = part.run_layers(
                hidden, rotation, mask, None if routing is None else batch.local(routing),
                None if batch.real is None else batch.local(batch.real), ahead, batch.local(batch.tokens),
            )  # fmt: skip
            if part.is_last:
                return [output(part, part.norm(hidden), ahead, batch)]
        return [hidden] if ahead is None else [hidden, ahead]

    def carried_shapes(self, batch: Batch) -> list[tuple[int, ...]]:
        """Shapes of the tensors between two parts, for a micro-batch."""
        first: Any = self.parts[0]
        rows, seq_len = batch.tokens.shape
        window, width = first.window(seq_len), first.config.hidden_size
        lengths = [window.stop - window.start]
        if first.config.hands_embeddings_on:
            lengths.append(first.ahead_length(seq_len))
        return [(rows, length, width) for length in lengths]


class PartRunner:
    """Parts as the pipeline runs them (`ModelParts`)."""

    def __init__(self, module: Parts):
        self.module = module

    def run(self, index: int, carried: list[Tensor], batch: Batch, output: OutputFunction) -> list[Tensor]:
        out: list[Tensor] = self.module(index, carried, batch, output)
        return out

    def carried_shapes(self, batch: Batch) -> list[tuple[int, ...]]:
        return self.module.carried_shapes(batch)

    def before_backward(self) -> None:
        pass


class Hooked(Protocol):
    """What wraps a module and hooks into its passes: `engine.zero.ZeroUpdater`."""

    def run(self, *args: Any) -> Any: ...
    def before_backward(self) -> None: ...


class ZeroPartRunner(PartRunner):
    """Parts whose passes go through ZeRO's hooks."""

    def __init__(self, module: Parts, zero: Hooked):
        super().__init__(module)
        self.zero = zero

    def run(self, index: int, carried: list[Tensor], batch: Batch, output: OutputFunction) -> list[Tensor]:
        out: list[Tensor] = self.zero.run(index, carried, batch, output)
        return out

    def before_backward(self) -> None:
        self.zero.before_backward()
