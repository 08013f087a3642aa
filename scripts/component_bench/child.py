"""Components in a process of their own, a line of JSON for each: `child THREADS ROUNDS NAME NAME ...`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
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
WARM_UP, CALLS = 2, 4  # rounds; calls of a form in each of its turns


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of forward and backward of every form, after all were found equal, and ours' speed beside them.

    Speeds are ratios of CPU time within each round, which other programs on the machine disturb least.
    """
    component = COMPONENTS[name]()
    differences = check(name, component)
    upstream = component.upstream()
    cpu: dict[str, list[float]] = {form: [] for form in component.forms}

    def turn(name: str, form: Form, _: int) -> None:
        start = time.process_time()
        for _ in range(CALLS):
            form.run(component.x, upstream)
        cpu[name].append(1e3 * (time.process_time() - start) / CALLS)

    turns = {form: partial(turn, form, function) for form, function in component.forms.items()}
    wall = interleave(turns, WARM_UP + rounds, "cpu")
    cpu = {form: milliseconds[WARM_UP:] for form, milliseconds in cpu.items()}
    speeds = {
        form: spread([theirs / ours for ours, theirs in zip(cpu["ours"], milliseconds, strict=True)])
        for form, milliseconds in cpu.items()
        if form != "ours"
    }
    calls = {form: [1e3 * second / CALLS for second in seconds[WARM_UP:]] for form, seconds in wall.items()}
    return {
        "name": name,
        "source": component.source,
        "differences": differences,
        "cpu_milliseconds": {form: spread(milliseconds) for form, milliseconds in cpu.items()},
        "wall_milliseconds": {form: spread(milliseconds) for form, milliseconds in calls.items()},
        "speed_by_round": speeds,
    }


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    for wanted in sys.argv[3:]:
        print(json.dumps(measure(wanted, int(sys.argv[2]))), flush=True)
