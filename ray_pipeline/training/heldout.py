"""Held-out accuracy of a model in training: every team of ranks answers its share of the questions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model.parallel.gather import all_ranks_gather
from ray_pipeline.data.chat.completion_text import finite_logits
from ray_pipeline.evaluation.asking import AskSettings
from ray_pipeline.evaluation.evaluate import evaluate
from ray_pipeline.evaluation.results import ItemResult, TaskResult, question_digest
from ray_pipeline.evaluation.tasks.question_tasks import run_questions
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import read_sealed
from ray_pipeline.rewards.gym import oracle
from ray_pipeline.settings.run_folder import HELDOUT_FILE, HELDOUT_QUESTIONS, SAMPLES_FILE
from ray_pipeline.training.rank import Rank
from ray_pipeline.training.sampling_model import SamplingModel, described, language_model

SHOWN_SAMPLES = 12


class HeldOut:
    """The evaluation questions of a run."""

    def __init__(self, rank: Rank, model: SamplingModel):
        self.rank, self.model = rank, model
        settings = rank.config.evaluation
        self.task = run_questions(rank.data / HELDOUT_QUESTIONS, settings.questions)
        self.settings = AskSettings(max_new_tokens=settings.max_new_tokens, tools=rank.config.tools)

    def evaluate(self) -> TaskResult:
        """Greedy answers of the model as it stands; the same result on every rank."""
        self.rank.phase("evaluating")
        self.model.sync()
        mine = replace(self.task, items=self.model.teams.share(self.task.items))
        with finite_logits(*described(self.model)):
            part = evaluate(language_model(self.model), mine, self.settings)
        self.model.decoder.idle()
        return replace(part, items=self.model.teams.joined(part.items))

    def figures(self) -> dict[str, float]:
        """Accuracy, format rate and mean answer length; the answers' marks and samples go to files of the folder."""
        result = self.evaluate()
        if self.rank.is_main:
            described = _described(result)
            write_sealed(self.rank.folder / SAMPLES_FILE, {"samples": described["shown"]})
            write_sealed(self.rank.folder / HELDOUT_FILE, described)
        found = result.figures()
        return {
            "accuracy": found["accuracy"],
            "format_rate": found["format_rate"],
            "answer_tokens": found["mean_tokens"],
            "questions": float(found["questions"]),
        }

    def baseline(self, name: str) -> float:
        """Accuracy of the model as it stands, measured once per stage and kept in `folder/NAME.json` over resumes."""
        path = self.rank.folder / f"{name}.json"
        if all(all_ranks_gather(self.rank.mesh, path.exists())):
            return float(read_sealed(path, f"Delete {path} and resume: it is measured again.")["accuracy"])
        found = _described(self.evaluate())
        if self.rank.is_main:
            write_sealed(path, found)
        return float(found["accuracy"])


def _described(result: TaskResult) -> dict[str, Any]:
    """Figures, a mark for each question, by which two models are compared, and the first answers to read."""
    marks = [[question_digest(item.prompt, item.reference), item.share] for item in result.items]
    return result.figures() | {"marks": marks, "shown": [_shown(item) for item in result.items[:SHOWN_SAMPLES]]}


def _shown(item: ItemResult) -> dict[str, Any]:
    """A question with its answer, as reports show it."""
    [sample] = item.answers
    return {
        "prompt": item.prompt,
        "completion": sample.completion,
        "answer": oracle(item.reference) or item.reference,
        **{name: getattr(sample, name) for name in ("correct", "well_formed", "tokens", "finished", "fits")},
        "category": item.category,
        "difficulty": item.difficulty,
    }
