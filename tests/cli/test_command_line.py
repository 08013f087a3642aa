"""The command line as a user meets it: help, suggestions, exit codes. Nothing here starts a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ray_pipeline.cli import main
from ray_pipeline.cli.group import HIDDEN, VERBS
from ray_pipeline.cli.options import take_request
from ray_pipeline.settings.loading import config_yaml, load_config

ROOT = Path(__file__).resolve().parents[2]


def fail(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """stderr of a command that must end with exit code 2, in one message, without a traceback."""
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("Error: ")
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("verb", ["", *(verb for verb in VERBS if verb not in HIDDEN)])
def test_any_verb_has_help(verb: str) -> None:
    command = [sys.executable, "-m", "ray_pipeline.cli", *([verb] if verb else []), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ray_pipeline.cli import main; main(['run', '--help']); "
        "print(sorted({'torch', 'ray', 'pydantic', 'wandb', 'modal', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_no_arguments_shows_the_verbs(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS if verb not in HIDDEN)
    assert not any(verb in text for verb in HIDDEN)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu"], '"rnu" is not a verb (did you mean "run"?)'),
        (["run", "--max-stps", "3"], "'--max-steps'"),
        (["run", "--gpus", "0"], "0 is not in the range x>=1"),
        (["run", "--gpus", "many"], "'many' is not a valid integer"),
        (["run", "extra"], "unexpected extra argument"),
        (["run", "--set", "grpo.beta"], "write it as key=value"),
        (["run", "--set", "grpo.bta=1"], 'did you mean "grpo.beta"'),
        (["run", "--config", "nowhere.yaml"], "no such file"),
        (["run", "--stage", "stf"], '--stage stf: no such stage (did you mean "sft"?)'),
        (["run", "--from", "grpo", "--until", "sft"], "grpo comes after sft"),
        (["run", "--stage", "sft", "--until", "grpo"], "give one or the other"),
        (["run", "--backend", "tpu"], "backend=tpu: must be 'auto', 'cpu', 'cuda' or 'modal'"),
        (["run", "--schedule", "zvb"], "schedule=zvb: must be '1f1b', 'interleaved_1f1b', 'zbv' or 'dualpipev'"),
        (["run", "--schedule", "dualpipe"], '(did you mean "dualpipev"?)'),
        (["run", "--activation-checkpointing", "ful"], '(did you mean "full"?)'),
        (["run", "--model-size", "huge"], "model_size=huge: must be 'tiny', 'small', 'medium' or 'large'"),
        (["run", "--time-sliced"], "use --gpus 3 --pp-size 3 instead"),
        (["run", "--time-slced"], "No such option"),
        (["run-rust", "--anything", "x"], "use `run`"),
        (["run-mlx"], "use `run --backend cpu`"),
        (["resume"], "Missing argument 'RUN'"),
        (["generate", "RUN", "  "], "PROMPT is empty"),
        (["inspect-batch", "RUN", "--stage", "export"], "--stage export: reads no batches"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in fail(capsys, *arguments)
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--gpus", "9", "--pp-size", "9", "--backend", "cpu"], "more ranks than layers"),
        (["--gpus", "1", "--backend", "cuda"], "no GPU that PyTorch can use"),
        (["--tp-size", "3", "--backend", "cpu"], "num_attention_heads=8 cannot be shared evenly by 3 ranks"),
        (["--gpus", "2", "--schedule", "zbv", "--backend", "cpu"], "Use --schedule 1f1b, or --pp-size 2"),
    ],
)
def test_a_layout_that_cannot_run_is_refused_before_anything_starts(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_pipeline.hardware.count_gpus", lambda: 0)
    assert expected in fail(capsys, "run", "--output-dir", str(tmp_path), *flags)
    assert list(tmp_path.iterdir()) == []


def run_folder(output_dir: Path, name: str, **overrides: object) -> Path:
    """A run as the workflow leaves it at its start: the settings and nothing else."""
    folder = output_dir / name
    folder.mkdir(parents=True)
    settings = load_config(None, {"run_name": name, **overrides})
    (folder / "config.yaml").write_text(config_yaml(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("verb", [["resume"], ["status"], ["generate"], ["inspect-batch"]])
def test_unknown_run_lists_those_there_are(verb: list[str], capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    more = {"generate": ["hello"], "inspect-batch": ["--stage", "sft"]}.get(verb[0], [])
    text = fail(capsys, *verb, "alpa", *more, "--output-dir", str(tmp_path))
    assert "there are no runs in" in text
    run_folder(tmp_path, "alpha")
    run_folder(tmp_path, "beta")
    text = fail(capsys, *verb, "alpa", *more, "--output-dir", str(tmp_path))
    assert 'did you mean "alpha"' in text and "beta" in text


def test_config_show_prints_a_recipe_that_loads_back(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["config-show", "--config", str(ROOT / "configs/tiny.yaml"), "--set", "grpo.beta=0.02"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["grpo"]["beta"] == 0.02
    path = tmp_path / "shown.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path) == load_config(None, {"grpo.beta": "0.02"})


def test_config_show_reads_every_flag(capsys: pytest.CaptureFixture) -> None:
    flags = (
        "--model-size small --gpus 4 --pp-size 2 --dp-size 2 --tp-size 1 --ep-size 1 --sp-size 1 --zero-stage 1 "
        "--max-steps 7 --batch-size 16 --seq-len 128 --seed 5 --run-name r1 --output-dir out --backend pytorch "
        "--no-wandb --data a.txt --data b.txt --sft-data c.jsonl --prompt-data d.jsonl --gpu-type L4"
    )
    assert main(["config-show", "--json", *flags.split()]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model_size"] == "small" and shown["model"]["hidden_size"] == 512
    layout = shown["layout"]
    assert [layout[f"{name}_size"] for name in ("pp", "dp", "tp", "ep", "sp")] == [2, 2, 1, 1, 1]
    assert (layout["gpus"], layout["zero_stage"]) == (4, 1)
    assert {shown[stage]["steps"] for stage in ("pretrain", "sft", "grpo", "distillation")} == {7}
    assert {shown[stage]["batch_size"] for stage in ("pretrain", "sft", "distillation")} == {16}
    assert (shown["seed"], shown["run_name"], shown["output_dir"], shown["backend"]) == (5, "r1", "out", "auto")
    assert [source["name"] for source in shown["data"]["pretrain"]] == ["a.txt", "b.txt"]
    assert (shown["data"]["sft"], shown["data"]["prompts"], shown["data"]["seq_len"]) == ("c.jsonl", "d.jsonl", 128)
    assert (shown["tracking"]["wandb"], shown["modal"]["gpu_type"]) == (False, "L4")


def test_set_outranks_the_flag_and_the_flag_the_environment(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_PIPELINE_PRETRAIN__BATCH_SIZE", "4")
    monkeypatch.setenv("RAY_PIPELINE_DATA__SEQ_LEN", "64")
    assert main(["config-show", "--json", "--batch-size", "8", "--set", "sft.batch_size=2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["pretrain"]["batch_size"], shown["sft"]["batch_size"], shown["data"]["seq_len"]) == (8, 2, 64)


def test_a_new_layout_replaces_the_stored_one_whole(tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path, "r", **{"layout.gpus": 3, "layout.pp_size": 3, "grpo.beta": 0.5})
    config = take_request({"gpus": 2, "dp_size": 2}).load_stored(run_dir)
    assert (config.layout.gpus, config.layout.pp_size, config.layout.dp_size) == (2, 1, 2)
    assert config.grpo.beta == 0.5
    assert (config.output_dir, config.run_name) == (tmp_path, "r")
    assert take_request({"zero_stage": 1}).load_stored(run_dir).layout.pp_size == 3


def test_version_names_the_packages(capsys: pytest.CaptureFixture) -> None:
    assert main(["version", "--json"]) == 0
    assert {"ray-pipeline", "python", "torch", "ray", "deepspeed"} <= set(json.loads(capsys.readouterr().out))
    assert main(["version"]) == 0
    assert "torch" in capsys.readouterr().out


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m ray_pipeline.cli config-show | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "recipe: tiny\n"
    assert done.stderr == ""
