"""`--compute` and `--minutes`: one number in place of size, steps and rates, by a law of how the loss falls."""

from __future__ import annotations

import math
import time
from typing import Any

import click

from ray_pipeline.errors import UserError

MEASURED_STEPS = 3
DEFAULT_LAW = "tinyshakespeare"
# The built-in text is made as long as is read this often: documents at least, and tokens of one on average.
DOCUMENTS, DOCUMENT_TOKENS, EPOCHS = 8000, 169, 2
RECIPES = (None, "tiny")  # whose shape the laws are of
DECIDED = ("model_size", "init_from", "seq_len", "batch_size", "max_steps")  # flags that decide the same in another way


def dialled(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that a budget is best spent on, by dotted key; none without a budget. Says what was chosen.

    Raises:
        UserError: a budget that no model of the law fits, or beside something else that decides the size.
    """
    flops, minutes = options.get("compute"), options.get("minutes")
    if flops is None and minutes is None:
        if options.get("law") is not None:
            raise UserError(f"--law {options['law']}: read with --compute or --minutes alone. Give one of them.")
        return {}
    _check(options)
    from ray_pipeline.costs.scaling_law import choose, model_of, read_law, settings_of

    law = read_law(options.get("law") or DEFAULT_LAW)
    if flops is None:
        flops = _flops_of(law, float(minutes or 0.0) * 60)
    choice = choose(law, flops)
    model = model_of(choice.width, vocab_size=law.vocab_size, seq_len=law.seq_len)
    tokens = choice.steps * law.tokens_per_step
    click.echo(
        f"{choice.flops:.3g} floating-point operations: {choice.width} features, {model.num_params():,} parameters, "
        f"{choice.steps} steps of {law.batch_size} x {law.seq_len} tokens ({tokens:,}).\n"
        f"Predicted validation loss: {choice.loss:.3f} nats on {law.text}; the law's own trainings lie within "
        f"{law.error:.1%} of it."
    )
    prediction = {"loss": choice.loss, "text": law.text, "validation": law.validation}
    text = (
        {} if options.get("data") else {"data.builtin_documents": max(DOCUMENTS, tokens // DOCUMENT_TOKENS // EPOCHS)}
    )
    return settings_of(choice.width, choice.steps) | text | {
        "pretrain.prediction": prediction, "pretrain.batch_size": law.batch_size, "data.seq_len": law.seq_len,
    }  # fmt: skip


def _check(options: dict[str, Any]) -> None:
    given = "--compute" if options.get("compute") is not None else "--minutes"
    if options.get("compute") is not None and options.get("minutes") is not None:
        raise UserError("--compute and --minutes: give one of them; minutes become compute by this machine's speed.")
    budget = options["compute"] if given == "--compute" else options["minutes"]
    if not math.isfinite(budget):
        raise UserError(f"{given} {budget}: must be a finite number.")
    config = options.get("config")
    if (None if config is None else str(config)) not in RECIPES:
        raise UserError(
            f"{given} with --config {config}: the laws are of the tiny recipe's shape, and would replace this one's. "
            "Leave --config out, or set its sizes by hand."
        )
    for name in DECIDED:
        if options.get(name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"{given} with --{flag} {options[name]}: both decide the same. Leave one of them out.")


def _flops_of(law: Any, seconds: float) -> float:
    """What this machine computes in so many seconds of training, measured on the model that it will come to.

    Raises:
        UserError: on GPUs, which are not taken before a run is checked.
    """
    from ray_pipeline.costs.scaling_law import choose
    from ray_pipeline.hardware import count_gpus

    if count_gpus():
        raise UserError("--minutes: measured on CPUs alone. Give --compute, in floating-point operations, on GPUs.")
    width = sorted(law.widths)[len(law.widths) // 2]
    for _ in range(2):  # larger models come nearer to the peak
        flops = seconds * _speed(law, width)
        width = choose(law, flops).width
    return flops


def _speed(law: Any, width: int) -> float:
    """Floating-point operations a second of training a model of this width on all cores."""
    import torch

    from model.parallel.mesh import Mesh, MeshSizes
    from ray_pipeline.costs.scaling_law import model_of
    from ray_pipeline.data.rows.batch import Batch
    from ray_pipeline.engine.engine import Engine
    from ray_pipeline.engine.options import EngineOptions
    from ray_pipeline.objectives.cross_entropy import CrossEntropy
    from ray_pipeline.settings.loading import load_config

    model = model_of(width, vocab_size=law.vocab_size, seq_len=law.seq_len)
    recipe = load_config(None)
    options = EngineOptions(
        seed=0, optimizer=recipe.pretrain.optimizer, micro_batch=recipe.layout.micro_batch, row_length=law.seq_len
    )
    engine = Engine(model, Mesh(MeshSizes()), options)
    tokens = torch.randint(model.vocab_size, (law.batch_size, law.seq_len + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:]))
    took = []
    for _ in range(1 + MEASURED_STEPS):  # the first one lays out what later ones find
        start = time.monotonic()
        engine.train_step(batch, CrossEntropy(0.1), 1e-3)
        took.append(time.monotonic() - start)
    return model.flops_per_token(law.seq_len) * law.tokens_per_step / min(took[1:])
