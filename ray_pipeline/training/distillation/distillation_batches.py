"""What the student learns on: conversations, the teacher's answers, its own. Functions of (seed, step, weights)."""

from __future__ import annotations

from typing import Any, Protocol

from model.layers.vocab import Head
from ray_pipeline.data.rows.batch import Batch, join_rows
from ray_pipeline.data.rows.loader import PackedRows, row_order
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.own_rows import own_rows
from ray_pipeline.rollouts.rollout import request_seed
from ray_pipeline.training.distillation.student_answers import pack_answers, write_answers
from ray_pipeline.training.rank import Rank
from ray_pipeline.training.sampling_model import SamplingModel


class Rows(Protocol):
    """Rows drawn by step."""

    def batch(self, seed: int, step: int, batch_size: int, part: slice = slice(None)) -> Batch:
        """Rows of one step, or a part of them; a pure function of its arguments."""
        ...


class Scorer(Protocol):
    """The teacher's view of a batch.

    Attributes:
        head: the teacher's, on the ranks that hold the student's.
        reads_all: every rank has to bring the whole batch, as the teacher's replicas are others than the student's.
    """

    head: Head | None
    reads_all: bool

    def score(self, batch: Batch) -> Batch:
        """The batch with what the objective reads of the teacher among its extras."""
        ...


class MixedRows:
    """Packed rows from disk, if any, followed by rows in memory, drawn in one seeded order per epoch."""

    def __init__(self, stored: PackedRows | None, extra: Batch | None):
        self.stored, self.extra = stored, extra
        self.on_disk = 0 if stored is None else len(stored)

    def __len__(self) -> int:
        return self.on_disk + (0 if self.extra is None else len(self.extra))

    def batch(self, seed: int, step: int, batch_size: int, part: slice = slice(None)) -> Batch:
        """As `Rows.batch`."""
        return join_rows([self._row(index) for index in row_order(len(self), seed, step, batch_size, part)])

    def _row(self, index: int) -> Batch:
        if index < self.on_disk:
            assert self.stored is not None
            return self.stored.slice(index, index + 1)
        assert self.extra is not None
        return self.extra.rows(index - self.on_disk, index - self.on_disk + 1)


class StudentAnswers:
    """The student's own answers to training questions, written with its weights of this very step (GKD,
    arXiv:2306.13649): a resumed run has the same weights, and so writes the same."""

    def __init__(self, engine: Engine, model: SamplingModel, questions: list[dict[str, Any]]):
        self.rank, self.engine, self.model, self.questions = model.rank, engine, model, questions
        self.figures: dict[str, float] = {}

    def batch(self, step: int) -> Batch:
        """As many rows as the answers fill, padded to what a training step needs."""
        rank, settings = self.rank, self.rank.config.distillation
        rank.phase("the student answers")
        self.model.sync()
        seed, tokenizer = rank.config.seed, self.model.tokenizer
        chosen = row_order(len(self.questions), seed, step, settings.prompts_per_step)
        prompts = [tokenizer.encode_prompt(self.questions[i]["prompt"]) for i in chosen]
        seeds = [request_seed(seed, step, place, 0) for place in range(len(prompts))]
        written = write_answers(self.model, prompts, seeds, temperature=settings.sampling_temperature)
        rank.phase("training")
        lengths = [len(completion.tokens) for completion in written]
        self.figures = {
            "answer_tokens": sum(lengths) / len(lengths),
            "unfinished": sum(not completion.finished for completion in written) / len(written),
        }
        answers = [(completion.prompt, completion.tokens) for completion in written]
        batch = pack_answers(answers, rank.config.data.seq_len, tokenizer.pad_id)
        return self.engine.fitted(batch)


class DistillationSource:
    """Batches of the rows, and for a share of the steps of the student's answers, with the teacher's view of them."""

    def __init__(self, rank: Rank, rows: Rows | None, answers: StudentAnswers | None, teacher: Scorer | None):
        self.rank, self.rows, self.answers, self.teacher = rank, rows, answers, teacher
        self._on_policy = False

    def batch(self, step: int) -> Batch:
        """This replica's rows of a step, or all of them; with the teacher's view of them on the head's ranks alone."""
        settings, seed = self.rank.config.distillation, self.rank.config.seed
        dp = self.rank.mesh.dp
        all_rows = (self.teacher is not None and self.teacher.reads_all) or settings.batch_size % dp > 0
        self._on_policy = is_on_policy(seed, step, settings.on_policy)
        if self._on_policy:
            assert self.answers is not None
            batch = self.answers.batch(step)
            if not all_rows:
                batch = own_rows(self.answers.engine, batch)
        else:
            assert self.rows is not None
            index, count = (0, 1) if all_rows else self.rank.mesh.replica
            share = settings.batch_size // count
            part = slice(index * share, (index + 1) * share)
            batch = self.rows.batch(seed, step, settings.batch_size, part)
            batch.start = None if all_rows else part.start
        return batch if self.teacher is None else self.teacher.score(batch)

    def metrics(self) -> dict[str, float]:
        """Of the latest batch."""
        if self.answers is None:
            return {}
        return {"on_policy": float(self._on_policy)} | (self.answers.figures if self._on_policy else {})


def is_on_policy(seed: int, step: int, share: float) -> bool:
    """Whether the student answers at this step: a draw of its own for every step."""
    return request_seed(seed, step, -1, 0) < share * 2**63
