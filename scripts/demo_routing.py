#!/usr/bin/env python3
"""How a mixture of experts learns to use its experts evenly: shares drawn step by step, with and without the bias.

python scripts/demo_routing.py                # a minute on one core
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.config import ModelConfig  # noqa: E402
from model.parallel.mesh import Mesh, MeshSizes  # noqa: E402
from ray_pipeline.data.rows.batch import IGNORE, Batch  # noqa: E402
from ray_pipeline.data.text.builtin_text import document_at  # noqa: E402
from ray_pipeline.engine.engine import Engine  # noqa: E402
from ray_pipeline.engine.options import EngineOptions  # noqa: E402
from ray_pipeline.objectives.cross_entropy import CrossEntropy  # noqa: E402
from ray_pipeline.settings.schema import OptimizerConfig  # noqa: E402

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, n_routed_experts=16, num_experts_per_tok=2, num_nextn_predict_layers=0,
    router_bias_update_rate=5e-3, initializer_range=0.05,
)  # fmt: skip
SHADES = " ▁▂▃▄▅▆▇█"
ROWS, SEQ_LEN = 8, 128


def batch(step: int) -> Batch:
    """Bytes of the built-in text, a stretch of one document a row."""
    rows = []
    for row in range(ROWS):
        text = b""
        number = 0
        while len(text) <= SEQ_LEN:
            text += document_at(step, row + ROWS * number).encode() + b"\n"
            number += 1
        rows.append(list(text[: SEQ_LEN + 1]))
    tokens = torch.tensor(rows)
    labels = tokens[:, 1:].clone()
    assert not bool((labels == IGNORE).any())
    return Batch(tokens[:, :-1], labels, torch.zeros(ROWS, SEQ_LEN, dtype=torch.long))


def drawn(shares: torch.Tensor) -> Text:
    """One character an expert: its share of the choices; the full block is three times an even share."""
    even = 1 / len(shares)
    out = Text()
    for share in shares.tolist():
        level = min(len(SHADES) - 1, round(share / (3 * even) * (len(SHADES) - 1)))
        out.append(SHADES[level], style="red" if share > 2 * even or share < even / 4 else "green")
    return out


def train(console: Console, config: ModelConfig, steps: int, title: str) -> None:
    """Train and draw what each layer's experts get."""
    console.rule(title)
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=0)
    engine = Engine(config, Mesh(MeshSizes()), EngineOptions(optimizer=optimizer, seed=0, micro_batch=ROWS))
    for step in range(steps):
        stats = engine.train_step(batch(step), CrossEntropy(0.0), optimizer.lr)
        if step % (steps // 8) == 0 or step == steps - 1:
            line = Text(f"step {step:4d}  loss {stats.loss:.3f}  ")
            for name, load in engine.expert_loads.items():
                line.append(f"{name.split('.')[1]}: ").append(drawn(load / load.sum())).append("  ")
            console.print(line, f"busiest {stats.figures['moe/largest_load']:.1f}x", sep="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    steps = max(8, parser.parse_args().steps)
    console = Console()
    console.print("One column an expert, one group a layer; red: over twice or under a quarter of an even share")
    train(console, replace(CONFIG, router_bias_update_rate=0.0), steps, "no balancing")
    train(console, CONFIG, steps, "DeepSeek-V3's bias, moved against the load after every step")


if __name__ == "__main__":
    main()
