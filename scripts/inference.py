#!/usr/bin/env python3
"""Text from a run's model: another name for the verb `generate`.

python scripts/inference.py --checkpoint RUN --prompt "Once upon a time"
python scripts/inference.py --checkpoint RUN --prompt "What is 2+3?" --chat   # further options go to the verb
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_pipeline.cli import main as verb


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, RUN:STAGE or a run's folder")
    parser.add_argument("--prompt", required=True, help="text to go on with, or a question with --chat")
    given, options = parser.parse_known_args()
    run, colon, stage = given.checkpoint.rpartition(":")
    named = ["--stage", stage] if colon and not Path(given.checkpoint).exists() else []
    return verb(["generate", *options, *named, "--", run if named else given.checkpoint, given.prompt])


if __name__ == "__main__":
    sys.exit(main())
