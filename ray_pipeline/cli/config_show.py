"""`config-show`: every setting of a run as it would be used."""

from __future__ import annotations

from typing import Any

import click

from ray_pipeline.cli.options import layout_options, place_options, recipe_options, take_request


@click.command("config-show")
@recipe_options
@layout_options
@place_options
@click.option("--json", "as_json", is_flag=True, help="JSON instead of YAML.")
def config_show(as_json: bool, **options: Any) -> int:
    """Print all settings: defaults, then recipe, environment and flags. The output is a valid recipe."""
    from ray_pipeline.settings.loading import config_dump, config_yaml

    config = take_request(options).load()
    if as_json:
        import json

        click.echo(json.dumps(config_dump(config), indent=2))
    else:
        click.echo(config_yaml(config), nl=False)
    return 0
