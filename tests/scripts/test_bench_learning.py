"""The race: that all read the same, that the peer is as it is described, what is computed from results, and that it
runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from ray_pipeline.engine.muon import POLAR_EXPRESS as OURS
from scripts import bench_learning
from scripts.learning_bench.nanochat import NanochatGPT, Shape
from scripts.learning_bench.nanochat_optimizer import POLAR_EXPRESS, momentum_at, orthogonal, rate_factor
from scripts.learning_bench.race import Plan, equal_time_steps, interval, table
from scripts.learning_bench.text import read_text

ROOT = Path(__file__).parents[2]
SHAPE = Shape(vocab_size=300, width=32, layers=3, heads=2, seq_len=16)


@pytest.fixture(scope="module")
def text():
    return read_text("builtin", vocab_size=300, seq_len=64, documents=40)


def test_every_token_of_a_held_out_document_but_its_first_is_a_target_once(text) -> None:
    targets = sum(int((batch.labels >= 0).sum()) for batch in text.heldout_batches(2))
    rows = sum(len(batch) for batch in text.heldout_batches(2))
    assert rows == len(text.heldout.tokens) and 0 < targets <= rows * 64
    assert text.heldout_bytes > targets / 2  # a token is a byte or more, but for the ends of documents
    assert torch.equal(text.batch(1, 5, 2).tokens, text.batch(1, 5, 2).tokens)
    assert not torch.equal(text.batch(1, 5, 2).tokens, text.batch(1, 6, 2).tokens)


def test_the_peer_starts_from_even_guesses_and_reads_neither_the_future_nor_another_document() -> None:
    model = NanochatGPT(SHAPE, seed=0)
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(16) >= 9).long().expand(2, 16)
    assert model(tokens, documents).abs().max() < 0.1
    with torch.no_grad():
        for parameter in model.parameters():  # with the zeros of the start nothing would reach anything
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    before = model(tokens, documents)
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % 300
    moved = (model(changed, documents) - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [4 <= place < 9 for place in range(16)]


def test_the_peers_parameters_are_as_many_as_those_of_the_tiny_recipe() -> None:
    count = sum(parameter.numel() for parameter in NanochatGPT(Shape(512), seed=0).parameters())
    assert count == pytest.approx(1_313_696, rel=0.01)


def test_the_peers_optimizer_has_its_schedules_and_our_coefficients() -> None:
    assert POLAR_EXPRESS == OURS
    factors = [rate_factor(step, 600) for step in range(600)]
    assert factors[0] == 1 / 40 and factors[39] == factors[209] == 1.0 and factors[599] < 0.06
    assert momentum_at(0, 600) == 0.85 and momentum_at(400, 600) == pytest.approx(0.97 - 0.07 * 190 / 390)
    for shape in ((24, 8), (8, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert (values - 1).abs().max() < 0.2
        assert values.square().sum() == pytest.approx(8)


def test_intervals_are_students_and_differences_are_paired() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    common = {"text": "t", "race": "tokens", "steps": 10, "num_params": 1000, "bits": 1.0}
    done = [common | {"competitor": who, "seed": seed, "nats": nats + seed} for who, nats in (("tiny", 2.0),
            ("nanochat", 2.5)) for seed in range(3)]  # fmt: skip
    assert table(done)[2] == "| t | 10 steps | tiny | 1,000 | 3.000 ± 2.484 | 1.000 ± 0.000 | -0.500 ± 0.000 |"


def test_steps_in_equal_time_come_from_what_a_step_took() -> None:
    plan = Plan(("t",), ("tiny", "llama"), 1, 600, 8, 256, 512, 10, equal_time=True)
    done = [{"text": "t", "competitor": c, "race": "tokens", "seconds": s} for c, s in (("tiny", 0.2), ("llama", 0.1))]
    assert equal_time_steps(plan, "t", "llama", done) == 1200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--peers", "lama"], "--peers lama: must be of nanochat, llama, transformers"),
        (["--recipes", "tinny"], "--recipes tinny: no such recipe or file"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--text", "no/such.txt", "--quick"], "no/such.txt"),
    ],
)
def test_what_cannot_be_raced_is_refused(given, message, capsys, tmp_path) -> None:
    assert bench_learning.main([*given, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_race_runs_without_ray_and_deepspeed_and_goes_on_where_it_was(tmp_path) -> None:
    code = (
        "import sys; from scripts.bench_learning import main; "
        f"assert main(['--quick', '--equal-time', '--out', {str(tmp_path)!r}]) == 0; "
        "assert not {'ray', 'deepspeed'} & set(sys.modules)"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    data = json.loads((tmp_path / "bench_learning.json").read_text())
    assert len(data["trainings"]) == 4 + 3 and all(4 < t["nats"] < 8 for t in data["trainings"])
    assert "seed 0" in outputs[0] and "seed 0" not in outputs[1]
    ElementTree.fromstring((tmp_path / "bench_learning.svg").read_text())
