"""The proof card: what became of every export in every program, as export.json and as a table of the model card."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from model.convert.card import model_card
from model.transformer import Transformer
from ray_pipeline.evaluation.export_checks import not_asked
from ray_pipeline.evaluation.proof import Check
from ray_pipeline.launch.stage_context import StageContext
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.settings.chain import lineage, reads_folder
from ray_pipeline.settings.run_folder import EXPORT_CARD

FORMAT = 1
PACKAGES = (
    "ray-pipeline", "torch", "transformers", "safetensors", "tokenizers", "gguf", "xllamacpp", "onnx", "onnxruntime",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of what wrote and read the files; what is not installed is not named."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def write_card(folder: Path, checks: Sequence[Check]) -> None:
    """export.json: versions, programs that were not asked, and every check; sealed with its own SHA-256."""
    write_sealed(
        folder / EXPORT_CARD,
        {
            "format": FORMAT,
            "versions": versions(),
            "not_asked": not_asked(),
            "checks": [check.as_json() for check in checks],
        },
    )


def proof_section(checks: Sequence[Check]) -> str:
    """The part of a model card that says what was compared, in Markdown."""
    lines = [
        "## Proof",
        "Each file was loaded by the programs that read it and compared with the trained model on held-out chats: "
        "token ids, chat template, thinking, tool calls, end tokens, log-probabilities and greedy answers. Perplexity "
        "and accuracy are of held-out text and questions, with full weights in brackets.",
        "",
        "| file | program | result | likeliest token agrees | mean difference of log p | perplexity | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(check) for check in checks]
    notes = [f"- `{check.name}`: {note}" for check in checks for note in check.notes]
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    missing = "".join(f" Not asked: {name} ({why})." for name, why in not_asked().items())
    return "\n".join([*lines, "", *notes, *([""] if notes else []), f"Versions: {used}.{missing}"]) + "\n"


def _row(check: Check) -> str:
    figures = check.figures
    agreed = f"{figures['greedy_agreement']:.1%}" if "greedy_agreement" in figures else ""
    mean = f"{figures['mean_logprob_difference']:.2g}" if "mean_logprob_difference" in figures else ""
    result = check.status + (f": {check.detail}" if check.detail else "")
    cost = [_before(check, name, form) for name, form in (("perplexity", ".4g"), ("accuracy", ".1%"))]
    return f"| {' | '.join([f'`{check.name}`', check.program, result, agreed, mean, *cost])} |"


def _before(check: Check, name: str, form: str) -> str:
    if name not in check.figures:
        return ""
    before = check.figures.get(f"{name}_before")
    return f"{check.figures[name]:{form}}" + ("" if before is None else f" ({before:{form}})")


def card_of(context: StageContext, stage: str, model: Transformer) -> str:
    """README.md of one stage's model, without its proof."""
    config, result = context.config, context.inputs[stage]
    stages = lineage(config, stage)
    data = {source.name: source.licence for source in config.data.pretrain if "pretrain" in stages}
    data |= {f"conversations: {config.data.sft}": "see source", f"questions: {config.data.prompts}": "see source"}
    if "dpo" in stages:
        data[f"preferences: {config.data.preferences}"] = "see source"
    recipe: dict[str, float | str] = {"recipe": config.recipe, "seed": str(config.seed), "weights of stage": stage}
    if reads_folder(config, stages[0]):
        recipe["starts from"] = Path(str(config.init_from.path)).name
    for name in stages:
        settings = getattr(config, name)
        recipe[f"{name} steps"] = str(settings.steps)
        recipe[f"{name} learning rate"] = settings.optimizer.lr
    if "distillation" in stages:
        recipe["distillation loss"] = config.distillation.loss
        if config.distillation.teacher is not None:
            recipe["teacher"] = Path(config.distillation.teacher).name
    return model_card(
        f"{context.run_name} ({stage})",
        model.config,
        licence=context.config.export.licence,
        data=data,
        recipe=recipe,
        figures=result.metrics,
        baselines=result.baselines,
    )
