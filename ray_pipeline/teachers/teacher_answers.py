"""Answers the teacher writes to training prompts; the right ones become the student's rows (arXiv:2501.12948, §2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model.generate.decode import Completion
from model.parallel.gather import all_ranks_gather
from ray_pipeline.data.chat.completion_text import completion_text
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.data.rows.batch import Batch, real_tokens
from ray_pipeline.data.tasks.question import prepared_questions
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.marking import are_right
from ray_pipeline.records.artifacts import atomic_folder
from ray_pipeline.records.integrity import damage
from ray_pipeline.rollouts.rollout import request_seed
from ray_pipeline.settings.run_folder import TOKENIZER, TRAIN_QUESTIONS
from ray_pipeline.teachers.engine_teacher import Teacher
from ray_pipeline.training.distillation.student_answers import Answer, longest_answer, pack_answers, write_answers
from ray_pipeline.training.rank import Rank
from ray_pipeline.training.sampling_model import frozen_model

ROWS = ("tokens", "labels", "doc_ids")  # what is kept of a batch
CHUNK = 128  # questions per rank between progress reports


def teacher_answer_rows(rank: Rank, teacher: Teacher) -> Batch | None:
    """Packed rows of the teacher's right answers; written once and kept in `folder/teacher_answers`.

    Raises:
        UserError: what an earlier attempt kept there is damaged.
    """
    folder = rank.folder / "teacher_answers"
    if not all(all_ranks_gather(rank.mesh, folder.is_dir())):
        own = load_tokenizer(rank.data / TOKENIZER)
        wanted = rank.config.distillation.teacher_answers
        questions = prepared_questions(rank.data / TRAIN_QUESTIONS, wanted)
        if teacher.config is not None:
            right = _from_own_model(rank, teacher, questions, own)
        else:
            right = _from_transformers(rank, teacher, questions, own)
        rows = pack_answers(right, rank.config.data.seq_len, own.pad_id) if right else None
        if rank.is_main:
            with atomic_folder(folder) as aside:
                kept = {} if rows is None else {name: getattr(rows, name).contiguous() for name in ROWS}
                save_file(kept, aside / "rows.safetensors")
        all_ranks_gather(rank.mesh, None)  # nobody reads before the file is there
    if found := damage(folder):
        raise UserError(f"{found}. Delete {folder} and resume: the teacher writes its answers again.")
    stored = load_file(folder / "rows.safetensors")
    if not stored:
        return None
    tokens, labels, doc_ids = (stored[name] for name in ROWS)
    return Batch(tokens, labels, doc_ids, real=real_tokens(doc_ids, labels))


def retokenised(tokenizer: ChatTokenizer, question: dict[str, Any], text: str, seq_len: int) -> Answer | None:
    """A written answer in the student's tokens; None where it does not fit into a row."""
    messages = [{"role": "user", "content": question["prompt"]}, {"role": "assistant", "content": text}]
    ids, mask = tokenizer.encode_chat(messages)
    if len(ids) > seq_len + 1 or not any(mask):
        return None
    start = mask.index(1)
    return ids[:start], ids[start : len(mask) - mask[::-1].index(1)]


def _marks(questions: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[bool]:
    """Whether each answer's result is its question's."""
    return are_right([(q["prompt"], text, str(q["answer"])) for q, text in zip(questions, texts, strict=True)])


def _from_own_model(
    rank: Rank, teacher: Teacher, questions: Sequence[dict[str, Any]], own: ChatTokenizer
) -> list[Answer]:
    assert teacher.config is not None and teacher.state is not None
    settings, seq_len = rank.config, rank.config.data.seq_len
    model = frozen_model(rank, teacher.config, teacher.state)
    if teacher.folder is not None and teacher.folder.tokenizer is not None:
        model.tokenizer = load_tokenizer(teacher.folder.tokenizer)
    room = teacher.config.max_position_embeddings
    asked: list[dict[str, Any]] = []
    written: list[Completion] = []
    for start in range(0, len(questions), CHUNK * rank.mesh.world):
        rank.phase("teacher answers", start, len(questions))
        part = questions[start : start + CHUNK * rank.mesh.world]
        prompts = [model.tokenizer.encode_prompt(question["prompt"]) for question in part]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < room]
        seeds = [request_seed(settings.seed, 0, start + i, 0) for i in fitting]
        temperature = settings.distillation.sampling_temperature
        asked += [part[i] for i in fitting]
        written += write_answers(model, [prompts[i] for i in fitting], seeds, temperature=temperature)
    eos_ids = (model.tokenizer.eos_id,)
    texts = [completion_text(model.tokenizer, c.prompt, c.tokens, eos_ids) for c in written]
    right: list[Answer | None] = []
    for question, completion, text, mark in zip(asked, written, texts, _marks(asked, texts), strict=True):
        if completion.finished and mark:
            # With the same tokenizer what was sampled is what is trained: nothing is tokenised again.
            same = (completion.prompt, completion.tokens)
            right.append(same if teacher.same_tokenizer else retokenised(own, question, text, seq_len))
    return [answer for answer in right if answer is not None]


def _from_transformers(
    rank: Rank, teacher: Teacher, questions: Sequence[dict[str, Any]], own: ChatTokenizer
) -> list[Answer]:
    from ray_pipeline.teachers.transformers_teacher import AT_ONCE, load_teacher_lm, write_texts

    assert teacher.folder is not None and teacher.folder.tokenizer is not None
    config = rank.config
    model = load_teacher_lm(teacher.folder.path, rank.device, torch.float32)
    theirs = load_tokenizer(teacher.folder.tokenizer)
    starts = range(0, len(questions), AT_ONCE)
    places: list[int] = []
    texts: list[str] = []
    for start in starts[rank.mesh.rank :: rank.mesh.world]:  # whole groups, so that draws do not depend on the ranks
        rank.phase("teacher answers", start, len(questions))
        part = questions[start : start + AT_ONCE]
        places += range(start, start + len(part))
        texts += write_texts(
            model, theirs, [question["prompt"] for question in part], first=start, seed=config.seed,
            max_new_tokens=longest_answer(config), temperature=config.distillation.sampling_temperature,
        )  # fmt: skip
    mine: list[tuple[int, Answer]] = []
    for place, text, mark in zip(places, texts, _marks([questions[i] for i in places], texts), strict=True):
        answer = retokenised(own, questions[place], text, config.data.seq_len) if mark else None
        if answer is not None:
            mine.append((place, answer))
    everyone = [pair for part in all_ranks_gather(rank.mesh, mine) for pair in part]
    return [answer for _, answer in sorted(everyone)]
