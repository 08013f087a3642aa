"""`plan` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.costs import published_runs

ROOT = Path(__file__).resolve().parents[2]
V3 = ["plan", "--config", str(ROOT / "configs/v3-671b.yaml"), "--gpus", "2048", "--pp-size", "16", "--ep-size", "64"]


def test_v3_prints_its_published_size_and_what_would_fit(capsys: pytest.CaptureFixture) -> None:
    assert main([*V3, "--hardware", "h800", "--activation-checkpointing", "none"]) == 1
    page = capsys.readouterr().out
    for expected in (
        "2048 GPU ranks: pp=16 dp=128 ep=64 ZeRO=1, bf16, on H800 SXM",
        "671B",
        "36.6B",
        "pp 15  1+H",
        "experts 252-255",
        "62.9M (15360 rows of 4096, 120 micro-batches per rank of 1)",
        "DOES NOT FIT: the fullest rank needs 223 GB of 76 GB usable, a node 72.6 GB of 2.05 TB CPU memory",
        "--activation-checkpointing full (44 GB",
    ):
        assert expected in page


def test_v3_answers_with_shards_in_every_stage_and_with_whole_copies_nowhere(capsys: pytest.CaptureFixture) -> None:
    recipe = ["plan", "--config", str(ROOT / "configs/v3-671b.yaml"), "--stage"]
    for stage in ("sft", "dpo", "grpo", "distillation"):
        assert main([*recipe, stage]) == 0, stage
        capsys.readouterr()
        assert main([*recipe, stage, "--set", "layout.sampling=whole"]) == 1
        assert "use --set layout.sampling=sharded, larger devices" in " ".join(capsys.readouterr().out.split())


def test_what_it_advises_fits(capsys: pytest.CaptureFixture) -> None:
    recipe = ["plan", "--config", str(ROOT / "configs/v3-16b-8xh100.yaml")]
    assert main([*recipe, "--activation-checkpointing", "none"]) == 1
    assert "--activation-checkpointing selective (" in capsys.readouterr().out
    assert main(recipe) == 0  # the recipe recomputes attention
    assert "FITS: the fullest rank needs 73.3 GB of 76 GB usable" in capsys.readouterr().out


def test_a_stage_is_judged_alone(capsys: pytest.CaptureFixture) -> None:
    """Six pipeline ranks are too many for the student of four layers, and for nothing else."""
    layout = ["--gpus", "6", "--pp-size", "6", "--hardware", "cpu"]
    assert main(["plan", *layout, "--stage", "pretrain"]) == 0
    assert main(["plan", *layout, "--stage", "distillation"]) == 2
    assert "distillation.student.num_hidden_layers=4" in capsys.readouterr().err

    layout = ["--gpus", "2", "--dp-size", "2", "--hardware", "cpu", "--set", "sft.batch_size=3"]
    assert main(["plan", *layout, "--stage", "pretrain"]) == 0
    assert main(["plan", *layout, "--stage", "sft"]) == 2
    assert "sft.batch_size=3" in capsys.readouterr().err


BIG = ["run", "--config", str(ROOT / "configs/large.yaml"), "--backend", "cpu", "--gpus", "1", "--pp-size", "1"]


def test_run_refuses_what_cannot_fit_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = [*BIG, "--dp-size", "1", "--zero-stage", "0", "--output-dir", str(tmp_path / "runs")]
    assert main(given) == 2
    text = capsys.readouterr().err
    assert "pretrain does not fit: on this machine's CPU" in text and "usable. " in text
    assert "--set layout.check_memory=false starts all the same" in text and "Traceback" not in text
    assert not (tmp_path / "runs").exists()


BY_HAND = ["--gpus", "3", "--pp-size", "3", "--pp-layout", "E+1|2|3+H"]


def test_layers_set_by_hand_are_the_models_and_its_student_is_balanced(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for stage, parts in (("grpo", ["E+1", "2", "3+H"]), ("distillation", ["E+1", "2", "1+H"])):
        file = tmp_path / f"{stage}.json"
        assert main(["plan", *BY_HAND, "--stage", stage, "--hardware", "cpu", "--json", str(file)]) == 0
        assert json.loads(file.read_text())["placement"] == parts
        assert ('--pp-layout "' in capsys.readouterr().out) == (stage == "grpo")
    runs = ["--backend", "cpu", "--output-dir", str(tmp_path / "runs"), "--dry-run"]
    assert main(["run", *BY_HAND, *runs]) == 0
    assert "distillation" in capsys.readouterr().out


def test_json_is_written_beside_the_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "--gpus", "4", "--pp-size", "2", "--hardware", "cpu", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["layout"]["pp"], found["layout"]["dp"], found["hardware"]["name"]) == (2, 2, "cpu")
    assert "4 CPU ranks: pp=2 dp=2" in capsys.readouterr().out


def test_published_runs_are_shown_beside_their_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_runs, "RUNS", published_runs.RUNS[1:8])  # the others' schedules take seconds to play
    file = tmp_path / "published.json"
    assert main(["plan", "--published", "--json", str(file)]) == 0
    page = capsys.readouterr().out
    for expected in ("DeepSeek-V3, 1024 H100, bf16", "61.8", "Qwen3-30B", "+2%*", "this engine: pp=8 dp=64 tp=2 ep=32"):
        assert expected in page
    found = json.loads(file.read_text())
    assert found["runs"][0]["published"] == 61.756
    assert found["changes"]["seconds"]["without all three"] > 2 * found["changes"]["seconds"]["as it was run"]
    assert main(["plan", "--published", "--json", str(file)]) == 0, "its own file is replaced"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--published", "--search", "--gpus", "8"], "--published with --gpus, --search: published runs have settings"),
        (["--hardware", "h10"], '--hardware h10: not in the table (did you mean "h100"?)'),
        (["--stage", "distil"], '--stage distil: no such training stage (did you mean "distillation"?)'),
        (["--gpus", "8", "--pp-size", "3"], "Nearest layout that works: --gpus"),
        (["--tp-size", "3", "--gpus", "3"], "num_attention_heads"),
        (["--json", "/nowhere/plan.json"], "--json /nowhere/plan.json: is a folder, or lies in none"),
    ],
)
def test_a_mistake_gets_one_message(arguments: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *arguments]) == 2
    text = capsys.readouterr().err
    assert expected in text and "Traceback" not in text


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = (
        f"import sys; from ray_pipeline.cli import main; main({V3!r}); "
        "print(sorted({'torch', 'ray', 'deepspeed', 'modal', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
