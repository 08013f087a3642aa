"""Answers of a model, every team of ranks its share of the questions, and their packing into rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.generate.decode import Completion, generate
from ray_pipeline.data.chat.completion_text import finite_logits
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.data.rows.loader import rows_to_batch
from ray_pipeline.data.rows.packing import pack_conversations
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.training.sampling_model import SamplingModel, described

Answer = tuple[list[int], list[int]]
"""Ids of a prompt and of its answer, end token included."""


def longest_answer(config: PipelineFields) -> int:
    """Tokens that an answer may have: what evaluation allows, in the half of a row that a question leaves."""
    return min(config.evaluation.max_new_tokens, config.data.seq_len // 2)


def write_answers(
    model: SamplingModel, prompts: Sequence[list[int]], seeds: Sequence[int], *, temperature: float
) -> list[Completion]:
    """One completion per prompt, the same on every rank and however many ranks there are."""
    with finite_logits(*described(model)):
        written = generate(
            model.decoder,
            model.teams.share(prompts),
            max_new_tokens=longest_answer(model.rank.config),
            eos_ids={model.tokenizer.eos_id},
            temperature=temperature,
            seeds=model.teams.share(seeds),
        )
    model.decoder.idle()
    return model.teams.joined(written)


def pack_answers(answers: Sequence[Answer], seq_len: int, pad_id: int) -> Batch:
    """Rows of whole answers with their prompts; the answers' tokens alone are labels.

    Raises:
        ValueError: for an empty answer.
    """
    supervised = [(prompt + answer, [0] * len(prompt) + [1] * len(answer)) for prompt, answer in answers]
    rows, dropped = pack_conversations(supervised, seq_len, pad_id)
    assert dropped == 0, "a question takes half of a row at most, and an answer the other half"
    return rows_to_batch(*(np.stack(field) for field in zip(*rows, strict=True)))
