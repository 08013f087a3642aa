"""The command line. Each verb imports what it needs when it runs, so `--help` answers at once."""

from ray_pipeline.cli.group import main

__all__ = ["main"]
