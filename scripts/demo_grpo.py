#!/usr/bin/env python3
"""GRPO on a toy, from reward alone: an untrained model learns to answer with the largest digit that it is shown.

python scripts/demo_grpo.py                   # a minute on one core

Every step samples groups of answers, rewards the right ones, compares each with its group, and trains. No answer is
ever shown to the model. The parts are the pipeline's own: decoder, advantages, packing, objective, engine.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.config import ModelConfig  # noqa: E402
from model.generate.decode import Decoder, generate  # noqa: E402
from model.parallel.mesh import Mesh, MeshSizes  # noqa: E402
from model.transformer import Transformer  # noqa: E402
from ray_pipeline.engine.engine import Engine  # noqa: E402
from ray_pipeline.engine.options import EngineOptions  # noqa: E402
from ray_pipeline.objectives.grpo import Grpo  # noqa: E402
from ray_pipeline.rollouts.advantages import group_advantages  # noqa: E402
from ray_pipeline.rollouts.packed_rows import pack_completions  # noqa: E402
from ray_pipeline.settings.schema import OptimizerConfig  # noqa: E402

ASK, END, PAD = 10, 11, 12  # tokens behind the ten digits
CONFIG = ModelConfig(
    vocab_size=13, hidden_size=48, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, n_routed_experts=4, num_nextn_predict_layers=0, max_position_embeddings=32,
    initializer_range=0.08,
)  # fmt: skip
GROUP, PROMPTS, DIGITS = 8, 16, 3


def prompt(rng: random.Random) -> list[int]:
    """Digits and the question mark."""
    return [*(rng.randrange(10) for _ in range(DIGITS)), ASK]


def reward(question: list[int], answer: list[int]) -> float:
    """1 for the largest digit and then the end; a tenth for any one digit and then the end."""
    if len(answer) != 2 or answer[1] != END or answer[0] >= ASK:
        return 0.0
    return 1.0 if answer[0] == max(question[:DIGITS]) else 0.1


def accuracy(decoder: Decoder, questions: list[list[int]]) -> float:
    """Share of greedy answers that are right."""
    answers = generate(decoder, questions, max_new_tokens=3, eos_ids={END}, temperature=0.0)
    return sum(reward(q, a.tokens) == 1.0 for q, a in zip(questions, answers, strict=True)) / len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    steps = max(1, parser.parse_args().steps)
    rng, console = random.Random(0), Console()
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=0)
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=optimizer, seed=0, micro_batch=64))
    objective = Grpo(beta=0.0, clip_low=0.2, clip_high=0.28, temperature=1.0)
    model = engine.parts[0]
    assert isinstance(model, Transformer)
    decoder = Decoder(model)
    questions = [prompt(random.Random(10_000 + i)) for i in range(200)]
    console.print(f"before: {accuracy(decoder, questions):.1%} of 200 held-out questions")
    history = []
    for step in track(range(steps), "sampling and training", console=console):
        prompts = [q for q in (prompt(rng) for _ in range(PROMPTS)) for _ in range(GROUP)]
        seeds = [step * len(prompts) + i for i in range(len(prompts))]
        answers = generate(decoder, prompts, max_new_tokens=3, eos_ids={END}, temperature=1.0, seeds=seeds)
        rewards = torch.tensor([reward(q, a.tokens) for q, a in zip(prompts, answers, strict=True)])
        advantages = group_advantages(rewards, GROUP)
        history.append(float(rewards.mean()))
        kept = [i for i in range(len(prompts)) if advantages[i] != 0]  # a group of equals teaches nothing
        if kept:
            rows = pack_completions([answers[i] for i in kept], advantages[kept], seq_len=32, pad_id=PAD)
            engine.train_step(rows, objective, optimizer.lr)
            decoder.refresh()
        if (step + 1) % (steps // 10 or 1) == 0:
            recent = history[-(steps // 10 or 1) :]
            mean = sum(recent) / len(recent)
            console.print(f"step {step + 1:4d}  mean reward {mean:.3f}  {'█' * round(40 * mean)}")
    console.print(f"after: {accuracy(decoder, questions):.1%}")
    for question in questions[:3]:
        [answer] = generate(decoder, [question], max_new_tokens=3, eos_ids={END}, temperature=0.0)
        console.print(f"largest of {question[:DIGITS]}? {answer.tokens[0]}")


if __name__ == "__main__":
    main()
