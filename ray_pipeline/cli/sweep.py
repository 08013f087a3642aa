"""`sweep`: the same run with several settings and seeds, and which of them is best."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ray_pipeline.cli.group import Interrupted
from ray_pipeline.cli.input_checks import check_inputs
from ray_pipeline.cli.options import layout_options, recipe_options, take_request
from ray_pipeline.cli.output_files import check_output_file, has_keys
from ray_pipeline.cli.run import layout_there, notices
from ray_pipeline.cli.runs import ADDRESS_FILE, output_dir
from ray_pipeline.errors import UserError, command

if TYPE_CHECKING:
    from ray_pipeline.dag.sweeps.sweep_file import Sweep
    from ray_pipeline.dag.sweeps.trial import Place
    from ray_pipeline.settings.schema import PipelineFields

WITH_RESUME = ("resume", "seeds", "trials", "until", "metric", "jobs", "json_file", "output_dir")
MOST_SEEDS, MOST_TRIALS, MOST_JOBS, DEFAULT_SEEDS = 100, 1000, 1000, 3


@click.command()
@recipe_options
@layout_options
@click.option(
    "--grid", multiple=True, metavar="KEY=A,B", help="Values of a setting, or LOW..HIGH. Repeat for their combinations."
)
@click.option("--seeds", type=click.IntRange(1, MOST_SEEDS), help="Seeds of each setting. Default: 3.")
@click.option("--search", type=click.Choice(["grid", "optuna"]), help="All combinations, or --trials.")
@click.option("--trials", type=click.IntRange(1, MOST_TRIALS), help="With --search optuna: settings that are tried.")
@click.option("--until", metavar="STAGE", help="The stages up to this one. Default: the last that trains.")
@click.option("--metric", metavar="[STAGE.]NAME[:min|max]", help="What is compared. Default: the last stage's figure.")
@click.option(
    "--jobs", type=click.IntRange(1, MOST_JOBS), help="Trials at once. Default: as many as GPUs, or a cluster, hold."
)
@click.option("--name", help="Name of the sweep and its folder. Default: recipe and a hash of what is asked for.")
@click.option("--output-dir", help="Folder that the sweep's folder lies in. Default: runs.")
@click.option("--resume", metavar="FOLDER", help="Go on with this sweep; more --seeds and --trials may be given.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table to this file as well.")
def sweep(**options: Any) -> int:
    """Try settings, each with several seeds, and write a table, a plot and the best recipe.

    Stages that trials have in common run once. The same command goes on where it was stopped.
    """
    from rich.console import Console

    from ray_pipeline.dag.ledger import RunLock
    from ray_pipeline.dag.sweeps.sweep_file import refuse_foreign_sweep
    from ray_pipeline.report.sweep_result import KEYS

    if options["json_file"] is not None:
        check_output_file("--json", options["json_file"], lambda path: has_keys(path, KEYS))
    wanted = stored(options) if options["resume"] else asked(options)
    refuse_foreign_sweep(wanted.folder)
    place = place_of(wanted.base)
    check(wanted, place)
    jobs = options["jobs"] or jobs_that_fit(wanted, place)

    from ray_pipeline.dag.sweeps.conduct import Conduct  # after all is known to be legal: Ray takes seconds

    conduct = Conduct(wanted, place, jobs, Console(width=None if Console().is_terminal else 150, file=sys.stdout))
    with can_go_on(wanted.folder), RunLock(wanted.folder, kind="sweep", name_option="--name"):
        wanted.write_recipe()
        wanted.save()
        code = conduct.run()
    if options["json_file"] is not None:
        from ray_pipeline.records.artifacts import write_json

        write_json(options["json_file"], conduct.result().as_json())
        click.echo(f"Written: {options['json_file']}")
    return code


def asked(options: dict[str, Any]) -> Sweep:
    """The sweep that the options describe: a new one, or the one that they began.

    Raises:
        UserError: what cannot be tried, or another sweep of this name.
    """
    from ray_pipeline.dag.sweeps.measure import last_stage
    from ray_pipeline.dag.sweeps.suggestions import need_optuna
    from ray_pipeline.dag.sweeps.sweep_file import Sweep, is_sweep, read_sweep, refuse_other_sweep
    from ray_pipeline.dag.sweeps.sweep_grid import combinations, parse_grid
    from ray_pipeline.dag.workflow import with_absolute_paths

    request = take_request(options)
    config = request.load()
    if config.backend == "modal":
        raise UserError("sweep --backend modal: trials run on this machine or a Ray cluster. Use --backend auto.")
    search: Literal["grid", "optuna"] = options["search"] or "grid"
    trials = options["trials"]
    if search == "optuna":
        need_optuna()
        if trials is None or not options["grid"]:
            raise UserError("--search optuna: give --trials, how many settings are tried, and a --grid to search in.")
    elif trials is not None:
        raise UserError(f"--trials {trials}: a grid tries all its combinations. Add --search optuna, or omit it.")
    base = with_absolute_paths(config).model_copy(update={"run_name": None})
    found = Sweep(
        Path(), base, tuple(options["grid"]), last_stage(config, options["until"]), options["seeds"] or DEFAULT_SEEDS,
        search, trials, options["metric"],
    )  # fmt: skip
    axes = parse_grid(found.grid, found.stages)
    for key in (key for axis in axes for key in axis.keys if key in request.overrides):
        raise UserError(f"--grid {key}: is given by a flag or --set as well. Give it once.")
    found.settings = combinations(axes) if search == "grid" else []
    found.folder = folder_of(found, options)
    if is_sweep(found.folder):
        before = read_sweep(found.folder)
        refuse_other_sweep(found, before)
        found.settings, found.created = before.settings, before.created
    return found


def folder_of(sweep: Sweep, options: dict[str, Any]) -> Path:
    """Where the sweep is, or will be: the same for the same question, however many seeds and trials it is asked with.

    Raises:
        UserError: a name that no folder can have.
    """
    text = json.dumps([sweep.decides, sorted(sweep.grid), sweep.search])
    name = options["name"] or f"sweep-{sweep.base.recipe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"--name {name}: a folder's name has letters, digits, dots and dashes, 100 at most.")
    place = output_dir(options["output_dir"])
    if (place / ADDRESS_FILE).is_file():
        raise UserError("--output-dir: a sweep needs a folder of this machine or cluster; `run` takes an address.")
    return (place / name).absolute()


def stored(options: dict[str, Any]) -> Sweep:
    """The sweep that --resume names, with what may change.

    Raises:
        UserError: there is none, or an option that would make another sweep of it.
    """
    from ray_pipeline.dag.sweeps.measure import last_stage
    from ray_pipeline.dag.sweeps.sweep_file import is_sweep, read_sweep

    for name, value in options.items():
        if value not in (None, False, ()) and name not in WITH_RESUME:
            raise UserError(
                f"--resume and --{name.replace('_', '-')}: a sweep goes on with the settings it was begun with. "
                "Omit it, or begin another sweep without --resume."
            )
    name = options["resume"]
    places = (output_dir(options["output_dir"]) / name, Path(name))
    folder = next((place.absolute() for place in places if is_sweep(place)), None)
    if folder is None:
        raise UserError(f"--resume {name}: no sweep there. Give the folder that `{command('sweep')}` wrote.")
    found = read_sweep(folder)
    if options["trials"] is not None and found.search == "grid":
        raise UserError(f"--trials {options['trials']}: this sweep is a grid, which has all its settings. Omit it.")
    found.seeds = options["seeds"] or found.seeds
    found.trials = options["trials"] or found.trials
    found.metric = options["metric"] or found.metric
    found.until = last_stage(found.base, options["until"]) if options["until"] else found.until
    return found


def place_of(config: PipelineFields) -> Place:
    """The GPUs of this machine or the cluster."""
    from ray_pipeline.dag.sweeps.trial import Place
    from ray_pipeline.hardware import count_gpus
    from ray_pipeline.launch.cluster import named_cluster

    cluster = named_cluster()
    if cluster is None:
        return Place(0 if config.backend == "cpu" else count_gpus())
    coming = config.layout.gpus or 0 if config.layout.wait_for_nodes and config.backend != "cpu" else 0
    return Place(max(cluster.gpus, coming), cluster)


def jobs_that_fit(sweep: Sweep, place: Place) -> int:
    """As many trials at once as there are GPUs for; on CPUs one on a machine alone, whose cores it uses all."""
    layout = place.request(sweep.base, sweep.until).layout
    if layout.device == "cuda":
        return max(1, place.gpus // layout.gpus)
    return 1 if place.cluster is None else max(1, int(sum(place.cluster.cpus_for("cpu"))) // layout.gpus)


def check(sweep: Sweep, place: Place) -> None:
    """Look at every setting as `run` looks at its own, before anything starts or is written; tell each thing once.

    Raises:
        UserError: naming the setting.
    """
    from ray_pipeline.dag.request import RunRequest, StageSelection
    from ray_pipeline.dag.sweeps.measure import measure
    from ray_pipeline.dag.sweeps.sweep_grid import corners, setting_text

    measure(sweep.metric, sweep.stages)
    said = StringIO()
    with tempfile.TemporaryDirectory() as folder:
        trying = replace(sweep, folder=Path(folder))
        trying.write_recipe()
        for index, values in enumerate(sweep.settings or corners(sweep.axes)):
            try:
                with redirect_stdout(said), redirect_stderr(said):
                    config = trying.config(values, sweep.base.seed, f"trial-{index}")
                    notices(config)
                    layout = layout_there(config, place.cluster)
                    check_inputs(RunRequest(config, layout, StageSelection(until=sweep.until), cluster=place.cluster))
            except UserError as error:
                raise UserError(f"trial {setting_text(values)}: {error}") from None
    for line in dict.fromkeys(said.getvalue().splitlines()):
        click.echo(line, err=True)


@contextmanager
def can_go_on(folder: Path) -> Iterator[None]:
    """Turn Ctrl-C, and the signals that end a program, into one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"Stopped. Go on with: {command('sweep', '--resume', folder)}") from None
