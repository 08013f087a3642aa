"""`compare`: runs side by side, with what the same held-out questions allow to be said. Starts no Ray."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import click

from ray_pipeline.cli.output_files import check_output_file, has_keys, is_page
from ray_pipeline.cli.runs import find_run, output_dir
from ray_pipeline.errors import UserError, command
from ray_pipeline.settings.run_folder import CONFIG_FILE

MOST_RUNS = 8  # that a terminal, or a page, still shows side by side


@click.command()
@click.argument("runs", nargs=-1, metavar="RUN RUN ...")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write a page to read here.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything to this file as well.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def compare(runs: tuple[str, ...], html_file: Path | None, json_file: Path | None, **options: str | None) -> int:
    """Hold runs against the first: settings that differ, figures with intervals, tests on the same questions."""
    folders = chosen(runs, output_dir(options["output_dir"]))
    check_files(html_file, json_file)
    from rich.console import Console

    from ray_pipeline.dag.ledger import read_status
    from ray_pipeline.report.comparison import compare_runs
    from ray_pipeline.report.comparison_views import print_comparison, write_comparison
    from ray_pipeline.settings.loading import config_dump, load_config

    settings = [config_dump(load_config(folder / CONFIG_FILE)) for folder in folders]
    comparison = compare_runs([read_status(folder) for folder in folders], settings)
    print_comparison(Console(width=None if Console().is_terminal else 150), comparison)
    if html_file is not None:
        write_comparison(html_file, comparison)
    if json_file is not None:
        from ray_pipeline.records.artifacts import write_text

        write_text(json_file, json.dumps(comparison.as_json(), indent=2) + "\n")
    for path in filter(None, (html_file, json_file)):
        click.echo(f"Written: {path}")
    return 0


def chosen(runs: tuple[str, ...], folder: Path) -> list[Path]:
    """The runs' folders.

    Raises:
        UserError: fewer than two, too many, one that is not there, or one that is named twice.
    """
    if len(runs) < 2:
        example = command("compare", "first", "second")
        raise UserError(f"compare: give two runs or more, the one to be held against first: `{example}`.")
    if len(runs) > MOST_RUNS:
        raise UserError(f"compare: {len(runs)} runs are more than fit beside each other. Give {MOST_RUNS} at most.")
    folders = [find_run(name, folder) for name in runs]
    for i, each in enumerate(folders):
        if each.resolve() in [other.resolve() for other in folders[:i]]:
            raise UserError(f"compare: {runs[i]} is given twice. Give each run once.")
    return folders


def check_files(html_file: Path | None, json_file: Path | None) -> None:
    """Refuse files that cannot be written, or that are somebody else's.

    Raises:
        UserError: naming the option and the path.
    """
    from ray_pipeline.report.comparison_views import TITLE

    keys = frozenset({"kind", "runs", "settings", "stages"})
    given = (("--html", html_file, partial(is_page, title=TITLE)), ("--json", json_file, partial(has_keys, keys=keys)))
    for option, path, is_own in given:
        if path is not None:
            check_output_file(option, path, is_own)
    if html_file is not None and json_file is not None and html_file.absolute() == json_file.absolute():
        raise UserError(f"--html and --json: both name {html_file}. Give different files.")
