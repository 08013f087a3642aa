"""What is trained on in a verification, drawn from a seed: rows as DATA_PREP writes them, and answers as GRPO samples.

Tokens mean nothing. Lengths differ, and rows have empty ends, as packed rows do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.generate.decode import Completion
from ray_pipeline.data.rows.packing import Row, RowBuilder, pack_conversations, pack_documents
from ray_pipeline.data.rows.shards import write_rows
from ray_pipeline.rollouts.collector import Group
from ray_pipeline.rollouts.rollout import Marked
from ray_pipeline.settings.schema import GrpoConfig
from ray_pipeline.verification.cases import Subject

STORED = 23  # rows, pairs, or twice as many conversations: no multiple of a batch, so that batches cross epochs
PAD = 0
SAMPLER_NOISE = 0.05  # nats between the sampler's log-probabilities and those of a uniform guess
FINISHED = 0.6  # share of the other answers that are not cut off

Draw = Callable[[int, int], NDArray[np.int64]]  # token ids, as many as a draw between two numbers says


def write_data(folder: Path, subject: Subject) -> None:
    """`pretrain/train`, `sft/train` and `preferences/train` below `folder`; a function of the subject's seed."""
    rng = np.random.default_rng(subject.seed)

    def draw(least: int, most: int) -> NDArray[np.int64]:
        return rng.integers(1, subject.model.vocab_size, int(rng.integers(least, most + 1)))

    half = subject.seq_len // 2
    made = {"pretrain": _documents(draw, half), "sft": _conversations(draw, half), "preferences": _pairs(draw, half)}
    for name, rows in made.items():
        write_rows(
            folder / name / "train",
            rows(subject.seq_len),
            seq_len=subject.seq_len,
            vocab_size=subject.model.vocab_size,
            tokens_per_shard=1 << 20,
        )


def _documents(draw: Draw, half: int) -> Callable[[int], Iterator[Row]]:
    def rows(seq_len: int) -> Iterator[Row]:
        for _ in range(STORED):  # each is a corpus of its own, whose last row is not full
            documents = [draw(2, half).tolist(), draw(2, half).tolist()]
            yield next(pack_documents(documents, seq_len, PAD))

    return rows


def _conversations(draw: Draw, half: int) -> Callable[[int], Iterator[Row]]:
    def rows(seq_len: int) -> Iterator[Row]:
        turns = [(draw(1, half), draw(1, half)) for _ in range(2 * STORED)]
        supervised = [([*question, *answer], [0] * len(question) + [1] * len(answer)) for question, answer in turns]
        yield from pack_conversations(supervised, seq_len, PAD)[0]

    return rows


def _pairs(draw: Draw, half: int) -> Callable[[int], Iterator[Row]]:
    def rows(seq_len: int) -> Iterator[Row]:
        for _ in range(STORED):
            row, question = RowBuilder(seq_len, PAD), draw(1, half // 2)
            for answer in (draw(1, half - half // 2), draw(1, half - half // 2)):
                mask = np.repeat(np.array([0, 1], np.uint8), [len(question), len(answer)])
                row.add(np.concatenate([question, answer]).astype(np.uint32), mask)
            yield row.finish()

    return rows


def made_groups(subject: Subject, settings: GrpoConfig, iteration: int) -> list[Group]:
    """Answers of one iteration. Of each group the first is cut off, maybe others, and never the second: those that are
    score nothing, and with `mask_truncated` train nothing.

    What is trained thus scores above its group's mean. Advantages of both signs add up to nothing: the policy's loss
    would pass zero again and again, where a relative difference is rounding divided by nothing.
    """
    rng, vocab = np.random.default_rng([subject.seed, iteration]), subject.model.vocab_size
    groups = []
    for question in range(settings.prompts_per_step):
        prompt = rng.integers(1, vocab, rng.integers(1, subject.seq_len // 4)).tolist()
        group = []
        for sample in range(settings.group_size):
            answer = rng.integers(1, vocab, rng.integers(1, settings.max_new_tokens + 1)).tolist()
            logprobs = (rng.uniform(-SAMPLER_NOISE, SAMPLER_NOISE, len(answer)) - log(vocab)).tolist()
            finished = sample > 0 and (bool(rng.random() < FINISHED) or sample == 1)
            reward = finished * (1 + 0.2 * float(rng.random()))
            group.append(Marked(Completion(prompt, answer, logprobs, finished), reward, question=question))
        groups.append(group)
    return groups
