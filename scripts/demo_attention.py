#!/usr/bin/env python3
"""Every kind of attention side by side: weights, what decoding remembers of a token, what a query reads, its speed.

python scripts/demo_attention.py                      # a minute on one core
python scripts/demo_attention.py --seq-len 2048
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.config import ModelConfig  # noqa: E402
from model.generate.decode import Decoder  # noqa: E402
from model.init import init_weights  # noqa: E402
from model.transformer import Transformer  # noqa: E402

BASE = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, first_k_dense_replace=4,
    num_attention_heads=8, head_dim=32, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
    v_head_dim=32, num_nextn_predict_layers=0, index_topk=128, sliding_window=64, global_stride=16,
)  # fmt: skip
KINDS = {
    "mha": replace(BASE, attention="mha"),
    "gqa, 2 keys": replace(BASE, attention="gqa", num_key_value_heads=2),
    "mqa": replace(BASE, attention="mqa"),
    "sliding": replace(BASE, attention="sliding"),
    "mla": BASE,
    "dsa": replace(BASE, attention="dsa"),
}


def measure(config: ModelConfig, seq_len: int, steps: int) -> tuple[float, float, float]:
    """(cached numbers of a token in one layer, seconds of the prompt, decoded tokens a second)."""
    model = Transformer(replace(config, max_position_embeddings=seq_len + steps)).eval().requires_grad_(False)
    init_weights(model, config, seed=0)
    decoder = Decoder(model)
    prompt = torch.randint(0, config.vocab_size, (seq_len,), generator=torch.Generator().manual_seed(0)).tolist()
    started = time.perf_counter()
    logits, cache = decoder.prefill([prompt], steps)
    prefill = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(steps):
        logits = decoder.step(logits.argmax(-1), cache)
    decoded = steps / (time.perf_counter() - started)
    numbers = sum(layer.shape[2] for layer in cache.layers) / len(cache.layers)
    return numbers, prefill, decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens to decode")
    arguments = parser.parse_args()
    table = Table(title=f"width {BASE.hidden_size}, {BASE.num_attention_heads} heads, {arguments.seq_len:,} tokens")
    for name in ("attention", "weights", "cached", "of mha's", "reads", "prompt", "tokens/s"):
        table.add_column(name, justify="left" if name == "attention" else "right")
    whole = 0.0
    for name, config in KINDS.items():
        numbers, prefill, decoded = measure(config, arguments.seq_len, arguments.steps)
        whole = whole or numbers
        reads = config.attended_tokens(arguments.seq_len)
        row = (f"{config.attention_params():,}", f"{numbers:.0f}", f"{numbers / whole:.0%}", f"{reads:,}")
        table.add_row(name, *row, f"{prefill:.2f} s", f"{decoded:.0f}")
    console = Console()
    console.print(table)
    console.print(
        "weights: of one layer's attention. cached: numbers a layer remembers of each token.\n"
        "reads: tokens that a query reads on average in a causal row. tokens/s: decoded, one row.\n"
        "dsa remembers what mla does and its indexer's key."
    )


if __name__ == "__main__":
    main()
