#!/usr/bin/env python3
"""Fit the law that `run --compute` and `--minutes` choose by: trainings of four widths, and one wider to judge it.

python scripts/fit_law.py mine --data my/text.txt                          # half an hour on one core
python scripts/fit_law.py mine --data my/text/*.jsonl --widths 64,96,128,192 --steps 400,800,1600 --judge 256:1600
python scripts/fit_law.py quick --quick --out /tmp/law                     # does it run?

DATA_PREP of the tiny recipe reads the text, as a run would; each model then trains on its rows as PRETRAIN does, in one
process. The loss of the wider model is predicted before it is trained. Every finished training is kept, and a second
call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from model.parallel.mesh import Mesh, MeshSizes  # noqa: E402
from ray_pipeline.cli import main as cli  # noqa: E402
from ray_pipeline.costs.scaling_law import (  # noqa: E402
    ScalingLaw,
    fit,
    law_text,
    model_of,
    params_of,
    settings_of,
)
from ray_pipeline.data.rows.loader import PackedRows  # noqa: E402
from ray_pipeline.engine.engine import Engine  # noqa: E402
from ray_pipeline.engine.optimizer import learning_rate  # noqa: E402
from ray_pipeline.engine.options import EngineOptions  # noqa: E402
from ray_pipeline.errors import UserError  # noqa: E402
from ray_pipeline.objectives.cross_entropy import CrossEntropy  # noqa: E402
from ray_pipeline.records.integrity import read_sealed  # noqa: E402
from ray_pipeline.settings.loading import load_config  # noqa: E402
from ray_pipeline.settings.run_folder import MANIFEST  # noqa: E402
from ray_pipeline.settings.schema import PipelineFields  # noqa: E402
from ray_pipeline.stages.pretrain import HELD_OUT_TOKENS  # noqa: E402
from ray_pipeline.training.validation import validation_loss  # noqa: E402
from scripts.parallel_bench.results import provenance  # noqa: E402

SHOW = 60.0  # seconds between two lines of progress


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of the law, for --law")
    parser.add_argument("--data", action="append", help="as `run` takes it; default: the built-in text")
    parser.add_argument("--widths", default="48,64,96,128")
    parser.add_argument("--steps", default="200,400,800", help="of every width")
    parser.add_argument("--judge", default="192:800", help="WIDTH:STEPS of the training that is predicted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps on a little text")
    parser.add_argument("--out", type=Path, default=None, help="folder of the law; default: configs/laws")
    parser.add_argument("--work", type=Path, default=ROOT / "runs", help="folder of DATA_PREP's run")
    return parser.parse_args(argv)


def prepared(given: argparse.Namespace) -> tuple[PipelineFields, Path]:
    """The tiny recipe's settings on the given text, and the folder of its rows; DATA_PREP runs if it has not yet."""
    name = f"law-{given.name}"
    options = [word for source in given.data or () for word in ("--data", source)]
    if given.quick:
        options += ["--set", "data.builtin_documents=300", "--set", "data.builtin_conversations=200",
                    "--set", "data.builtin_prompts=60", "--set", "data.heldout_questions=20",
                    "--set", "evaluation.questions=20"]  # fmt: skip
    place = ["--run-name", name, "--output-dir", str(given.work), "--seed", str(given.seed)]
    code = cli(["run", "--config", "tiny", "--until", "data_prep", *place, *options])
    if code:
        raise SystemExit(code)
    config = load_config(given.work / name / "config.yaml")
    [folder] = [path.parent for path in (given.work / name).glob(f"data_prep-*/{MANIFEST}")]
    return config, folder


def plan_of(given: argparse.Namespace) -> list[tuple[int, int]]:
    """Width and steps of every training."""
    widths, steps = ([int(n) for n in text.split(",")] for text in (given.widths, given.steps))
    return [(width, count) for width in widths for count in steps]


