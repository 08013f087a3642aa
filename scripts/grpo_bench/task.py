"""What both competitors do: the model, its tokenizer, the prompts, the reward and the sizes of a step."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from scripts.model_bench.competitors import SHAPES

# Lengths always differ, so that every group teaches something and is trained by both.
REWARDS = {"answer": 1.0, "format": 0.1, "length": 0.1}
LR = 1e-4
FIRST_STEP = "first_step.pt"  # what the peer trained on first, to be trained on by ours as well


@dataclass(frozen=True)
class Task:
    """One GRPO step: `prompts` questions, `group_size` answers of at most `max_new_tokens` each, one update.

    Attributes:
        beta: weight of the KL to a frozen reference; 0 leaves it out.
    """

    prompts: int = 32
    group_size: int = 8
    max_new_tokens: int = 80
    beta: float = 0.01
    precision: str = "fp32"
    threads: int = 2
    seq_len: int = 512

    @property
    def model(self) -> ModelConfig:
        """The default recipe's, without MTP modules: TRL trains none."""
        return replace(SHAPES["tiny"], max_position_embeddings=512)


def prepare(folder: Path, task: Task, steps: int, seed: int = 0) -> None:
    """Write what a GRPO stage reads: `tokenizer` and `prompts/{train,heldout}.jsonl`."""
    from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
    from ray_pipeline.data.tasks.mixes import PROMPT_MIX, draw_unique
    from ray_pipeline.data.text.builtin_text import document_at

    texts = [document_at(seed, index) for index in range(2000)]
    save_trained(train_bpe(texts, task.model.vocab_size), folder / "tokenizer")
    questions = draw_unique(PROMPT_MIX, seed, "prompts", task.prompts * steps)
    (folder / "prompts").mkdir()
    lines = [json.dumps(question.record(), ensure_ascii=False) + "\n" for question in questions]
    (folder / "prompts" / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "prompts" / "heldout.jsonl").write_text("".join(lines[:8]), encoding="utf-8")


def read_prompts(folder: Path) -> list[dict[str, Any]]:
    """The questions as `prepare` wrote them."""
    with (folder / "prompts" / "train.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
