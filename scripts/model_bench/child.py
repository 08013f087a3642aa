"""A job in a process of its own: `python -m scripts.model_bench.child JOB.json RESULT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scripts.model_bench.jobs import Job, run

if __name__ == "__main__":
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(run(job)), encoding="utf-8")
