"""The demos run in small and show what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.made_run import make_run

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run(script: str, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_attention_demo_tells_the_cache_of_every_kind() -> None:
    out = run("demo_attention.py", "--seq-len", "64", "--steps", "4")
    rows = [line.split("│") for line in out.splitlines() if line.count("│") == 8]
    cached = {row[1].strip(): row[3].strip() for row in rows}
    # 2 x key heads x head_dim; of latent attention the latent and the rotary key, with an indexer its key as well.
    assert cached == {
        "mha": "512", "gqa, 2 keys": "128", "mqa": "64", "sliding": "512", "mla": "80", "dsa": "112",
    }  # fmt: skip


@pytest.mark.slow
def test_routing_demo_draws_every_layer() -> None:
    out = run("demo_routing.py", "--steps", "8")
    assert out.count("step    0") == 2
    assert out.count(" 1: ") == out.count(" 2: ") == out.count("busiest")


@pytest.mark.slow
def test_grpo_demo_learns_from_reward_alone() -> None:
    out = run("demo_grpo.py")
    before, after = (float(out.split(f"{when}: ")[1].split("%")[0]) for when in ("before", "after"))
    assert before < 20 and after > 60, out


def test_reasoning_demo_marks_the_questions_of_a_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    out = run("demo_reasoning.py", "toy", "--output-dir", str(tmp_path))
    assert "What is 2+2?" in out and "of 1 right" in out
    assert "there are no runs" in run("demo_reasoning.py", "--output-dir", str(tmp_path / "none"), code=2)
