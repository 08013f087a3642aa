"""Held-out accuracy of a model in training: every rank answers its share of the questions with the whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.generate.decode import Decoder
from model.parallel.gather import all_ranks_gather
from model.transformer import Transformer
from ray_pipeline.data.chat.completion_text import finite_logits
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.engine.engine import Engine
from ray_pipeline.evaluation.asking import AskSettings
from ray_pipeline.evaluation.evaluate import evaluate
from ray_pipeline.evaluation.models import LanguageModel, NativeBackend
from ray_pipeline.evaluation.results import ItemResult, TaskResult, question_digest
from ray_pipeline.evaluation.tasks.question_tasks import run_questions
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import read_sealed
from ray_pipeline.rewards.gym import oracle
from ray_pipeline.settings.run_folder import HELDOUT_FILE, HELDOUT_QUESTIONS, SAMPLES_FILE, TOKENIZER
from ray_pipeline.training.rank import Rank

SHOWN_SAMPLES = 12


class WholeModel:
    """A copy of the sharded model on every rank, for sampling and evaluation; refreshed after weights change."""

    def __init__(self, rank: Rank, config: ModelConfig):
        self.rank = rank
        self.model = Transformer(config).to(rank.device).eval().requires_grad_(False)
        self.decoder = Decoder(self.model)
        self.tokenizer = load_tokenizer(rank.data / TOKENIZER)

    def load(self, state: dict[str, Tensor]) -> WholeModel:
        """Take these weights."""
        self.model.load_state_dict(state)
        self.decoder.refresh()
        return self

    def described(self) -> tuple[str, str]:
        """What a message calls this model, and what to do when its logits are no numbers."""
        stage = self.rank.stage
        advice = f"Lower {stage}.optimizer.lr ({self.rank.settings.optimizer.lr}), or train the stage before it again."
        return f"the model of stage {stage}", advice

    def language_model(self) -> LanguageModel:
        """It as evaluation asks it."""
        backend = NativeBackend(self.model, self.decoder)
        return LanguageModel("the model in training", self.tokenizer, frozenset({self.tokenizer.eos_id}), backend)

    def sync(self, engine: Engine) -> WholeModel:
        """Take the engine's current weights."""
        return self.load(engine.full_state())


class HeldOut:
    """The evaluation questions of a run."""

    def __init__(self, rank: Rank, whole: WholeModel):
        self.rank, self.whole = rank, whole
        settings = rank.config.evaluation
        self.task = run_questions(rank.data / HELDOUT_QUESTIONS, settings.questions)
        self.settings = AskSettings(max_new_tokens=settings.max_new_tokens, tools=rank.config.tools)

    def evaluate(self) -> TaskResult:
        """Greedy answers of the whole model as it stands; the same result on every rank."""
        rank, world = self.rank, self.rank.mesh.world
        rank.phase("evaluating")
        mine = replace(self.task, items=self.task.items[rank.mesh.rank :: world])
        with finite_logits(*self.whole.described()):
            part = evaluate(self.whole.language_model(), mine, self.settings)
        parts: list[list[ItemResult]] = all_ranks_gather(rank.mesh, part.items)
        return replace(part, items=[parts[i % world][i // world] for i in range(len(self.task.items))])

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
