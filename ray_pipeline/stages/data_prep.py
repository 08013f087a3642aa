"""DATA_PREP: text, conversations, questions and preferences become a tokenizer, packed rows and question files, with a
manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_pipeline.artifacts import write_text
from ray_pipeline.config import PipelineFields
from ray_pipeline.data.conversations import write_conversations
from ray_pipeline.data.decontaminate import Decontaminator
from ray_pipeline.data.manifest import unigram_entropy, write_data_manifest
from ray_pipeline.data.preference_sets import gather_preferences
from ray_pipeline.data.preferences import write_preferences
from ray_pipeline.data.pretrain_text import PackedText, Split, given_tokenizer, make_tokenizer, mixture_documents
from ray_pipeline.data.question_sets import QuestionSets, gather_questions
from ray_pipeline.data.ray_prepare import clean_documents
from ray_pipeline.data.sources import licence_of
from ray_pipeline.data.tasks.question import Question
from ray_pipeline.data.tokenizer import ChatTokenizer
from ray_pipeline.errors import UserError
from ray_pipeline.progress import Progress
from ray_pipeline.stage_chain import chain, reads_text
from ray_pipeline.stages.base import StageContext, StageResult

STAGE = "data_prep"
Report = Callable[[str, int, int | None], None]
"""Told (phase, done, total) while the data is prepared."""


def run(context: StageContext) -> StageResult:
    """Prepare everything the later stages read, into `context.folder`; the manifest comes last."""
    config, folder = context.config, context.folder
    progress = Progress(folder, STAGE, 0)

    def report(phase: str, done: int, total: int | None) -> None:
        progress.phase(phase, done, total or 0)

    for part in ("tokenizer", "pretrain", "sft", "prompts", "preferences"):
        shutil.rmtree(folder / part, ignore_errors=True)  # a broken attempt may have left files of other settings
    report("questions", 0, None)
    sets = gather_questions(config)
    pairs = gather_preferences(config, sets) if "dpo" in chain(config) else None
    if reads_text(config):
        tokenizer, text, counted, entropy = prepare_text(config, sets, folder, report)
    else:
        tokenizer, text, counted, entropy = given_tokenizer(config, folder / "tokenizer"), {}, {}, {}
    sft, too_long = write_conversations(
        config, sets.conversations, tokenizer, folder / "sft", report, sets.tallies.get(f"--sft-data {config.data.sft}")
    )
    prompts, left_out = write_questions(config, sets, tokenizer, folder / "prompts")
    preferences: dict[str, dict[str, Any]] = {}
    if pairs is not None:
        preferences, counts = write_preferences(
            config, pairs.pairs, tokenizer, folder / "preferences", report, pairs.tally
        )
        left_out |= pairs.counts() | counts
    tallies = sets.tallies | ({} if pairs is None else {f"--preference-data {config.data.preferences}": pairs.tally})
    metrics = counted | _metrics(sets, sft, prompts) | {"conversations_too_long": too_long} | left_out
    write_data_manifest(
        folder,
        text | sft | prompts | preferences,
        **entropy,
        seq_len=config.data.seq_len,
        tokenizer={"name": config.tokenizer.name, "vocab_size": len(tokenizer)},
        metrics=metrics,
        reading={name: tally.facts() for name, tally in tallies.items()},
        notices=[f"{name}: {text}" for name, tally in tallies.items() for text in tally.notices()],
    )
    progress.phase("finished")
    return StageResult(folder, {k: float(v) for k, v in metrics.items()} | entropy)


def prepare_text(
    config: PipelineFields, sets: QuestionSets, folder: Path, report: Report
) -> tuple[ChatTokenizer, dict[str, dict[str, Any]], dict[str, float], dict[str, float]]:
    """Clean the pretraining text, make the tokenizer and pack the text's rows.

    Returns:
        The tokenizer, the manifest entries, counts, and {"unigram_entropy": nats per token}.
    """
    finder = Decontaminator((q.prompt for q in sets.heldout), config.data.decontaminate_ngram)
    corpus = clean_documents(mixture_documents(config, sets.tallies), finder, report)
    split = Split(corpus, config.data)
    report("tokenizer", 0, None)
    tokenizer = make_tokenizer(config, corpus, split, sets.conversations, folder / "tokenizer")
    packed = PackedText(config, corpus, split, tokenizer).write(folder / "pretrain", report)
    train, validation = packed.datasets["pretrain/train"], packed.datasets["pretrain/validation"]
    counts = {
        "documents": corpus.read,
        "tokens": train["tokens"],
        "rows": train["rows"],
        "train_documents": train["documents"],
        "validation_documents": validation["documents"],
        "tokens_per_byte": train["tokens"] / max(1, train["bytes"]),
        "empty": corpus.empty,
        "duplicates": corpus.duplicates,
        "contaminated": corpus.contaminated,
    }
    return tokenizer, packed.datasets, counts, {"unigram_entropy": unigram_entropy(packed.counts)}


def write_questions(
    config: PipelineFields, sets: QuestionSets, tokenizer: ChatTokenizer, folder: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Write train.jsonl and heldout.jsonl.

    A question may take half of seq_len, so that the other half is left for the answer; longer ones are left out.

    Returns:
        The manifest entries, and how many questions were left out.
    Raises:
        UserError: no question fits.
    """
    datasets, left_out = {}, {}
    limit = config.data.seq_len // 2
    for name, questions in (("train", sets.train), ("heldout", sets.heldout)):
        lengths = [len(tokenizer.encode_prompt(q.prompt)) for q in questions]
        kept = [q for q, length in zip(questions, lengths, strict=True) if length <= limit]
        if not kept:
            raise UserError(
                f"--prompt-data {config.data.prompts}: none of the {len(questions)} {name} questions fits into {limit} "
                f"tokens, half of seq_len (the shortest has {min(lengths, default=0)}). Use a larger --seq-len."
            )
        write_text(folder / f"{name}.jsonl", "".join(_line(q) for q in kept))
        left_out[f"{name}_questions_too_long"] = len(questions) - len(kept)
        source = {"name": config.data.prompts, "licence": licence_of(config.data.prompts), "documents": len(kept)}
        datasets[f"prompts/{name}"] = {"rows": len(kept), "documents": len(kept), "sources": [source]}
    return datasets, left_out


def _line(question: Question) -> str:
    return json.dumps(question.record(), ensure_ascii=False) + "\n"


def _metrics(
    sets: QuestionSets,
    sft: dict[str, dict[str, Any]],
    prompts: dict[str, dict[str, Any]],
) -> dict[str, float]:
    return {
        "conversations": sft["sft/train"]["documents"] + sft["sft/validation"]["documents"],
        "conversation_rows": sft["sft/train"]["rows"],
        "conversation_duplicates": sets.duplicates,
        "conversations_contaminated": sets.contaminated,
        "train_questions": prompts["prompts/train"]["rows"],
        "heldout_questions": prompts["prompts/heldout"]["rows"],
    }
