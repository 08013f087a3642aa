"""DATA_PREP: text, conversations, questions and preferences become a tokenizer, packed rows and question files, with a
manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.data.rows.conversations import write_conversations
from ray_pipeline.data.rows.manifest import unigram_entropy, write_data_manifest
from ray_pipeline.data.rows.preferences import write_preferences
from ray_pipeline.data.sets.preference_sets import gather_preferences
from ray_pipeline.data.sets.question_sets import QuestionSets, gather_questions
from ray_pipeline.data.shared.decontaminate import Decontaminator
from ray_pipeline.data.sources.sources import licence_of
from ray_pipeline.data.tasks.question import Question
from ray_pipeline.data.text.mixture import Choice
from ray_pipeline.data.text.pretrain_text import clean_corpus, given_tokenizer, make_tokenizer
from ray_pipeline.data.text.text_rows import TextRows
from ray_pipeline.errors import UserError
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.artifacts import read_json, write_json, write_text
from ray_pipeline.records.progress import Progress, Report
from ray_pipeline.settings.chain import chain, reads_text
from ray_pipeline.settings.run_folder import MANIFEST, TOKENIZER
from ray_pipeline.settings.schema import PipelineFields

STAGE = "data_prep"
WORK = ".work"  # clean text, and how far it has become rows; deleted when the stage is done
WORK_SETTINGS = "settings.json"
WORK_FORMAT = 1
TOKENIZER_DONE = "tokenizer.done"


def run(context: StageContext) -> StageResult:
    """Prepare everything the later stages read, into `context.folder`; the manifest comes last."""
    config, folder = context.config, context.folder
    progress = Progress(folder, STAGE, 0)

    def report(phase: str, done: int, total: int | None, unit: str = "") -> None:
        progress.phase(phase, done, total or 0, unit)

    (folder / MANIFEST).unlink(missing_ok=True)  # what it lists is made anew
    clear_leftovers(config, folder)
    report("questions", 0, None)
    sets = gather_questions(config)
    pairs = gather_preferences(config, sets) if "dpo" in chain(config) else None
    if reads_text(config):
        tokenizer, text, counted, entropy = prepare_text(context, sets, report)
    else:
        tokenizer, text, counted, entropy = given_tokenizer(config, folder / TOKENIZER), {}, {}, {}
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
        notices=[f"{name}: {text}" for name, tally in tallies.items() for text in tally.notices()] + mixture(text),
    )
    # Its settings go first: what a deletion that is broken off leaves is not gone on with.
    (folder / WORK / WORK_SETTINGS).unlink()
    shutil.rmtree(folder / WORK)
    progress.phase("finished")
    return StageResult(folder, {k: float(v) for k, v in metrics.items()} | entropy)


def mixture(datasets: dict[str, dict[str, Any]]) -> list[str]:
    """What was made of each source, a line each, where there are several or a file was not read."""
    sources = datasets["pretrain/train"]["sources"] if datasets else []
    lines = []
    for source in sources:
        unread = source["files_not_read"]
        files = f", {len(unread)} files that are no data not read: {', '.join(unread[:5])}" if unread else ""
        if len(sources) > 1 or unread:
            lines.append(
                f"--data {source['name']}: of {source['read']:,} documents {source['documents']:,} are trained on "
                f"({source['epochs']:g} epochs, {source['tokens']:,} tokens); left out {source['left_out']:,}{files}"
            )
    return lines


def prepare_text(
    context: StageContext, sets: QuestionSets, report: Report
) -> tuple[ChatTokenizer, dict[str, dict[str, Any]], dict[str, float], dict[str, float]]:
    """Clean the pretraining text, make the tokenizer and pack the text's rows; each goes on where an attempt broke off.

    Returns:
        The tokenizer, the manifest entries, counts, and {"unigram_entropy": nats per token}.
    """
    config, folder, work = context.config, context.folder, context.folder / WORK
    finder = Decontaminator((q.prompt for q in sets.heldout), config.data.decontaminate_ngram)
    corpus = clean_corpus(config, finder, work, context.guard, report, sets.tallies)
    choice = Choice(corpus, config.data)
    if (work / TOKENIZER_DONE).exists():
        tokenizer = load_tokenizer(folder / TOKENIZER)
    else:
        report("tokenizer", 0, None)
        tokenizer = make_tokenizer(config, choice, sets.conversations, folder / TOKENIZER)
        write_text(work / TOKENIZER_DONE, "")
    packed = TextRows(config, choice, tokenizer, work / "packed.npz").write(folder / "pretrain", report)
    train, validation = packed.datasets["pretrain/train"], packed.datasets["pretrain/validation"]
    facts = train["sources"]
    counts = {
        "documents": sum(source["read"] for source in facts),
        "tokens": train["tokens"],
        "rows": train["rows"],
        "train_documents": train["documents"],
        "validation_documents": validation["documents"],
        "tokens_per_byte": train["tokens"] / max(1, train["bytes"]),
    }
    counts |= {name: sum(source[name] for source in facts) for name in ("empty", "duplicates", "contaminated")}
    counts["documents_left_out"] = sum(source["left_out"] for source in facts)
    counts["files_left_out"] = sum(len(source["files_not_read"]) for source in facts)
    return tokenizer, packed.datasets, counts, {"unigram_entropy": unigram_entropy(packed.counts)}


def clear_leftovers(config: PipelineFields, folder: Path) -> None:
    """Delete what a broken attempt left, but for the pretraining text it prepared with these very settings."""
    settings = {"format": WORK_FORMAT, "seed": config.seed} | {
        name: getattr(config, name).model_dump(mode="json") for name in ("data", "tokenizer")
    }
    parts = ["sft", "prompts", "preferences"]
    path = folder / WORK / WORK_SETTINGS
    if not path.is_file() or read_json(path) != settings:
        parts += [WORK, "tokenizer", "pretrain"]
    for part in parts:
        shutil.rmtree(folder / part, ignore_errors=True)
    write_json(path, settings)


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
