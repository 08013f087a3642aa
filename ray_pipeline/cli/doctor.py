"""`doctor`: what this machine has, what works on it, what to do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.runs import output_dir
from ray_pipeline.errors import EXIT_FAILED

if TYPE_CHECKING:
    from rich.table import Table

    from ray_pipeline.cli.diagnosis import Facts


@click.command()
@click.option("--output-dir", "folder", help="Folder of all runs, to check disk and rights. Default: runs.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def doctor(folder: str | None, as_json: bool) -> int:
    """Look at this machine: GPUs, NCCL, memory, disk, network, keys. Exit code 1 if something essential is missing."""
    from ray_pipeline.cli.diagnosis import as_dict, diagnose, gather

    facts = gather(str(output_dir(folder)))
    diagnosis = diagnose(facts)
    if as_json:
        click.echo(json.dumps(as_dict(facts, diagnosis), indent=2))
        return EXIT_FAILED if diagnosis.missing else 0
    from rich.console import Console

    console = Console()
    console.print(_table(facts))
    for title, lines, style in (
        ("Works here", diagnosis.works, "green"),
        ("To get more", diagnosis.advice, "yellow"),
        ("Must be fixed", diagnosis.missing, "red"),
    ):
        if lines:
            console.print(f"[bold {style}]{title}[/]")
            for line in lines:
                console.print(f"  - {line}", markup=False, highlight=False)
    return EXIT_FAILED if diagnosis.missing else 0


def _table(facts: Facts) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    gpus = [f"{gpu.name}, {gpu.memory_gib:.0f} GiB, compute capability {gpu.capability}" for gpu in facts.gpus]
    installed = ", ".join(f"{name} {version or 'MISSING'}" for name, version in facts.packages.items())
    torch = facts.torch
    rows = {
        "system": f"{facts.system['system']}, {facts.system['machine']}, Python {facts.system['python']}",
        "GPUs": "\n".join(gpus) or "none",
        "CUDA": f"PyTorch built for {torch.get('cuda_build') or 'CPU only'}, NCCL {torch.get('nccl') or 'none'}",
        "cores": str(facts.cpus),
        "memory": f"{facts.memory_gib:.1f} GiB, {facts.memory_free_gib:.1f} GiB available",
        "disk": f"{facts.disk_free_gib:.1f} GiB free for {facts.output_dir}"
        + (f", NOT WRITABLE: {facts.write_error}" if facts.write_error else ""),
        "network": ", ".join(f"{name} {'yes' if up else 'no'}" for name, up in facts.network.items()),
        "keys": ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in facts.keys.items()),
        "packages": installed,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
