"""Verbs that older pipelines of this kind have; each says in one line what to use here."""

from __future__ import annotations

import click

from ray_pipeline.errors import UserError

_ANY_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@click.command("run-rust", hidden=True, context_settings=_ANY_ARGUMENTS)
@click.argument("_", nargs=-1, type=click.UNPROCESSED)
def run_rust(_: tuple[str, ...]) -> int:
    """Name of another engine."""
    raise UserError("run-rust: there is one engine, on PyTorch; use `run` (with `--backend cpu` or `--backend cuda`).")


@click.command("run-mlx", hidden=True, context_settings=_ANY_ARGUMENTS)
@click.argument("_", nargs=-1, type=click.UNPROCESSED)
def run_mlx(_: tuple[str, ...]) -> int:
    """Name of another engine."""
    raise UserError("run-mlx: there is one engine, on PyTorch; on a Mac use `run --backend cpu`.")
