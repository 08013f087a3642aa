"""What ranks print lies in a file of each, and the terminal gets its streams back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray_pipeline.launch.launchers import ProcessLauncher
from ray_pipeline.records.rank_output import output_file, output_to, printed


def speak(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: print from Python, to stderr, and from below it."""
    import torch.distributed as dist

    print(f"rank {dist.get_rank()} prints")
    print("and warns", file=sys.stderr)
    os.write(2, b"so does C\n")
    return {}


def test_each_rank_has_a_file_of_its_own(tmp_path: Path, capfd) -> None:
    ProcessLauncher(2).run("sft", speak, {"folder": str(tmp_path)})
    for rank in (0, 1):
        text = output_file(tmp_path, f"rank-{rank}").read_text()
        assert sorted(text.splitlines()) == sorted([f"rank {rank} prints", "and warns", "so does C"])
    assert "prints" not in capfd.readouterr().out
    assert [path.name for path in printed(tmp_path)] == ["rank-0.log", "rank-1.log"]


def test_streams_are_given_back_and_a_second_attempt_goes_on_in_the_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ray_pipeline.records.rank_output import output_to\n"
        "for number in (1, 2):\n"
        "    with output_to(Path(sys.argv[1])): print('inside', number)\n"
        "    print('outside', number)"
    )
    path = tmp_path / "logs" / "rank-0.log"
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert said == "outside 1\noutside 2\n"
    assert path.read_text() == "inside 1\ninside 2\n"


def test_an_error_inside_gives_the_streams_back_too(tmp_path: Path, capfd) -> None:
    try:
        with output_to(output_file(tmp_path, "stage")):
            raise ZeroDivisionError
    except ZeroDivisionError:
        os.write(1, b"back\n")
    assert capfd.readouterr().out == "back\n"
    assert printed(tmp_path) == []
