"""One part in a process of its own: `python -m scripts.gpu_parts.child PART DEVICE FACTS.jsonl`."""

from __future__ import annotations

import json
import sys

import torch

from scripts.gpu_parts import operations, training

PARTS = {
    "environment": operations.environment,
    "attention": operations.attention,
    "experts": operations.experts,
    "parity": training.parity,
    "stages": training.stages,
    "waits": training.waits,
    "block": training.block,
    "steps": training.steps,
    "decoding": training.decoding,
    "ranks": training.ranks,
}

if __name__ == "__main__":
    part, device, path = sys.argv[1:]
    with open(path, "a", buffering=1, encoding="utf-8") as file:
        for fact in PARTS[part](torch.device(device)):
            file.write(json.dumps(fact, default=str) + "\n")
