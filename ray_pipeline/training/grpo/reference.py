"""The frozen model that GRPO's KL is measured against."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers.loss import label_logprobs
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.checkpoints.checkpoint import list_checkpoints, step_of
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.pipeline.pipeline import OutputFunction
from ray_pipeline.records.stored_weights import open_model
from ray_pipeline.settings.run_folder import CHECKPOINTS
from ray_pipeline.training.finish import save_whole
from ray_pipeline.training.rank import Rank


def logprobs_at(temperature: float) -> OutputFunction:
    """What `Engine.per_token` is given for log p of the labels at a sampling temperature: [rows, seq / sp]."""

    def logprobs(model: Transformer, hidden: Tensor, _: Tensor | None, rows: Batch) -> Tensor:
        return label_logprobs(hidden, model.lm_head, rows.local(rows.labels), temperature)

    return logprobs


def refreshed_at(step: int, every: int, updates: int) -> int:
    """The optimizer step before which the reference of `step` was taken from the policy; 0: it is the input model.

    It is taken every `every` steps, at the next step that begins with new rollouts, which live for `updates` steps.
    """
    if every == 0:
        return 0
    for mark in range(step // every * every, 0, -every):
        begins = -(-mark // updates) * updates
        if begins <= step:
            return begins
    return 0


class Reference:
    """An engine of its own with the stage's input weights, and later with the policy's: each rank has its slices.

    The weights it was refreshed with lie as one model in the stage's folder, so that a resumed run has the same ones.

    Args:
        initial: the stage's input weights. every: optimizer steps between refreshes; 0 for none.
        updates: optimizer steps on the same rollouts.
    """

    def __init__(
        self,
        rank: Rank,
        config: ModelConfig,
        initial: Mapping[str, Tensor],
        *,
        every: int,
        updates: int,
        temperature: float,
    ):
        self.rank, self.every, self.updates = rank, every, updates
        self._logprobs = logprobs_at(temperature)
        self._since = 0
        self._engine: Engine = rank.engine(config, initial=initial)

    def bring_to(self, step: int, policy: Engine) -> None:
        """Be what the reference is at `step`, which begins with new rollouts.

        Raises:
            UserError: the file of it is missing or damaged.
        """
        wanted = refreshed_at(step, self.every, self.updates)
        if wanted == self._since:
            return
        if wanted == step:
            self._follow(policy)
            save_whole(self.rank, policy, self._folder(step))
            if self.rank.is_main:
                self._forget(step)
        else:
            config, state = open_model(self._folder(wanted))
            self._engine = self.rank.engine(config, initial=state)
        self._since = wanted

    @torch.no_grad()
    def _follow(self, policy: Engine) -> None:
        """Take its weights as they are now: each rank copies its slices."""
        theirs = policy.shards()
        for name, mine in self._engine.shards().items():
            mine.copy_(theirs[name])

    def logprobs(self, batch: Batch) -> Tensor:
        """Of the labels: [rows, seq_len], filled where this rank's replica and window are.

        It routes freely: a replayed choice of experts is the policy's.
        """
        free = replace(batch, extras=replace(batch.extras, routing=None))
        found = self._engine.per_token(free, self._logprobs)
        return torch.zeros(batch.labels.shape) if found is None else found

    def _folder(self, step: int) -> Path:
        return self.rank.folder / f"reference-{step:08d}"

    def _forget(self, step: int) -> None:
        """Drop those that no checkpoint needs; one may still be on its way, so the last two stay."""
        needed = {step, self._since}
        for checkpoint in list_checkpoints(self.rank.folder / CHECKPOINTS):
            needed.add(refreshed_at(step_of(checkpoint), self.every, self.updates))
        for folder in self.rank.folder.glob("reference-*"):
            found = re.fullmatch(r"reference-(\d{8})", folder.name)
            if found and int(found[1]) not in needed:
                shutil.rmtree(folder)
