#!/usr/bin/env python3
"""Learn the same tokens in the same order: our recipes beside nanochat's GPT, a Llama and transformers' DeepseekV3.

python scripts/bench_learning.py --text builtin --text ../shared/data/tinyshakespeare/input.txt   # three seeds, hours
python scripts/bench_learning.py --recipes tiny,tiny-fast --peers nanochat --seeds 2 --equal-time
python scripts/bench_learning.py --quick                                                          # does it run?

All have about the same number of parameters, one tokenizer, the same document masks and held-out rows. With
--equal-time each also trains for as many steps as take the CPU time of the first recipe's. Every finished training is
kept in the JSON file, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ray_pipeline.errors import UserError, did_you_mean  # noqa: E402
from ray_pipeline.settings.layers import recipe_names  # noqa: E402
from scripts.learning_bench.competitors import PEERS  # noqa: E402
from scripts.learning_bench.plot import losses  # noqa: E402
from scripts.learning_bench.race import Plan, race, table  # noqa: E402
from scripts.parallel_bench.results import provenance  # noqa: E402


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", action="append", help="builtin, or a file as --data takes it; may be repeated")
    parser.add_argument("--recipes", default="tiny", help="ours, by the name of the recipe or its file")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}; empty for none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--documents", type=int, default=16000, help="read at most")
    parser.add_argument("--equal-time", action="store_true", help="train each for the first recipe's CPU time as well")
    parser.add_argument("--quick", action="store_true", help="three steps on a little built-in text")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: scripts/results/HARDWARE")
    return parser.parse_args(argv)


def plan_of(given: argparse.Namespace) -> Plan:
    """What is to be trained.

    Raises:
        UserError: an unknown peer or recipe, or a number that is none to train with.
    """
    peers = [name.strip() for name in given.peers.split(",") if name.strip()]
    recipes = [name.strip() for name in given.recipes.split(",") if name.strip()]
    for name in peers:
        if name not in PEERS:
            raise UserError(f"--peers {name}: must be of {', '.join(PEERS)}{did_you_mean(name, PEERS)}")
    for name in recipes:
        if name not in recipe_names() and not Path(name).is_file():
            raise UserError(f"--recipes {name}: no such recipe or file{did_you_mean(name, recipe_names())}")
    if not recipes:
        raise UserError("--recipes: name one at least.")
    for option in ("seeds", "steps", "batch_size", "seq_len", "documents"):
        if getattr(given, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(given, option)}: must be at least 1")
    quick = given.quick
    return Plan(
        texts=tuple(given.text or ["builtin"]), competitors=(*recipes, *peers), seeds=1 if quick else given.seeds,
        steps=3 if quick else given.steps, batch_size=2 if quick else given.batch_size,
        seq_len=64 if quick else given.seq_len, vocab_size=given.vocab_size,
        documents=40 if quick else given.documents, equal_time=given.equal_time,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    about = provenance(ROOT, "cpu")
    folder = given.out or ROOT / "scripts" / "results" / about["hardware"]
    file = folder / "bench_learning.json"
    try:
        plan = plan_of(given)
        folder.mkdir(parents=True, exist_ok=True)
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"trainings": []}
        data = {"benchmark": "bench_learning", **about, "trainings": data["trainings"]}
        for training in race(plan, data["trainings"]):
            print(training.line(), flush=True)
            file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    (folder / "bench_learning.svg").write_text(losses(data), encoding="utf-8")
    print("\n".join(table(data["trainings"])))
    print(file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
