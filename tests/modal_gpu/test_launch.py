"""`run --backend modal` through Modal's own client, against the stand-in: what is asked for, and every refusal.

Nothing is computed here: calls end when a test says so.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from modal_gpu.job import Outcome
from ray_pipeline.cli import main
from tests.modal_gpu.world import World, succeeded


def launch(tmp_path: Path, *flags: str, name: str = "toy") -> int:
    place = ["--output-dir", str(tmp_path / "runs"), "--run-name", name]
    return main(["run", "--backend", "modal", "--yes", "--detach", *place, *flags])


def gpus(function: pb.Function) -> tuple[str, int]:
    found = function.resources.gpu_config
    return found.gpu_type, found.count


def test_three_h100_train_and_cpus_do_the_rest(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert launch(tmp_path, "--gpus", "3", "--pp-size", "3", "--gpu-type", "H100") == 0
    made = {name: request.function for name, request in world.created().items()}
    assert set(made) == {"train", "prepare", "conductor"}
    train, prepare, conductor = made["train"], made["prepare"], made["conductor"]
    assert gpus(train) == ("H100", 3)
    assert gpus(prepare) == gpus(conductor) == ("", 0)
    assert train._experimental_group_size == 0
    assert train.timeout_secs == 86400
    assert (conductor.retry_policy.retries, train.retry_policy.retries) == (5, 0), "it decides what is begun again"
    assert train.single_use_containers
    assert train.resources.milli_cpu == 6000 and train.resources.memory_mb >= 16384
    mounts = {mount.mount_path: mount.volume_id for mount in train.volume_mounts}
    assert mounts == {"/runs": "vo-deepseek-runs", "/root/.cache/huggingface": "vo-huggingface-cache"}
    assert list(conductor.volume_mounts) == []
    assert [world.secrets[key] for key in train.secret_ids] == [{"WANDB_API_KEY": "0" * 40}]
    (app,) = [request for request in world.apps.values() if request.description == "ray-pipeline"]
    assert app.app_state == pb.APP_STATE_DETACHED
    kept = json.loads((tmp_path / "runs/toy/modal.json").read_text())
    assert kept["call"] == "fc-1" and kept["volume"] == "deepseek-runs"
    assert "modal status toy" in capsys.readouterr().out


def test_eight_a100(world: World, tmp_path: Path) -> None:
    assert launch(tmp_path, "--gpus", "8", "--dp-size", "8", "--gpu-type", "A100-80GB") == 0
    train = world.created()["train"].function
    assert gpus(train) == ("A100-80GB", 8) and train._experimental_group_size == 0


def test_sixteen_h100_are_two_whole_hosts(world: World, tmp_path: Path) -> None:
    flags = ["--gpus", "16", "--dp-size", "16", "--set", "pretrain.batch_size=16", "--set", "sft.batch_size=16"]
    assert launch(tmp_path, *flags, "--set", "distillation.batch_size=16", "--gpu-type", "H100") == 0
    train = world.created()["train"].function
    assert gpus(train) == ("H100", 8)
    assert train._experimental_group_size == 2 and train.resources.rdma and train.i6pn_enabled
    assert world.created()["prepare"].function._experimental_group_size == 0


def test_fallbacks_region_cores_and_memory_are_passed_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes = ["modal.region=us-east,eu", "modal.cpus=12", "modal.memory_gib=100", "modal.nonpreemptible=true"]
    flags = [word for change in changes for word in ("--set", change)]
    assert launch(tmp_path, "--gpus", "2", "--dp-size", "2", "--gpu-type", "H100,A100-80GB", *flags) == 0
    ranked = [each.function for each in world.created()["train"].function_data.ranked_functions]
    assert [gpus(each) for each in ranked] == [("H100", 2), ("A100-80GB", 2)]
    assert ranked[0].resources.milli_cpu == 12000 and ranked[0].resources.memory_mb == 102400
    assert list(ranked[0].scheduler_placement.regions) == ["us-east", "eu"]
    assert world.created()["prepare"].function.scheduler_placement.nonpreemptible
    assert "the dearest and the smallest of H100, A100-80GB" in capsys.readouterr().out


def test_the_job_has_the_containers_paths_and_the_home_s_settings(world: World, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("one two three\n\n" * 400)
    assert launch(tmp_path, "--gpus", "1", "--data", str(text)) == 0
    (call,) = world.calls.values()
    data = world.blobs[call.item.args_blob_id] if call.item.args_blob_id else call.item.args
    assert b"/runs/inputs/" in data and str(text).encode() in data
    stored = (tmp_path / "runs/toy/config.yaml").read_text()
    assert f"name: {text}" in stored and "backend: modal" in stored and "/runs/inputs" not in stored
    (up,) = (world.volume("deepseek-runs") / "inputs").glob("*/book.txt")
    assert up.read_bytes() == text.read_bytes()
    assert (world.volume("deepseek-runs") / "toy/run.json").read_bytes() == (
        tmp_path / "runs/toy/run.json"
    ).read_bytes()


def test_rewards_of_the_user_s_travel_and_are_checked_before(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "shouting.py").write_text("def loud(prompt, completion, reference):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert launch(tmp_path, "--gpus", "1", "--set", "grpo.rewards={answer: 1.0, 'shouting:quiet': 1.0}") == 2
    assert 'shouting has no function "quiet"' in capsys.readouterr().err
    assert not world.calls
    assert launch(tmp_path, "--gpus", "1", "--set", "grpo.rewards={answer: 1.0, 'shouting:loud': 1.0}") == 0
    names = [file.filename for request in world.requests(pb.MountGetOrCreateRequest) for file in request.files]
    assert any(name.endswith("shouting.py") for name in names)


def test_the_key_of_the_hub_travels_or_is_modal_s_secret(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert launch(tmp_path, "--gpus", "1", "--set", "modal.hf_secret=hub") == 0
    sent = [world.secrets[key] for key in world.created()["train"].function.secret_ids]
    assert sent == [{"WANDB_API_KEY": "0" * 40, "HF_TOKEN": "hf_mine"}]
    monkeypatch.delenv("HF_TOKEN")
    world.secrets["st-9"], world.secret_names["hub"] = {"HF_TOKEN": "kept"}, "st-9"
    assert launch(tmp_path, "--gpus", "1", "--no-wandb", "--set", "modal.hf_secret=hub", name="other") == 0
    assert list(world.created()["train"].function.secret_ids) == ["st-9"]


def test_a_run_is_resumed_on_another_gpu_in_another_layout(world: World, tmp_path: Path) -> None:
    assert launch(tmp_path, "--gpus", "3", "--pp-size", "3", "--gpu-type", "H100") == 0
    world.finish(world.calls["fc-1"], *succeeded(Outcome(1, "its container ended")))
    change = ["--gpus", "2", "--pp-size", "1", "--dp-size", "2", "--gpu-type", "L40S", "--set", "grpo.beta=0.5"]
    place = ["--output-dir", str(tmp_path / "runs")]
    assert main(["resume", "toy", "--yes", "--detach", *change, *place]) == 0
    assert gpus(world.created()["train"].function) == ("L40S", 2)
    stored = (tmp_path / "runs/toy/config.yaml").read_text()
    assert "gpu_type: L40S" in stored and "beta: 0.5" in stored and "backend: modal" in stored


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--gpu-type", "h10"], 'no such GPU (did you mean "H100"?)'),
        (
            ["--gpus", "12", "--pp-size", "3", "--dp-size", "4"],
            "whole hosts of 8 GPUs alone. Use --gpus 8 or --gpus 16.",
        ),
        (["--gpus", "16", "--dp-size", "16", "--gpu-type", "L4"], "those of L4 do not join"),
        (["--gpus", "8", "--dp-size", "8", "--gpu-type", "A10"], "at most 4 of A10"),
        (["--gpu-type", "CPU,H100"], "CPU cannot stand among GPUs"),
        (["--gpus", "7", "--pp-size", "7"], "more ranks than layers"),
        (["--gpu-type", "B300", "--budget-usd", "5"], "cost.budget_usd=5: what B300 costs on Modal is not known here."),
    ],
)
def test_what_modal_cannot_place_is_refused(
    flags: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    big = [word for stage in ("pretrain", "sft", "distillation") for word in ("--set", f"{stage}.batch_size=48")]
    assert launch(tmp_path, *flags, *big) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_needs_no_account(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODAL_SERVER_URL", "http://127.0.0.1:9")
    assert launch(tmp_path, "--gpus", "16", "--dp-size", "16", "--batch-size", "16", "--dry-run") == 0
    assert "would rent 16 x H100 on 2 hosts" in capsys.readouterr().out


def test_without_yes_and_without_anybody_to_ask_nothing_is_rented(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", "--backend", "modal", "--gpus", "1", "--output-dir", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "Add --yes" in shown.err and "Training will cost about" in shown.out
    assert not world.seen and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "code", "text"), [("n", 2, "Nothing was rented."), (None, 130, "Nothing was started on Modal.")]
)
def test_a_no_and_ctrl_c_at_the_question_rent_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, answer: str | None,
    code: int, text: str,
) -> None:  # fmt: skip
    def asked(question: str) -> str:
        assert question == "Rent them? [y/N] "
        if answer is None:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", asked)
    assert main(["run", "--backend", "modal", "--gpus", "1", "--output-dir", str(tmp_path)]) == code
    assert text in capsys.readouterr().err
    assert not world.seen and list(tmp_path.iterdir()) == []


def test_detach_is_for_modal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "--detach", "--output-dir", str(tmp_path)]) == 2
    assert "--detach: a run on this machine ends with the terminal" in capsys.readouterr().err


def failure(world: World, tmp_path: Path, capsys: pytest.CaptureFixture, *flags: str) -> str:
    assert launch(tmp_path, "--gpus", "1", *flags) == 2
    assert not world.calls
    return capsys.readouterr().err


def test_a_missing_secret_is_one_message(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    text = failure(world, tmp_path, capsys)
    assert "modal secret create wandb WANDB_API_KEY=..." in text and "--no-wandb" in text


def test_refused_credentials_are_one_message(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    world.errors["ClientHello"] = GRPCError(Status.UNAUTHENTICATED, "Token missing or invalid")
    assert "Modal refused the credentials" in failure(world, tmp_path, capsys)


def test_a_limit_of_the_account_is_one_message(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    world.errors["FunctionCreate"] = GRPCError(Status.PERMISSION_DENIED, "GPUs need a payment method")
    text = failure(world, tmp_path, capsys)
    assert text.count("\n") == 1 and "GPUs need a payment method" in text and "Nothing was started." in text


def test_a_service_that_is_not_there_is_told_within_ten_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SERVER_URL": "http://127.0.0.1:9", "TOKEN_ID": "ak-x", "TOKEN_SECRET": "as-x"}.items():
        monkeypatch.setenv(f"MODAL_{name}", value)
    assert launch(tmp_path, "--gpus", "1") == 2
    assert "Modal cannot be reached" in capsys.readouterr().err


def test_without_credentials_it_says_how_to_get_them(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("modal_gpu.failures.modal_settings.get", lambda *_, **__: None)
    assert launch(tmp_path, "--gpus", "1") == 2
    text = capsys.readouterr().err
    assert "modal token new" in text and "https://modal.com" in text


def test_a_run_that_is_worked_on_is_not_begun_twice(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from modal_gpu.run_registry import Registry

    assert launch(tmp_path, "--gpus", "1") == 0
    assert Registry().lock("toy", "fc-1") is None
    assert launch(tmp_path, "--gpus", "1") == 2
    assert "call fc-1 works on it on Modal" in capsys.readouterr().err
    world.finish(world.calls["fc-1"], *succeeded(Outcome(0)))
    assert launch(tmp_path, "--gpus", "1") == 0, "a call that is over holds nothing"


def test_a_run_of_another_folder_is_not_mixed_with(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert launch(tmp_path, "--gpus", "1") == 0
    assert launch(tmp_path / "other", "--gpus", "1") == 2
    assert "is on Modal's volume already" in capsys.readouterr().err and len(world.calls) == 1


def test_modal_s_own_command_line_starts_a_recipe(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modal_gpu import app as entry

    monkeypatch.chdir(tmp_path)
    world.start = lambda world, call: world.finish(call, *succeeded(Outcome(0)))
    with entry.app.run():
        assert entry._run(None, {"layout.gpus": 2, "layout.dp_size": 2, "modal.gpu_type": "L4", "run_name": "toy"}) == 0
    (bound,) = world.requests(pb.FunctionBindParamsRequest)
    found = bound.function_options.resources.gpu_config
    assert (found.gpu_type, found.count) == ("L4", 2)
    assert (tmp_path / "runs/toy/run.json").exists()


def test_deploying_needs_no_secret_and_no_run(world: World) -> None:
    from modal_gpu.app import app

    app.deploy(name="ray-pipeline")
    assert set(world.created()) == {"train", "prepare", "conductor"}
