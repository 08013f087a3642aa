"""The templates under configs/clusters are what their programs read, and call the verb with flags that it has."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ray_pipeline.cli.run import run
from ray_pipeline.settings.layers import RECIPE_DIR

CLUSTERS = RECIPE_DIR / "clusters"


def arguments_of(text: str) -> list[str]:
    """What follows `run` in a template."""
    return shlex.split(text.replace("\\\n", " "), comments=True)


def taken(arguments: list[str]) -> dict:
    """The flags as the verb reads them.

    Raises:
        click.UsageError: a flag it does not have.
    """
    return run.make_context("run", list(arguments)).params


def test_kuberay_asks_for_as_many_gpus_as_its_workers_have():
    job = yaml.safe_load((CLUSTERS / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    asked = taken(arguments_of(job["spec"]["entrypoint"].partition(" run ")[2]))
    assert asked["gpus"] == gpus == 16
    # The folder of runs is on the head and on every worker.
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    places = [{mount["mountPath"] for mount in each["volumeMounts"]} for each in (head, container)]
    assert all({str(asked["output_dir"]), "/dev/shm"} <= place for place in places)


def test_skypilot_asks_for_as_many_gpus_as_it_rents():
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    asked = taken(arguments_of(task["envs"]["RUN_ARGUMENTS"]))
    assert asked["gpus"] == task["num_nodes"] * int(task["resources"]["accelerators"].partition(":")[2])
    assert "--output-dir /runs" in task["run"] and "/runs" in task["file_mounts"]


def test_ray_reads_its_own_template():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((CLUSTERS / "ray-up.yaml").read_text()))
    validate_config(config)
    worker = config["available_node_types"]["h100"]
    assert worker["max_workers"] * worker["resources"]["GPU"] == 16


@pytest.mark.slow
def test_the_slurm_script_runs_on_a_cluster_of_its_own(tmp_path):
    # Slurm's two commands on a machine that is the only node: the name of the node, and the command on it.
    programs = tmp_path / "bin"
    programs.mkdir()
    address = socket.gethostbyname(socket.gethostname())
    for name, text in (("scontrol", f"echo {address}"), ("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')):
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    root = RECIPE_DIR.parent
    submitted = tmp_path / "submitted"
    submitted.mkdir()
    (submitted / ".venv" / "bin").mkdir(parents=True)
    (submitted / ".venv" / "bin" / "activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    # Whoever ran anything on this machine before has a password of Ray's, and `ray start` asks for it then.
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    environment = os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(root), "SLURM_SUBMIT_DIR": str(submitted),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    # Its own processes alone in sight: a node of Slurm has no other Ray on it.
    alone = ("unshare", "--fork", "--pid", "--mount-proc")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody have a process namespace")
    command = [*alone, "bash", str(CLUSTERS / "slurm.sh"), "--config", "smoke", "--gpus", "2", "--until", "pretrain"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    # Three steps teach nothing, which the run says with its exit code; it was trained on the cluster all the same.
    assert "Running command on head node" in done.stdout and "2 CPU worker processes over gloo" in done.stdout
    assert (done.returncode, "LEARNED NOTHING: pretrain" in done.stdout) == (1, True), done.stdout + done.stderr
    run_folder = submitted / "runs" / f"slurm-{os.getpid()}"
    assert list(run_folder.glob("pretrain-*/checkpoints/*")), sorted(run_folder.rglob("*"))