def train(config: PipelineFields, data: Path, width: int, steps: int) -> dict[str, Any]:
    """One model on one budget: what it reached on the held-out rows."""
    seq_len, chosen = config.data.seq_len, load_config(None, settings_of(width, steps))
    settings, model = chosen.pretrain, chosen.model
    options = EngineOptions(seed=config.seed, optimizer=settings.optimizer, row_length=seq_len,
                            micro_batch=settings.batch_size)  # fmt: skip
    engine, objective = Engine(model, Mesh(MeshSizes()), options), CrossEntropy(settings.mtp_loss_weight)
    rows = PackedRows(data / "pretrain" / "train", seq_len)
    began = shown = time.monotonic()
    for step in range(steps):
        rate = learning_rate(settings.optimizer, step, steps)
        stats = engine.train_step(rows.batch(config.seed, step, settings.batch_size), objective, rate)
        if time.monotonic() - shown > SHOW:
            shown = time.monotonic()
            left = (shown - began) / (step + 1) * (steps - step - 1)
            print(f"  width {width}: step {step + 1}/{steps}  loss {stats.loss:.3f}  {left:.0f} s left", flush=True)
    loss = validation_loss(engine, PackedRows(data / "pretrain" / "validation", seq_len), objective)["validation_loss"]
    return {
        "width": width, "steps": steps, "params": params_of(model),
        "tokens": steps * settings.batch_size * seq_len, "loss": loss,
        "flops": model.flops_per_token(seq_len) * steps * settings.batch_size * seq_len,
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def law_of(config: PipelineFields, data: Path, done: Sequence[dict[str, Any]]) -> ScalingLaw:
    """The law that these trainings follow."""
    curve, error = fit([(one["params"], one["tokens"], one["loss"]) for one in done])
    manifest = read_sealed(data / MANIFEST, "")
    [held] = [file["sha256"] for name, file in manifest["files"].items() if fnmatch(name, HELD_OUT_TOKENS)]
    sources = ", ".join("/".join(Path(source.name).parts[-2:]) for source in config.data.pretrain)
    widths = tuple(sorted({one["width"] for one in done}))
    return ScalingLaw(
        sources, held, config.model.vocab_size, config.data.seq_len, config.pretrain.batch_size, widths, curve, error
    )


def trained(
    config: PipelineFields, data: Path, file: Path, plan: Sequence[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """The trainings of a plan, those that are done from the file."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"trainings": []}
    for width, steps in plan:
        asked = {"width": width, "steps": steps}
        found = next((one for one in results["trainings"] if asked.items() <= one.items()), None)
        if found is None:
            found = train(config, data, width, steps)
            results["trainings"].append(found)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"width {width}  {found['params']:,} parameters  {steps} steps  "
              f"{found['loss']:.4f} nats  {found['seconds']:.0f} s", flush=True)  # fmt: skip
        yield found


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if given.quick:
        given.widths, given.steps, given.judge = "32,48,64", "3,6", "96:6"
    torch.set_num_threads(given.threads)
    results = ROOT / "scripts" / "results" / provenance(ROOT, "cpu")["hardware"]
    folder = given.out or ROOT / "configs" / "laws"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        config, data = prepared(given)
        file = (given.out or results) / f"fit_law_{given.name}.json"
        done = list(trained(config, data, file, plan_of(given)))
        law = law_of(config, data, done)
        width, steps = map(int, given.judge.split(":"))
        model = model_of(width, vocab_size=law.vocab_size, seq_len=law.seq_len)
        expected = law.curve.loss(params_of(model), steps * law.tokens_per_step)
        print(f"law: {law.curve}\nlargest error of the {len(done)} trainings: {law.error:.2%}\n"
              f"predicted for width {width}, {steps} steps: {expected:.4f}", flush=True)  # fmt: skip
        [reached] = trained(config, data, file, [(width, steps)])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    (folder / f"{given.name}.yaml").write_text(law_text(law), encoding="utf-8")
    summary = json.loads(file.read_text(encoding="utf-8"))["trainings"]
    off = reached["loss"] / expected - 1
    data_out = {"benchmark": "fit_law", **provenance(ROOT, "cpu"), "text": law.text, "error": law.error,
                "judged": {"width": width, "steps": steps, "predicted": expected, "reached": reached["loss"],
                           "off": off}, "trainings": summary}  # fmt: skip
    file.write_text(json.dumps(data_out, indent=1) + "\n", encoding="utf-8")
    print(f"reached {reached['loss']:.4f}: {off:+.2%}\n{folder / given.name}.yaml")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
