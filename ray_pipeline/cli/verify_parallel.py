"""`verify-parallel`: hold a layout, or every layout, against one process on this machine."""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_pipeline.cli.options import axis_options, take_request
from ray_pipeline.cli.output_files import check_output_file, has_keys
from ray_pipeline.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ray_pipeline.layout.layout import Layout
    from ray_pipeline.settings.schema import PipelineFields
    from ray_pipeline.verification.cases import Case, Selection, SubjectFor, Tolerance

MOST_CPU_RANKS = 64
WIDTH = 110  # columns of a file or a pipe
_CHOICES = {
    "precision": ("fp32", "bf16", "both"),
    "optimizer": ("adamw", "sgd", "both"),
    "stage": ("pretrain", "sft", "dpo", "grpo", "distillation", "all"),
}


@click.command("verify-parallel")
@axis_options
@click.option("--all", "every", is_flag=True, help="Every layout of --gpus ranks; sizes and stages given narrow it.")
@click.option("--precision", metavar="[fp32|bf16|both]", default="fp32", show_default=True)
@click.option("--optimizer", metavar="[adamw|sgd|both]", default="adamw", show_default=True, help="sgd: lr=1.")
@click.option(
    "--stage",
    metavar="[pretrain|sft|dpo|grpo|distillation|all]",
    default="pretrain",
    show_default=True,
    help="Whose batches and loss; all: every stage's, in every layout.",
)
@click.option(
    "--steps", type=click.IntRange(1, 10_000), help="Optimizer steps to compare. Default: 4; of other stages 40."
)
@click.option("--tolerance", metavar="NUMBER", help="Relative loss difference allowed. Default: fp32 2e-6, bf16 2e-3.")
@click.option("--config", type=click.Path(path_type=Path), help="A recipe whose model and layout to verify, if small.")
@click.option("--backend", metavar="[auto|cpu|cuda]", help="auto: GPUs if there are enough of them, or CPU processes.")
@click.option(
    "--timeout", type=click.FloatRange(1, 7 * 86400), default=300.0, show_default=True, help="Seconds per layout."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Write the results here as well; what passed there with the same code is not run again.",
)
def verify_parallel(every: bool, json_file: Path | None, steps: int | None, timeout: float, **options: Any) -> int:
    """Train the same steps on one process and in a layout, and compare losses, gradient norms, weights and routing.

    A tiny model with latent attention, experts and multi-token prediction, on batches that no number of ranks shares
    evenly, as a stage makes them. Exit code 1 if anything differs.
    """
    from ray_pipeline.verification.cases import default_steps
    from ray_pipeline.verification.written_results import KEYS

    config = take_request(options).load()
    if json_file is not None:
        check_output_file("--json", json_file, lambda path: has_keys(path, KEYS))
    precisions, optimizers, stages = (choices(options, key) for key in ("precision", "optimizer", "stage"))
    every = every or options["stage"] == "all"
    subject_for, selection = select(config, options, every, steps or default_steps(stages))
    tolerances = allowed(options["tolerance"])
    device = choose_device(config, max(layout.gpus for layout in selection.legal))
    cases = _cases(selection, subject_for, device, precisions, optimizers, stages)
    return verify(cases, selection, tolerances, timeout=timeout, json_file=json_file, every=every)


def choices(options: dict[str, Any], key: str) -> tuple[str, ...]:
    """`both` and `all` -> every value there is.

    Raises:
        UserError: an unknown value.
    """
    given, known = options[key], _CHOICES[key]
    if given not in known:
        raise UserError(f"--{key} {given}: must be {', '.join(known[:-1])} or {known[-1]}{did_you_mean(given, known)}.")
    return known[:-1] if given == known[-1] else (given,)


def allowed(tolerance: str | None) -> dict[str, Tolerance]:
    """Tolerances by precision, with the one for losses replaced if given.

    Raises:
        UserError: not a number, or negative.
    """
    from dataclasses import replace

    from ray_pipeline.verification.cases import TOLERANCES

    if tolerance in (None, "default"):
        return TOLERANCES
    try:
        value = float(tolerance or "")
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise UserError(f"--tolerance {tolerance}: must be a number of at least 0, for example 2e-6.")
    return {precision: replace(default, loss=value) for precision, default in TOLERANCES.items()}


