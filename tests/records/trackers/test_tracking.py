"""Which trackers are asked for, and that they are installed."""

from __future__ import annotations

import importlib.util

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.records.trackers.tracking import KNOWN, check_trackers, wanted
from ray_pipeline.records.trackers.wandb_tracker import can_log_in
from ray_pipeline.settings.schema import TrackingConfig


def test_every_tracker_is_a_setting_and_several_can_be_on():
    assert wanted(TrackingConfig()) == ["wandb"]
    assert wanted(TrackingConfig(**dict.fromkeys(KNOWN, True))) == list(KNOWN)


@pytest.mark.parametrize("name", list(KNOWN))
def test_one_that_is_not_installed_is_refused_with_the_extra(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"tracking\.{name}=true: .*`pip install 'ray-pipeline\[{name}\]'`"):
        check_trackers(TrackingConfig(**{"wandb": False, name: True}))


def test_a_key_that_wandb_login_left_counts_as_one_in_the_environment(tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    assert can_log_in({"NETRC": str(netrc)}, tmp_path)
    assert not can_log_in({"NETRC": str(netrc), "WANDB_BASE_URL": "https://wandb.example.org"}, tmp_path)
    assert can_log_in({"WANDB_API_KEY": "0123"}, tmp_path)
    assert not can_log_in({}, tmp_path)
    (tmp_path / ".netrc").write_text(netrc.read_text())
    assert can_log_in({}, tmp_path)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  passwor")
    assert not can_log_in({}, tmp_path)
