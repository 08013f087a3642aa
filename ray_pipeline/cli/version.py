"""`version`: what is installed."""

from __future__ import annotations

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def version(as_json: bool) -> int:
    """Print the version of this package and of those it stands on."""
    import importlib.metadata
    import json

    from ray_pipeline.hardware import machine, versions

    try:
        own = importlib.metadata.version("ray-pipeline")
    except importlib.metadata.PackageNotFoundError:
        own = "from source, not installed"
    found: dict[str, str | None] = {"ray-pipeline": own, "python": machine()["python"], **versions()}
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for name, number in found.items():
            click.echo(f"{name:<14}{number or 'not installed'}")
    return 0
