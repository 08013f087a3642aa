"""One question to a model, for the verbs that hold its answer against something: options, asking, showing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ray_pipeline.cli.options import check_temperature, grouped
from ray_pipeline.cli.runs import output_dir
from ray_pipeline.errors import UserError
from ray_pipeline.settings.section import MOST_SEED

if TYPE_CHECKING:
    from rich.console import Console

    from ray_pipeline.evaluation.model_source import ModelSource
    from ray_pipeline.evaluation.models import LanguageModel
    from ray_pipeline.reasoning import Reasoned

# The options of a verb that asks one question; all but `as_json` go to `open_model` and `ask` as they are.
answer_options = grouped(
    click.option("--stage", help="Of a run. Default: the last of pretrain, sft, dpo, grpo; RUN:STAGE says the same."),
    click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy."),
    click.option(
        "--max-new-tokens", type=click.IntRange(1, 1 << 27), help="Of the answer. Default: as its run, or 512."
    ),
    click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of text."),
    click.option("--output-dir", "runs_dir", help="Folder of all runs. Default: runs."),
)


@dataclass(frozen=True)
class ModelAnswer:
    """A question and what a model wrote. finished: it ended by itself, and not at the limit of tokens."""

    model: str
    question: str
    reasoned: Reasoned
    finished: bool

    @property
    def text(self) -> str:
        """All that was written, thinking included."""
        return self.reasoned.text

    @property
    def answer(self) -> str | None:
        """What follows the thinking; None where that never ended."""
        return None if self.reasoned.answer is None else self.reasoned.answer.strip()

    def as_values(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "question": self.question,
            "steps": list(self.reasoned.steps),
            "answer": self.answer,
            "finished": self.finished,
        }

    def show(self, console: Console) -> None:
        """Print the steps of thinking, then the answer."""
        for number, step in enumerate(self.reasoned.steps, start=1):
            console.print(f"  {number:2d}  {step}", style="dim", markup=False, highlight=False)
        said = "(still thinking where it was cut)" if self.answer is None else self.answer or "(an empty answer)"
        console.print(said, style="bold", markup=False, highlight=False)
        if not self.finished:
            console.print("Cut at the limit of tokens; --max-new-tokens allows more.", style="yellow", highlight=False)


def open_model(model: str, options: Mapping[str, Any]) -> tuple[LanguageModel, ModelSource]:
    """The model that is named, loaded.

    Raises:
        UserError: nothing of the kind, not finished, or damaged.
    """
    from ray_pipeline.cli.eval_target import find_model

    check_temperature(options["temperature"])
    source = find_model(model, options["stage"], output_dir(options["runs_dir"]))
    from ray_pipeline.evaluation.models import load

    return load(source), source


def ask(
    model: LanguageModel,
    source: ModelSource,
    question: str,
    options: Mapping[str, Any],
    *,
    subject: str = "The question",
    hint: str = "Shorten it.",
) -> ModelAnswer:
    """The model's answer to one question.

    Args:
        subject, hint: what is too long, and what to do about it, if it is.
    Raises:
        UserError: the question does not fit into the context, or the model computes no numbers.
    """
    from ray_pipeline.data.chat.completion_text import finite_logits
    from ray_pipeline.reasoning import parse

    prompt = model.prompt(question)
    if len(prompt) >= model.backend.context:
        raise UserError(
            f"{subject} is {len(prompt)} tokens long: {model.name} reads {model.backend.context}, answer included. "
            f"{hint}"
        )
    with finite_logits(f"the model {model.name}", "Take an earlier stage's, or train it again."):
        [written] = model.backend.generate(
            [prompt], max_new_tokens=options["max_new_tokens"] or source.max_new_tokens or 512,
            temperature=options["temperature"], seeds=[options["seed"]], eos_ids=model.eos_ids,
        )  # fmt: skip
    return ModelAnswer(model.name, question, parse(model.text(prompt, written.tokens)), written.finished)
