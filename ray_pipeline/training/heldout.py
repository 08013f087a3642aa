"""Held-out accuracy of a model in training: every rank answers its share of the questions with the whole model."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.generate.decode import Decoder
from model.parallel.gather import all_ranks_gather
from model.transformer import Transformer
from ray_pipeline.data.chat.completion_text import finite_logits
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.engine.engine import Engine
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.accuracy import EvalResult, evaluate_questions
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import make_again, read_sealed, verify_files
from ray_pipeline.rollouts.agent import answer_with_tools
from ray_pipeline.rollouts.rollout import Sampled
from ray_pipeline.settings.run_folder import SAMPLES_FILE, TOKENIZER
from ray_pipeline.tools.toolbox import ToolBox, listed_tools
from ray_pipeline.training.rank import Rank

SHOWN_SAMPLES = 12


def read_questions(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Questions written by DATA_PREP: prompt, answer, category, difficulty.

    Raises:
        UserError: the file is missing or damaged.
    """
    verify_files(path.parent, [path.name])
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in itertools.islice(lines, limit)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {make_again(path.parent.parent)}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}). {make_again(path.parent.parent)}") from None


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

    def sync(self, engine: Engine) -> WholeModel:
        """Take the engine's current weights."""
        return self.load(engine.full_state())


class HeldOut:
    """The evaluation questions of a run."""

    def __init__(self, rank: Rank, whole: WholeModel):
        self.rank, self.whole = rank, whole
        settings = rank.config.evaluation
        self.questions = read_questions(rank.data / "prompts" / "heldout.jsonl", settings.questions)
        self.max_new_tokens = settings.max_new_tokens
        self.listed = listed_tools(rank.config.tools)

    def evaluate(self) -> EvalResult:
        """Greedy answers of the whole model as it stands; the same result on every rank."""
        rank = self.rank
        rank.phase("evaluating")
        mine = self.questions[rank.mesh.rank :: rank.mesh.world]
        with finite_logits(*self.whole.described()):
            part = evaluate_questions(
                self.whole.decoder, self.whole.tokenizer, mine, max_new_tokens=self.max_new_tokens,
                tools=self.listed, write=self._with_tools if rank.config.tools.names else None,
            )  # fmt: skip
        return EvalResult.merge(all_ranks_gather(rank.mesh, part))

    def _with_tools(self, prompts: list[list[int]]) -> list[Sampled]:
        settings = self.rank.config.tools
        with ToolBox(settings) as toolbox:
            return answer_with_tools(
                self.whole.decoder, self.whole.tokenizer, prompts, toolbox, max_new_tokens=self.max_new_tokens,
                max_calls=settings.max_calls, temperature=0,
            )  # fmt: skip

    def figures(self, *, save_samples: bool = True) -> dict[str, float]:
        """Accuracy, format rate and mean answer length; readable samples go to `folder/samples.json`."""
        result = self.evaluate()
        if self.rank.is_main and save_samples:
            write_sealed(self.rank.folder / SAMPLES_FILE, {"samples": result.samples[:SHOWN_SAMPLES]})
        return {
            "accuracy": result.accuracy,
            "format_rate": result.format_rate,
            "answer_tokens": result.mean_tokens,
            "questions": float(len(result.correct)),
        }

    def baseline(self, name: str) -> float:
        """Accuracy of the model as it stands, measured once per stage and kept in `folder/NAME.json` over resumes."""
        path = self.rank.folder / f"{name}.json"
        known = all_ranks_gather(self.rank.mesh, path.exists())
        if not all(known):
            result = self.evaluate()
            if self.rank.is_main:
                summary = {k: v for k, v in asdict(result).items() if k not in ("samples", "correct")}
                write_sealed(path, summary)
            return result.accuracy
        return float(read_sealed(path, f"Delete {path} and resume: it is measured again.")["accuracy"])
