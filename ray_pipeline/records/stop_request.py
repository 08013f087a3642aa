"""A request that a run save and stop, as a file in its folder: the budget writes it, ranks read it between steps."""

from __future__ import annotations

from pathlib import Path

from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import unsealed
from ray_pipeline.settings.run_folder import STOP_FILE


def ask_to_stop(run_dir: Path, reason: str) -> None:
    """Training saves a checkpoint where figures are logged next, and ends; a stage that has not begun does not."""
    write_sealed(run_dir / STOP_FILE, {"reason": reason})


def stop_reason(run_dir: Path) -> str | None:
    """Why the run is to stop; None where it is not."""
    try:
        return str(unsealed((run_dir / STOP_FILE).read_bytes())["reason"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        return "its stop file cannot be read"


def go_on(run_dir: Path) -> None:
    """Forget an earlier request; a run that is started again is meant to run."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)
