"""`plan`: what a layout costs, without touching a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_pipeline.cli.options import dial_options, layout_options, recipe_options, take_request
from ray_pipeline.cli.output_files import check_output_file, has_keys

if TYPE_CHECKING:
    from rich.console import Console

    from ray_pipeline.costs.hardware_table import Hardware
    from ray_pipeline.settings.schema import PipelineFields


@click.command()
@recipe_options
@dial_options
@layout_options
@click.option("--stage", default="pretrain", help="The training stage to plan. Default: pretrain.")
@click.option("--hardware", help="Device: a100-80gb, h100, h200, h800, b200, cpu. Default: what the settings name.")
@click.option("--search", is_flag=True, help="The fastest layouts that fit --gpus ranks; what other flags set is kept.")
@click.option("--published", is_flag=True, help="Published runs beside their plans; takes no other flag but --json.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the whole plan to this file too.")
def plan(
    stage: str, hardware: str | None, search: bool, published: bool, json_file: Path | None, **options: Any
) -> int:
    """What a layout costs: parameters, memory, communication, time. Starts nothing. Exit code 1 if it does not fit.

    With --search: the fastest layouts that fit, of all that are legal on as many ranks.
    With --published: what runs of others took, what the planner says that they take, and why.
    """
    from rich.console import Console

    from ray_pipeline.costs.hardware_table import default_hardware, find_hardware
    from ray_pipeline.errors import UserError, did_you_mean
    from ray_pipeline.settings.schema import TRAINING_STAGES

    if stage not in TRAINING_STAGES:
        hint, known = did_you_mean(stage, TRAINING_STAGES), ", ".join(TRAINING_STAGES)
        raise UserError(f"--stage {stage}: no such training stage{hint}. They are {known}.")
    if json_file is not None:
        kinds = {"search": {"found", "judged"}, "published": {"runs", "changes"}, "": {"fullest_pp_rank", "fits"}}
        made = frozenset(kinds["published" if published else "search" if search else ""])
        check_output_file("--json", json_file, lambda path: has_keys(path, made))
    console = Console(width=None if Console().is_terminal else 150)
    if published:
        _refuse_other_flags()
        _write(json_file, _published(console))
        return 0
    request = take_request(options)
    config = request.load()
    device = default_hardware(config) if hardware is None else find_hardware(hardware)
    if search:
        given = {key.removeprefix("layout.") for key in request.overrides if key.startswith("layout.")}
        fits, found = _search(console, config, stage, device, frozenset(given))
    else:
        fits, found = _plan(console, config, stage, device)
    _write(json_file, found)
    return 0 if fits else 1


def _refuse_other_flags() -> None:
    """Published runs have settings of their own.

    Raises:
        UserError: naming the flags that would change nothing.
    """
    from click.core import ParameterSource

    from ray_pipeline.errors import UserError

    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    others = [param.opts[0] for param in context.command.params if param.name in given - {"published", "json_file"}]
    if others:
        text = ", ".join(others)
        raise UserError(
            f"--published with {text}: published runs have settings of their own. Omit {text}, or --published."
        )


def _write(json_file: Path | None, found: dict[str, Any]) -> None:
    from ray_pipeline.errors import UserError

    if json_file is None:
        return
    try:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {json_file}: {error.strerror or error}. Choose another file.") from None


def _published(console: Console) -> dict[str, Any]:
    from ray_pipeline.costs.published_runs import AIM, CHANGES, RUNS
    from ray_pipeline.costs.table import print_published

    print_published(console, RUNS)
    changes = {text: AIM.with_features(**features) for text, features in CHANGES.items()}
    return {"runs": [run.as_dict() for run in RUNS], "changes": {"run": AIM.name, "seconds": changes}}


def _alone(config: PipelineFields, stage: str, device: Hardware) -> PipelineFields:
    """The settings that a layout must be legal for: a layout that another stage refuses is no fault of this one's.

    What this machine has does not matter: the ranks are taken to be there, as on Modal.
    """
    backend = "cpu" if device.device == "cpu" else "modal"
    return config.model_copy(update={"backend": backend, "stages": ["data_prep", stage]})


def _plan(console: Console, config: PipelineFields, stage: str, device: Hardware) -> tuple[bool, dict[str, Any]]:
    from ray_pipeline.costs.estimate import make_plan
    from ray_pipeline.costs.table import print_plan
    from ray_pipeline.layout.choice import resolve_layout

    alone = _alone(config, stage, device)
    # What it starts from is made by stages that are left out here.
    found = make_plan(config, resolve_layout(alone, 0), stage, device, judged=alone)
    print_plan(console, found)
    return found.fits, found.as_dict()


def _search(
    console: Console, config: PipelineFields, stage: str, device: Hardware, given: frozenset[str]
) -> tuple[bool, dict[str, Any]]:
    from ray_pipeline.costs.search import LayoutSearch
    from ray_pipeline.costs.table import print_search
    from ray_pipeline.layout.layout import layout_of

    alone = _alone(config, stage, device)
    with console.status(f"looking at layouts of {layout_of(config.layout).gpus} ranks"):
        found = LayoutSearch(alone, stage, device, layout_of(config.layout), given).run()
    print_search(console, found, stage, device.title)
    return bool(found.found), found.as_dict()
