#!/usr/bin/env python3
"""Keep a local copy of TinyStories (arXiv:2305.07759), or of any dataset by name, for runs without a network.

Where there is a network: python scripts/download_tinystories.py
Then, anywhere: python -m ray_pipeline.cli run --data data/TinyStories-train.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--name", default="roneneldan/TinyStories", help="datasets name, org/name")
    parser.add_argument("--split", default="train")
    parser.add_argument("--max-documents", type=int, default=None, help="stop after this many; default: all")
    parser.add_argument("--output", type=Path, default=None, help="file to write; default: data/NAME-SPLIT.jsonl")
    return parser.parse_args(argv)


def download(name: str, split: str, output: Path, max_documents: int | None) -> int:
    """Stream the dataset into a jsonl file, which appears only when it is whole.

    Returns:
        The number of records.
    Raises:
        UserError: the file is there already, no such dataset, no network, a full disk.
    """
    from ray_pipeline.data.files.hub import stream_records
    from ray_pipeline.errors import UserError
    from ray_pipeline.records.artifacts import atomic_path

    if output.exists():
        raise UserError(f"{output}: is there already. Use it, give another --output, or move it away.")
    count = 0
    with atomic_path(output) as aside, aside.open("w", encoding="utf-8") as file:
        for _, record in islice(stream_records(name, split), max_documents):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
            if count % 10_000 == 0:
                print(f"{count} records", file=sys.stderr)
    return count


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 for a user's mistake, as the pipeline's own commands."""
    sys.path.insert(0, str(ROOT))
    from ray_pipeline.errors import UserError

    given = arguments(argv)
    output = given.output or Path("data") / f"{given.name.rpartition('/')[2]}-{given.split}.jsonl"
    try:
        count = download(given.name, given.split, output, given.max_documents)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{output}: {count} records. Use it with --data {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