def select(config: PipelineFields, options: dict[str, Any], every: bool, steps: int) -> tuple[SubjectFor, Selection]:
    """The model and the layouts to verify.

    Raises:
        UserError: a layout that breaks a rule, more ranks than this machine should start, nothing left to verify.
    """
    from functools import partial

    from ray_pipeline.layout.choice import resolve_layout
    from ray_pipeline.layout.layout import layout_of
    from ray_pipeline.verification.cases import Selection, every_layout, own_subject, settings, small_subject

    asked = config.layout
    flag = "--stage all" if options["stage"] == "all" else "--all"
    if every and asked.gpus is None:
        raise UserError(f"{flag}: of how many ranks? For example {flag} --gpus 4.")
    replicas = asked.dp_size or max(1, asked.ep_size // asked.sp_size)
    gpus = asked.gpus or asked.pp_size * asked.tp_size * asked.sp_size * replicas
    if gpus > MOST_CPU_RANKS:
        raise UserError(
            f"gpus={gpus}: verifying starts a process for each rank on this machine, at most {MOST_CPU_RANKS}. "
            "Use the same axes with smaller sizes; what is sent along them is the same."
        )
    subject_for: SubjectFor = partial(small_subject, steps=steps)
    if options["config"] is not None:
        own = own_subject(config, gpus, steps=steps)
        subject_for = lambda layout: own  # noqa: E731
    if not every:
        wanted = layout_of(asked.model_copy(update={"gpus": gpus}))
        probe = settings(subject_for(wanted), wanted)
        chosen = asked.model_copy(update={"gpus": gpus, "micro_batch": probe.layout.micro_batch})
        layout = resolve_layout(probe.model_copy(update={"layout": chosen, "backend": "cpu"}), 0)
        return subject_for, Selection([layout])
    selection = every_layout(gpus, subject_for)
    narrow = {key: options[f"{key}_size"] for key in ("pp", "dp", "tp", "sp", "ep")}
    narrow |= {key: options[key] for key in ("zero_stage", "schedule", "activation_checkpointing", "offload_optimizer")}
    kept = [layout for layout in selection.legal if _matches(layout, narrow)]
    if not kept:
        raise UserError(f"{flag}: no legal layout has the sizes given. Omit some of them.")
    refused = {
        rule: [(layout, reason) for layout, reason in found if _matches(layout, narrow)]
        for rule, found in selection.refused.items()
    }
    return subject_for, Selection(kept, {rule: found for rule, found in refused.items() if found})


def _matches(layout: Layout, wanted: dict[str, Any]) -> bool:
    return all(value is None or getattr(layout, key) == value for key, value in wanted.items())


def choose_device(config: PipelineFields, ranks: int) -> str:
    """GPUs where there are enough of them; CPU processes otherwise.

    Raises:
        UserError: `--backend cuda` without enough GPUs, `--backend modal`.
    """
    from ray_pipeline.hardware import count_gpus

    if config.backend == "modal":
        raise UserError("--backend modal: layouts are verified on this machine. Use --backend cpu, or omit it.")
    there = 0 if config.backend == "cpu" else count_gpus()
    if config.backend == "cuda" and there < ranks:
        raise UserError(f"backend=cuda: {ranks} ranks need as many GPUs; this machine has {there}. Use --backend cpu.")
    return "cuda" if there >= ranks else "cpu"


def _cases(
    selection: Selection,
    subject_for: SubjectFor,
    device: Any,
    precisions: tuple[Any, ...],
    optimizers: tuple[Any, ...],
    stages: tuple[Any, ...],
) -> list[Case]:
    """All that is to be verified; the stages of one layout follow one another."""
    from dataclasses import replace

    from ray_pipeline.verification.cases import Case, for_stage

    return [
        Case(for_stage(subject_for(layout), stage), replace(layout, device=device), precision, optimizer, stage)
        for precision in precisions
        for optimizer in optimizers
        for layout in selection.legal
        for stage in stages
    ]


def verify(
    cases: list[Case],
    selection: Selection,
    tolerances: dict[str, Tolerance],
    *,
    timeout: float,
    json_file: Path | None,
    every: bool,
) -> int:
    """Run the cases, print what came out, return the exit code. Ctrl-C still gives the table of what is done."""
    from rich.console import Console

    from ray_pipeline.verification import tally as report
    from ray_pipeline.verification.world import Verifier
    from ray_pipeline.verification.written_results import WrittenResults

    console, start = Console(), time.monotonic()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    report.say(console, report.heading(cases))
    written = WrittenResults(json_file, selection.refused, machine(), tolerances)
    results = written.passed(cases)
    before = [result.case for result in results]
    if before:
        report.say(console, f"{len(before)} of {len(cases)} passed before, with this code: {json_file}")
    verifier = Verifier(cases[0].layout.device, tolerances, timeout=timeout)
    try:
        with (
            verifier,
            report.Tally(console, len(cases), before=len(before)) if every else nullcontext() as tally,
        ):
            left = [case for case in cases if case not in before]
            for _, group in groupby(left, lambda case: (case.layout, case.precision, case.optimizer)):
                for result in verifier.run(tuple(group)):
                    results.append(result)
                    written.write(results, verifier.files)
                    if tally is not None:
                        tally.add(result)
                    else:
                        report.print_steps(console, result, tolerances[result.case.precision])
    finally:
        if every:
            report.print_table(console, results)
            report.print_refused(console, selection.refused)
            report.print_summary(console, results, len(cases), time.monotonic() - start)
        written.write(results, verifier.files, now=True)
    return 0 if all(result.passed for result in results) else 1


def machine() -> dict[str, Any]:
    """Where the results come from."""
    from ray_pipeline import hardware

    return {**hardware.machine(), "cores": hardware.num_cpus(), **hardware.versions()}
