"""The teacher in training: where its weights come from, and its final hidden states of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import ModelConfig
from model.convert.hf_load import open_folder, read_state
from model.layers.vocab import Head
from model.parallel.mesh import Mesh
from model.parallel.shard_plan import cut, shard_of
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.errors import UserError
from ray_pipeline.layout.layout import layout_of
from ray_pipeline.settings.chain import is_top_k, reads_teacher
from ray_pipeline.settings.run_folder import TOKENIZER
from ray_pipeline.teachers.teacher_folder import KEY, TeacherFolder, compare_tokenizers, open_teacher, student_base
from ray_pipeline.training.finish import read_input
from ray_pipeline.training.rank import Rank


@dataclass(frozen=True)
class Teacher:
    """What DISTILLATION knows of its teacher before it builds anything.

    Attributes:
        base: the architecture that `distillation.student` changes. config, state: of a model of this project's.
        folder: of a teacher that is given. same_tokenizer: its ids are the student's.
    """

    base: ModelConfig
    config: ModelConfig | None = None
    state: Mapping[str, Tensor] | None = None
    folder: TeacherFolder | None = None
    same_tokenizer: bool = True


def load_teacher(rank: Rank) -> Teacher:
    """The stage before, the folder that is given, or nothing where nothing is learned from one.

    Raises:
        UserError: files that are damaged or do not fit, by name.
    """
    name, config = rank.config.distillation.teacher, rank.config
    if not reads_teacher(config) or is_top_k(name):
        return Teacher(config.model)
    if name is None:
        model, state = read_input(rank)
        return Teacher(model, model, state)
    folder = open_teacher(name)
    same = compare_tokenizers(config, folder, rank.data / TOKENIZER)
    base = student_base(config, folder, same_tokenizer=same)
    if folder.config is None:
        return Teacher(base, folder=folder, same_tokenizer=same)
    try:
        opened = open_folder(folder.path)
        return Teacher(base, opened.config, read_state(opened, seed=config.seed), folder, same)
    except ValueError as error:
        raise UserError(f"{KEY}={name}: {error}") from None


def whole_head(weight: Tensor, student: Engine) -> Head | None:
    """A head that is only read, cut as the student's; None on ranks without the student's head.

    Args:
        weight: [vocab_size, hidden_size].
    """
    if student.last_part is None:
        return None
    axis = student.last_part.lm_head.tp
    with torch.device("meta"):
        head = Head(weight.shape[1], weight.shape[0])
    own = cut(weight, shard_of("lm_head.weight"), tp=(axis.index, axis.size))
    head.weight = nn.Parameter(own.detach().clone().to(student.device), requires_grad=False)
    head.tp = axis
    return head


class EngineTeacher:
    """A model of this project's, laid out as the student is, or over the same ranks in a layout of its own.

    Attributes:
        head: on the ranks that hold the student's head.
    """

    def __init__(self, rank: Rank, student: Engine, config: ModelConfig, state: Mapping[str, Tensor]):
        self.rank, self.student = rank, student
        given = rank.config.distillation.teacher_layout
        self.reads_all = given is not None
        if given is None:
            self.engine = rank.engine(config, initial=state)
            self.head = None if self.engine.last_part is None else self.engine.last_part.lm_head
            return
        axes = {**given.model_dump(), "gpus": rank.mesh.world, "schedule": "1f1b", "pp_layout": None}
        layout = rank.config.layout.model_copy(update=axes)
        mesh = Mesh(
            layout_of(layout).on_ranks(rank.mesh.world), timeout=timedelta(seconds=layout.timeout_seconds),
            node=rank.mesh.node,
        )  # fmt: skip
        there = replace(rank, mesh=mesh, config=rank.config.model_copy(update={"layout": layout}))
        self.engine = there.engine(config, initial=state)
        self.head = whole_head(state["lm_head.weight"], student)

    def score(self, batch: Batch) -> Batch:
        """Adds `teacher_hidden` [rows, seq_len, hidden_size], on the ranks that hold the student's head."""
        padded = self.engine.fitted(batch)
        hidden = self.engine.per_token(padded, _final_hidden)
        if self.reads_all:
            hidden = self._redistributed(hidden, len(padded), batch.tokens.shape[1])
        if hidden is not None:
            batch.extras.teacher_hidden = hidden[: len(batch)]
        return batch

    def _redistributed(self, hidden: Tensor | None, rows: int, seq_len: int) -> Tensor | None:
        """From the teacher's replicas and windows to every rank that holds the student's head."""
        sizes, me = self.engine.mesh.sizes, self.engine.mesh.rank
        width, device = self.engine.config.hidden_size, self.student.device
        whole = None if self.student.last_part is None else torch.zeros(rows, seq_len, width)
        share, length = rows // sizes.dp, seq_len // sizes.sp
        for dp in range(sizes.dp):
            for sp in range(sizes.sp):
                place = slice(dp * share, (dp + 1) * share), slice(sp * length, (sp + 1) * length)
                source = sizes.rank({"pp": sizes.pp - 1, "dp": dp, "sp": sp, "tp": 0})
                if source == me:
                    assert hidden is not None, "the last pipeline rank holds the teacher's head"
                    piece = hidden[place].contiguous().to(device)
                else:
                    piece = torch.empty(share, length, width, device=device)
                if sizes.world > 1:
                    dist.broadcast(piece, source)
                if whole is not None:
                    whole[place] = piece.cpu()
        return whole


def _final_hidden(model: Transformer, hidden: Tensor, embeddings: Tensor | None, rows: Batch) -> Tensor:
    return hidden
