"""What runs inside the container: the ordinary pipeline, on a run folder on a volume. Does not import modal."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.errors import EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

SAVE_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class RemoteResult:
    """How the remote run ended: exit code as the command line's, and the message of a user's mistake."""

    exit_code: int
    error: str | None = None


def execute_here(
    config_yaml: str,
    stages: dict[str, str | None],
    runs_dir: str,
    *,
    dry_run: bool = False,
    resume: bool = False,
    save: Callable[[], None],
) -> RemoteResult:
    """Load the settings and run the stages, exactly as `run` and `resume` do.

    Args:
        config_yaml: a complete recipe with `run_name`. stages: fields of `StageSelection`.
        runs_dir: where the volume is mounted. save: makes what is written there last beyond this container.
    """
    from ray_pipeline.dag.request import RunRequest, StageSelection
    from ray_pipeline.dag.workflow import execute
    from ray_pipeline.hardware import count_gpus
    from ray_pipeline.layout.choice import resolve_layout
    from ray_pipeline.settings.loading import load_config

    folder = Path(runs_dir)
    # Beside the runs, not inside one: the run's own config.yaml is written by the workflow.
    recipe = folder / ".requests" / f"{os.getpid()}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(config_yaml, encoding="utf-8")
    try:
        config = load_config(recipe, {"output_dir": runs_dir})
        layout = resolve_layout(config, 0 if config.backend == "cpu" else count_gpus())
        with _saving(save):
            code = execute(RunRequest(config, layout, StageSelection(**_selection(stages)), resume, dry_run))
        return RemoteResult(code)
    except UserError as error:
        return RemoteResult(EXIT_USER_ERROR, str(error))
    finally:
        recipe.unlink(missing_ok=True)


def _selection(stages: dict[str, str | None]) -> dict[str, Any]:
    return {name: stages.get(name) for name in ("only", "from_", "until")}


@contextmanager
def _saving(save: Callable[[], None]) -> Iterator[None]:
    """Call `save` now and then and at the end, so that a container taken away loses at most a minute of files."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(SAVE_EVERY_SECONDS):
            save()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        save()
