"""GRPO's batches: rollouts by every rank with the whole model, rewards, advantages, reference log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from model.loss import label_logprobs
from model.transformer import Transformer
from ray_pipeline.data.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.gather import all_ranks_gather
from ray_pipeline.rollouts.sampler import Rollout, group_advantages, pack_rollouts, sample_groups
from ray_pipeline.training.heldout import WholeModel, read_questions
from ray_pipeline.training.rank import Rank


class RolloutSource:
    """Samples at steps that are multiples of `updates_per_rollout`; the steps between reuse the same rollouts.

    The prompts of a step, and every draw of the sampler, depend on (seed, step) and the weights alone. The trainer
    checkpoints between rollouts only, so a resumed run samples exactly what the unbroken one did.
    """

    def __init__(self, rank: Rank, engine: Engine, reference: Engine | None, whole: WholeModel):
        self.rank, self.engine, self.reference, self.whole = rank, engine, reference, whole
        self.settings = rank.config.grpo
        self.questions = read_questions(rank.data / "prompts" / "train.jsonl")
        self._batch: Batch | None = None
        self._metrics: dict[str, float] = {}

    def batch(self, step: int) -> Batch:
        updates = self.settings.updates_per_rollout
        if step % updates == 0 or self._batch is None:
            assert step % updates == 0, "resumed in the middle of a batch of rollouts"
            self._batch = self._roll_out(step // updates)
        return self._batch

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def prompts(self, iteration: int) -> list[int]:
        """Indices of the questions of one iteration; an epoch asks each question once, in a seeded order."""
        count, total = self.settings.prompts_per_step, len(self.questions)
        chosen = []
        for place in range(iteration * count, (iteration + 1) * count):
            epoch, index = divmod(place, total)
            generator = torch.Generator().manual_seed(self.rank.config.seed * 1_000_003 + epoch)
            if index == 0 or place == iteration * count:
                order = torch.randperm(total, generator=generator)
            chosen.append(int(order[index]))
        return chosen

    def _roll_out(self, iteration: int) -> Batch:
        rank, settings = self.rank, self.settings
        self.whole.sync(self.engine)
        rank.phase("sampling")
        chosen = self.prompts(iteration)
        share = range(rank.mesh.rank, len(chosen), rank.mesh.world)
        mine = sample_groups(
            self.whole.decoder,
            self.whole.tokenizer,
            [self.questions[chosen[i]] for i in share],
            group_size=settings.group_size,
            seed=rank.config.seed,
            step=iteration,
            indices=list(share),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            think_tokens=settings.think_budget,
            speculative=settings.speculative,
            weights=settings.rewards,
        )
        gathered: list[Rollout] = [r for part in all_ranks_gather(rank.mesh, mine) for r in part]
        gathered.sort(key=lambda r: r.question_index)  # stable: the order no longer tells how many ranks sampled
        rewards = torch.tensor([r.reward for r in gathered])
        advantages = group_advantages(rewards, settings.group_size)
        self._metrics = self._summary(gathered, rewards, advantages)
        rank.phase("training")
        batch = pack_rollouts(gathered, advantages, rank.config.data.seq_len, self.whole.tokenizer.pad_id)
        batch = batch.pad_rows(self.engine.fitting_rows(len(batch)))
        if self.reference is not None:
            logprobs = self.reference.per_token(batch, self._reference_logprobs)
            batch.extras["ref_logprobs"] = torch.zeros(batch.labels.shape) if logprobs is None else logprobs
        return batch

    def _reference_logprobs(self, model: Transformer, hidden: Tensor, _: Tensor | None, rows: Batch) -> Tensor:
        """log p of the frozen model for one micro-batch: [rows, seq / sp]."""
        return label_logprobs(hidden, model.lm_head, rows.local(rows.labels), self.settings.temperature)

    def _summary(self, rollouts: list[Rollout], rewards: Tensor, advantages: Tensor) -> dict[str, float]:
        groups = rewards.view(-1, self.settings.group_size)
        count = len(rollouts)
        return {
            "reward": float(rewards.mean()),
            **{f"{name}_reward": sum(r.parts[name] for r in rollouts) / count for name in self.settings.rewards},
            "zero_variance_groups": float((groups.std(1) == 0).float().mean()),
            "completion_tokens": sum(len(r.completion_ids) for r in rollouts) / count,
            "unfinished": sum(not r.finished for r in rollouts) / count,
        }
