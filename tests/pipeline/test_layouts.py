"""The same PRETRAIN steps in every layout of the default recipe; layers set by hand and large seeds, to the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ray_pipeline.records.metrics_file import read_metrics
from ray_pipeline.settings.section import MOST_SEED
from tests.pipeline.driving import TOY, finish, stages, start

STEPS = 50
LAYOUTS = {
    "one": ("--gpus", "1"),
    "pp3": ("--gpus", "3", "--pp-size", "3"),
    "dp2": ("--gpus", "2", "--dp-size", "2", "--zero-stage", "1"),
}
pytestmark = pytest.mark.slow


def losses(folder: Path, name: str) -> list[float]:
    arguments = ("run", "--config", "tiny", "--run-name", name, *LAYOUTS[name], "--until", "pretrain", "--no-wandb")
    settings = (
        "--max-steps", str(STEPS), "--set", "pretrain.log_every=1", "--set", "data.builtin_documents=3000",
        "--set", "data.builtin_conversations=200", "--set", "data.builtin_prompts=50", "--backend", "cpu",
    )  # fmt: skip
    finish(start(*arguments, *settings, folder=folder), folder)
    lines = read_metrics(Path(stages(folder, name)["pretrain"]["folder"]))
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_pipeline_and_zero_give_the_losses_of_one_process_over_50_steps(tmp_path):
    reference = losses(tmp_path, "one")
    assert len(reference) == STEPS and reference[-1] < reference[0] - 1
    for name in ("pp3", "dp2"):
        got = losses(tmp_path, name)
        torch.testing.assert_close(got, reference, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_layers_set_by_hand_and_the_largest_seed_go_through_every_stage(tmp_path):
    """The student has fewer layers than the hand-set parts add up to, and is balanced instead."""
    flags = ("--gpus", "2", "--pp-size", "2", "--pp-layout", "E+1|3+H", "--seed", str(MOST_SEED), "--no-wandb")
    finish(start("run", "--config", str(TOY), "--run-name", "toy", *flags, folder=tmp_path), tmp_path)
    found = stages(tmp_path, "toy")
    assert {entry["status"] for entry in found.values()} <= {"done", "learned_nothing"}
    assert {"pretrain", "sft", "grpo", "distillation", "export"} <= found.keys()
