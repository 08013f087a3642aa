"""One component in a process of its own: `python -m scripts.component_bench.child NAME THREADS ROUNDS RESULT.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.component_bench import attentions, expert_layers, losses
from scripts.component_bench.form import Component, Form, check
from scripts.model_bench.jobs import interleave
from scripts.parallel_bench.results import spread

COMPONENTS: dict[str, Callable[[], Component]] = {
    "MQA": partial(attentions.grouped, "mqa", 1),
    "GQA": partial(attentions.grouped, "gqa", 2),
    "MLA": attentions.latent,
    "standard MoE": expert_layers.standard,
    "DeepSeekMoE": expert_layers.deepseek,
    "GRPO loss": losses.grpo,
    "DPO loss": losses.dpo,
    "KD loss": losses.distillation,
}
WARM_UP, CALLS = 3, 8  # rounds; calls of a form in each of its turns


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of forward and backward of every form, after all were found equal, and ours' speed beside them."""
    component = COMPONENTS[name]()
    differences = check(name, component)
    upstream = component.upstream()

    def turn(form: Form, _: int) -> None:
        for _ in range(CALLS):
            form.run(component.x, upstream)

    turns = {form: partial(turn, function) for form, function in component.forms.items()}
    interleave(turns, WARM_UP, "cpu")
    times = {
        form: [1e3 * second / CALLS for second in seconds] for form, seconds in interleave(turns, rounds, "cpu").items()
    }
    speeds = {
        form: spread([theirs / ours for ours, theirs in zip(times["ours"], milliseconds, strict=True)])
        for form, milliseconds in times.items()
        if form != "ours"
    }
    return {"name": name, "source": component.source, "differences": differences,
            "milliseconds": {form: spread(values) for form, values in times.items()},
            "speed_by_round": speeds}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    Path(sys.argv[4]).write_text(json.dumps(measure(sys.argv[1], int(sys.argv[3]))), encoding="utf-8")
