"""Answers the teacher writes to training prompts; the right ones become the student's rows (arXiv:2501.12948, §2.4)."""

from __future__ import annotations

import torch

from ray_pipeline.artifacts import atomic_path
from ray_pipeline.data.batch import Batch
from ray_pipeline.data.loader import PackedRows, row_order
from ray_pipeline.engine.gather import all_ranks_gather
from ray_pipeline.rollouts.sampler import Rollout, pack_rollouts, sample_groups
from ray_pipeline.training.heldout import WholeModel, read_questions
from ray_pipeline.training.rank import Rank

CHUNK = 128  # questions per rank between progress reports


class MixedRows:
    """Packed rows from disk followed by rows in memory, drawn in one seeded order per epoch."""

    def __init__(self, stored: PackedRows, extra: Batch | None):
        self.stored, self.extra = stored, extra

    def __len__(self) -> int:
        return len(self.stored) + (0 if self.extra is None else len(self.extra))

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Rows of one step; a pure function of its arguments."""
        picked = []
        for index in row_order(len(self), seed, step, batch_size):
            if index < len(self.stored):
                picked.append(self.stored.slice(index, index + 1))
            else:
                assert self.extra is not None
                at = index - len(self.stored)
                picked.append(self.extra.rows(at, at + 1))
        return Batch(
            torch.cat([row.tokens for row in picked]),
            torch.cat([row.labels for row in picked]),
            torch.cat([row.doc_ids for row in picked]),
        )


def teacher_answer_rows(rank: Rank, teacher: WholeModel) -> Batch | None:
    """Packed rows of the teacher's right answers; sampled once and kept in `folder/teacher_answers.pt`."""
    path = rank.folder / "teacher_answers.pt"
    if not all(all_ranks_gather(rank.mesh, path.exists())):
        right = [r for r in _sample(rank, teacher) if r.parts["answer"] > 0]
        # Advantages of one mark every completion token as trained; the packer is GRPO's.
        seq_len, pad = rank.config.data.seq_len, teacher.tokenizer.pad_id
        rows = pack_rollouts(right, torch.ones(len(right)), seq_len, pad) if right else None
        if rank.is_main:
            with atomic_path(path) as aside:
                torch.save(None if rows is None else (rows.tokens, rows.labels, rows.doc_ids), aside)
        all_ranks_gather(rank.mesh, None)  # nobody reads before the file is there
    stored = torch.load(path)
    return None if stored is None else Batch(*stored)


def _sample(rank: Rank, teacher: WholeModel) -> list[Rollout]:
    settings = rank.config
    wanted = settings.distillation.teacher_answers
    questions = read_questions(rank.data / "prompts" / "train.jsonl", wanted)
    mine = list(range(rank.mesh.rank, len(questions), rank.mesh.world))
    out: list[Rollout] = []
    for start in range(0, len(mine), CHUNK):
        rank.phase("teacher answers", start * rank.mesh.world, len(questions))
        part = mine[start : start + CHUNK]
        out += sample_groups(
            teacher.decoder,
            teacher.tokenizer,
            [questions[i] for i in part],
            group_size=1,
            seed=settings.seed,
            step=0,
            indices=part,
            max_new_tokens=settings.grpo.max_new_tokens,
            temperature=settings.grpo.temperature,
            weights={"answer": 1.0},
        )
    gathered = [rollout for part in all_ranks_gather(rank.mesh, out) for rollout in part]
    return sorted(gathered, key=lambda rollout: rollout.question_index)
