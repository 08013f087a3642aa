"""`plan`: what a layout costs, without touching a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ray_pipeline.cli.options import layout_options, recipe_options, take_request
from ray_pipeline.cli.output_files import has_keys, refuse_to_replace


@click.command()
@recipe_options
@layout_options
@click.option("--stage", default="pretrain", help="The training stage to plan. Default: pretrain.")
@click.option("--hardware", help="Device: a100-80gb, h100, h200, h800, b200, cpu. Default: what the settings name.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the whole plan to this file too.")
def plan(stage: str, hardware: str | None, json_file: Path | None, **options: Any) -> int:
    """What a layout costs: parameters, memory, communication, time. Starts nothing. Exit code 1 if it does not fit."""
    from rich.console import Console

    from ray_pipeline.costs.estimate import make_plan
    from ray_pipeline.costs.hardware_table import default_hardware, find_hardware
    from ray_pipeline.costs.table import print_plan
    from ray_pipeline.errors import UserError, did_you_mean
    from ray_pipeline.layout.choice import resolve_layout
    from ray_pipeline.settings.schema import TRAINING_STAGES

    if stage not in TRAINING_STAGES:
        hint, known = did_you_mean(stage, TRAINING_STAGES), ", ".join(TRAINING_STAGES)
        raise UserError(f"--stage {stage}: no such training stage{hint}. They are {known}.")
    if json_file is not None:
        refuse_to_replace("--json", json_file, lambda path: has_keys(path, frozenset({"fullest_pp_rank", "fits"})))
    config = take_request(options).load()
    device = default_hardware(config) if hardware is None else find_hardware(hardware)
    # What this machine has does not matter: the ranks are taken to be there, as on Modal.
    backend = "cpu" if device.device == "cpu" else "modal"
    # The stage alone is judged: a layout that another one refuses is no fault of this one's.
    alone = config.model_copy(update={"backend": backend, "stages": ["data_prep", stage]})
    # What it starts from is made by stages that are left out here.
    found = make_plan(config, resolve_layout(alone, 0), stage, device, judged=alone)
    console = Console(width=None if Console().is_terminal else 150)
    print_plan(console, found)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file}: {error.strerror or error}. Choose another file.") from None
    return 0 if found.fits else 1
