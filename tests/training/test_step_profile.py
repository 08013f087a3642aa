"""A profile of real steps: a trace and figures of every rank, and training ends behind them."""

from __future__ import annotations

import gzip
import json

import pytest

from ray_pipeline.launch.launchers import InlineLauncher
from ray_pipeline.records.metrics_file import read_metrics
from ray_pipeline.training.step_profile import ProfileTaken
from tests.training.toy_run import arguments, train


@pytest.mark.slow
def test_profiled_steps_are_traced_and_end_training(tmp_path):
    wanted = {"step": 4, "steps": 2, "out": str(tmp_path)}
    given = arguments(tmp_path, log_every=1, checkpoint_every=8, eval_every=8) | {"profile": wanted}
    with pytest.raises(ProfileTaken) as taken:
        InlineLauncher().run("pretrain", train, given)
    [rank] = taken.value.ranks
    assert set(rank["spans"]) == {"next batch", "wait", "F", "B", "optimizer step"}
    assert 0 < sum(rank["spans"].values()) <= rank["seconds"] * 1.001
    assert all(seconds >= 0 and calls > 0 for _, seconds, calls in rank["operations"])
    trace = json.loads(gzip.decompress((tmp_path / rank["trace"]).read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("step: F") == 2 * 4 and names.count("step: optimizer step") == 2
    folder = tmp_path / "toy" / "pretrain-0"
    assert read_metrics(folder)[-1]["step"] == 4, "the step before the last profiled one"
    assert list((folder / "checkpoints").glob("step_*")) == []
