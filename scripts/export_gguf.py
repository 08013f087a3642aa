#!/usr/bin/env python3
"""A run's model as GGUF files: another name for the verb `export`.

python scripts/export_gguf.py --checkpoint RUN                                 # to RUN-gguf
python scripts/export_gguf.py --checkpoint RUN:sft --out DIR --quantize q8_0   # further options go to the verb
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
    parser.add_argument("--out", help="folder to write; default: NAME-gguf")
    given, options = parser.parse_known_args()
    out = given.out or Path(given.checkpoint).name.replace(":", "-") + "-gguf"
    return verb(["export", given.checkpoint, "--format", "gguf", "--out", out, *options])


if __name__ == "__main__":
    sys.exit(main())
