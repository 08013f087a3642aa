"""`engine`: the programs that run models, of which some need an environment of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from ray_pipeline.errors import UserError, command, did_you_mean

QUIET_SECONDS = 20.0  # between two signs of progress where there is no terminal


@click.group()
def engine() -> None:
    """What `serve` runs models with: list the engines, add one that brings packages of its own, remove it."""


def _known(_: click.Context, __: click.Parameter, name: str) -> str:
    from ray_pipeline.serving.engines import known_engines
    from ray_pipeline.serving.environments import RECIPES

    if name in RECIPES:
        return name
    there = " It needs none." if name in known_engines() else ""
    raise UserError(
        f"{name}: is no engine with an environment of its own{did_you_mean(name, RECIPES)}.{there} Such are: "
        f"{', '.join(RECIPES)}."
    )


@engine.command(name="add")
@click.argument("name", callback=_known)
def add_engine(name: str) -> int:
    """Install NAME (vllm) into an environment of its own, in the user's cache folder."""
    from ray_pipeline.hardware import count_gpus
    from ray_pipeline.serving.environments import add, installed, recipe_of

    has_gpu = count_gpus() > 0
    there = installed(name)
    if there is not None and there.requirement == recipe_of(name, has_gpu=has_gpu).requirement:
        click.echo(f"{there.requirement} is there already: {there.folder}")
        return 0
    started = time.monotonic()
    with _progress() as (say, line):
        made = add(name, has_gpu=has_gpu, say=say, line=line)
    seconds = time.monotonic() - started
    click.echo(f"{made.requirement} is there after {seconds:.0f} s: {_gib(made.size)} in {made.folder}")
    return 0


@engine.command(name="list")
def list_engines() -> int:
    """Show the engines: what is there, where, and how to get what is not."""
    from ray_pipeline.serving.engines import known_engines
    from ray_pipeline.serving.environments import RECIPES, halves, installed, way_to_add

    for name, one in known_engines().items():
        if name not in RECIPES:
            click.echo(f"{name:<10}{one.missing() or 'there'}")
            continue
        there = installed(name)
        if there is None:
            click.echo(f"{name:<10}not there: {way_to_add(name)}")
        else:
            click.echo(f"{name:<10}{there.requirement}, {_gib(there.size)}, {there.folder}")
        for half in halves(name):
            click.echo(f"{'':<10}half an installation, which the next add or remove deletes: {half}")
    return 0


@engine.command(name="remove")
@click.argument("name", callback=_known)
def remove_engine(name: str) -> int:
    """Delete the environment that `engine add` made."""
    from ray_pipeline.serving.environments import remove

    removed = remove(name)
    for folder in removed:
        click.echo(f"removed {folder}")
    if not removed:
        click.echo(f"{name}: there is nothing to remove. {command('engine', 'list')} shows what there is.")
    return 0


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Two functions: one prints a step, one shows a line of a program's output, on a terminal in a place of its own."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    started = last = time.monotonic()
    with console.status("") as status:

        def say(step: str) -> None:
            console.print(step, markup=False, highlight=False, soft_wrap=True)

        def line(text: str) -> None:
            nonlocal last
            seconds = time.monotonic() - started
            shown = f"{seconds:4.0f} s  {text}"
            if console.is_terminal:
                status.update(Text(shown, overflow="ellipsis", no_wrap=True))
            elif time.monotonic() - last >= QUIET_SECONDS:
                last = time.monotonic()
                click.echo(f"  {shown[:110]}")

        yield say, line
