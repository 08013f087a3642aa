"""The way from the verb `run` to the training step, as CONTRIBUTING.md has it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_pipeline.cli import main
from ray_pipeline.dag import stage_task, workflow
from ray_pipeline.data.text import pretrain_text, text_rows
from ray_pipeline.engine.engine import Engine
from ray_pipeline.launch import launchers

ROOT = Path(__file__).resolve().parents[2]
MOST_CALLS = 8


def documented() -> list[tuple[str, str]]:
    """File and function of each step in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## From `run` to a training step")[2].partition("\n## ")[0]
    steps = re.findall(r"^\d\. `([^`]+)`, `(?:\w+\.)?(\w+)", section, re.MULTILINE)
    return [(f"ray_pipeline/{file}", function) for file, function in steps]


class Tasks:
    """Ray's tasks, run where they are submitted."""

    def __init__(self, function: Any):
        self.function = function

    def options(self, **_: Any) -> Tasks:
        return self

    def remote(self, *arguments: Any) -> Any:
        return self.function(*arguments)


@contextmanager
def no_ray(*_: Any, **__: Any) -> Iterator[None]:
    yield


def test_from_run_to_a_training_step_it_is_eight_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray
    import ray.train

    seen: list[list[tuple[str, str]]] = []
    train_step = Engine.train_step

    def recorded(self: Engine, *arguments: Any, **options: Any) -> Any:
        frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        ours = [(str(path.relative_to(ROOT)), name) for path, name in frames if path.is_relative_to(ROOT)]
        seen.append([(path, name) for path, name in ours if path.startswith("ray_pipeline/")])
        return train_step(self, *arguments, **options)

    class OneRank(launchers.InlineLauncher):
        """One rank in this process, by the function that Ray Train's workers run."""

        def __init__(self, *_: Any, **__: Any):
            pass

        def run(self, name: str, function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
            job = {"function": function, "arguments": arguments, "sizes": [1], "device": "cpu", "timeout": 60.0}
            Path(arguments["folder"]).mkdir(exist_ok=True)
            figures = launchers._ray_rank(job)
            assert figures is not None
            return figures

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(Engine, "train_step", recorded)
    monkeypatch.setattr(workflow, "connected_ray", no_ray)
    monkeypatch.setattr(ray, "remote", lambda **_: Tasks)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "get", lambda ref: ref)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(stage_task, "RayLauncher", OneRank)
    for module in (pretrain_text, text_rows):
        monkeypatch.setattr(module, "map_blocks", lambda make, arguments, blocks: map(make(*arguments), blocks))
    for name in stage_task.worker_environment(1, 1, "cpu"):  # set by the task; put back afterwards
        monkeypatch.setenv(name, "")
    small = ["data.builtin_documents=300", "data.builtin_conversations=100", "data.builtin_prompts=500"]
    flags = [word for setting in small for word in ("--set", setting)]
    command = ["run", "--backend", "cpu", "--until", "pretrain", "--max-steps", "1", "--no-wandb", *flags]
    assert main([*command, "--output-dir", str(tmp_path)]) in (0, 1), "a model of one step may have learned nothing"

    path = seen[0][seen[0].index(("ray_pipeline/cli/run.py", "run")) :]
    steps = documented()
    assert len(steps) == MOST_CALLS
    assert path == [step for step in steps if step != ("ray_pipeline/launch/launchers.py", "run")]
    assert hasattr(launchers.RayLauncher, "run")
