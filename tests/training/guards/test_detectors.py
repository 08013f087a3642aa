"""Each fault is named within ten steps of its beginning, from figures alone; sound training is left in peace."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest

from ray_pipeline.settings.guards_config import GuardsConfig
from ray_pipeline.training.guards.detectors import AFTER_IT, BEFORE_THE_STEP

SETTINGS = GuardsConfig()
ALL = [*BEFORE_THE_STEP, *AFTER_IT]
WARM = 30  # sound steps before the fault


def sound() -> Iterator[dict[str, float]]:
    """Figures of training that goes well: a loss that falls with noise, rewards and lengths that move a little."""
    draw, step = random.Random(0), 0
    while True:
        step += 1
        yield {
            "loss": 6 * math.exp(-step / 80) + 1 + draw.gauss(0, 0.05), "grad_norm": math.exp(draw.gauss(0, 0.4)),
            "moe/idle_experts": float(draw.random() < 0.05), "entropy": 1.2 * math.exp(-step / 400) + 0.05,
            "reward": 0.3 + draw.gauss(0, 0.05) + step / 1000, "accuracy": min(1.0, 0.3 + step / 1000),
            "format_rate": min(1.0, 0.5 + step / 300), "completion_tokens": 40 + draw.gauss(0, 3) + step / 50,
            "repetition": 0.05,
        }  # fmt: skip


FAULTS = {
    "not_finite": {"loss": math.nan},
    "loss_spike": {"loss": 9.0},
    "exploding_gradients": {"grad_norm": 80.0},
    "vanishing_gradients": {"grad_norm": 1e-6},
    "dead_experts": {"moe/idle_experts": 2.0},
    "entropy_collapse": {"entropy": 0.01},
    "frozen_reward": {"reward": 0.25},
    "longer_answers": {"completion_tokens": 130.0, "accuracy": 0.3},
    "repetition": {"repetition": 0.8},
    "format_without_answers": {"format_rate": 1.0, "accuracy": 0.01},
}


def seen(name: str, fault: dict[str, float], steps: int = 10) -> int | None:
    """Steps after its beginning at which detector `name` sees the fault; None: it does not."""
    look = next(make for make in ALL if make.__name__ == name)(SETTINGS)
    figures = sound()
    for _ in range(WARM):
        assert look(next(figures)) is None
    return next((step for step in range(1, steps + 1) if look(next(figures) | fault) is not None), None)


def test_every_guard_has_a_fault_here():
    assert FAULTS.keys() == {make.__name__ for make in ALL}
    assert FAULTS.keys() <= GuardsConfig.model_fields.keys()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_within_ten_steps(name):
    found = seen(name, FAULTS[name])
    assert found is not None and found <= 10


@pytest.mark.parametrize("name", FAULTS)
def test_sound_training_is_left_in_peace(name):
    look, figures = next(make for make in ALL if make.__name__ == name)(SETTINGS), sound()
    assert [text for _ in range(300) if (text := look(next(figures)))] == []


def test_a_spike_is_no_part_of_what_the_next_step_is_held_against():
    assert seen("loss_spike", FAULTS["loss_spike"]) == 1
    look, figures = BEFORE_THE_STEP[1](SETTINGS), sound()
    for _ in range(WARM):
        look(next(figures))
    assert all(look(next(figures) | {"loss": 9.0}) for _ in range(20))


@pytest.mark.parametrize("seed", range(6))
def test_batches_of_another_kind_are_hardly_ever_spikes_and_a_spike_among_them_is(seed):
    look, draw = BEFORE_THE_STEP[1](SETTINGS), random.Random(seed)

    def loss() -> float:  # a distillation's: one step in four is on the student's own answers
        return draw.lognormvariate(-1.9, 0.5) if draw.random() < 0.25 else 0.06 + draw.gauss(0, 0.01)

    assert sum(look({"loss": loss()}) is not None for _ in range(800)) <= 2
    assert look({"loss": 4.0}) is not None


def test_figures_that_come_at_some_steps_alone_are_counted_among_themselves():
    look = next(make for make in ALL if make.__name__ == "frozen_reward")(SETTINGS)
    found = [look({"reward": 0.0} if step % 3 == 0 else {"loss": 1.0}) for step in range(18)]
    assert found[-3] is not None and found[-2:] == [None, None]


def test_a_task_that_is_solved_is_not_frozen():
    assert seen("frozen_reward", {"reward": 1.1, "accuracy": 1.0}) is None
