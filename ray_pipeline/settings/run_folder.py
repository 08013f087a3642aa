"""Names of what lies in a run's folder, each written here alone.

    RUN/config.yaml, run.json, invocations.json, modal.json, .lock, report.html
    RUN/<stage>-<identity>/   record.json, progress.json, metrics.jsonl, samples.json, heldout.json, timeline.json,
                              guards.json, error.log, logs/, checkpoints/, and of what the stage makes
                              manifest.json, tokenizer/, model/, adapter/

In this room because a run's settings are among them.
"""

from __future__ import annotations

from pathlib import Path

RUN_FILE = "run.json"  # the run's uid, and per stage its present identity and the settings behind it
CONFIG_FILE = "config.yaml"  # the settings that the run was accepted with
LOCK = ".lock"  # held by the one process that works on the run
REPORT_FILE = "report.html"
INVOCATIONS_FILE = "invocations.json"  # what was typed, when, on which machine, with which versions
MODAL_FILE = "modal.json"  # the call on Modal that runs it, or ran it last
STOP_FILE = "stop.json"  # a request that the run save and stop

RECORD = "record.json"  # of a stage, beside its outputs
PROGRESS_FILE = "progress.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.json"
HELDOUT_FILE = "heldout.json"  # how the model answered the held-out questions last: by category, question by question
TIMELINE_FILE = "timeline.json"  # what every rank did in one step, and when
GUARDS_FILE = "guards.json"  # what guards of training did
ERROR_LOG = "error.log"  # the traceback of an attempt that failed
MANIFEST = "manifest.json"  # SHA-256 sums of a folder's files
CHECKPOINTS = "checkpoints"
LOGS = "logs"  # what a stage's processes print
TOKENIZER = "tokenizer"
MODEL = "model"
EXPORT_CARD = "export.json"  # what became of each export in every program that loads it
TRAIN_QUESTIONS, HELDOUT_QUESTIONS = "prompts/train.jsonl", "prompts/heldout.jsonl"  # in DATA_PREP's folder
ADAPTER = "adapter"  # peft's own files of low-rank adapters

# Written while a stage works, and by the workflow.
NOT_OUTPUTS = (PROGRESS_FILE, METRICS_FILE, GUARDS_FILE, RECORD, ERROR_LOG)
NOT_OUTPUT_FOLDERS = (LOGS, "wandb", "tensorboard")
RERUN = ".again"  # behind the name of a stage's folder: an attempt that is to replace a finished one


def stage_folder(run_dir: Path, stage: str, identity: str) -> Path:
    """Where a stage with this identity keeps its outputs."""
    return run_dir / f"{stage}-{identity[:10]}"


def rerun_folder(folder: Path) -> Path:
    """Where a finished stage is run again (`--stage`, `--from`): beside its outputs, until the new ones are whole."""
    return folder.with_name(folder.name + RERUN)


def newest_checkpoint(folder: Path) -> int | None:
    """Optimizer steps of the newest whole checkpoint."""
    found = sorted((folder / CHECKPOINTS).glob("step_*"))
    return int(found[-1].name.removeprefix("step_")) if found else None
