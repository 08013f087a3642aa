"""The plan: actions and the reasons given for them."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from ray_pipeline.costs.fit import rank_bytes
from ray_pipeline.dag.identity import identities
from ray_pipeline.dag.ledger import Record, RunFile, begin_record, close_record
from ray_pipeline.dag.plan import changed_settings, plan, refuse_other_config
from ray_pipeline.dag.request import StageSelection
from ray_pipeline.errors import UserError
from ray_pipeline.layout.layout import Layout
from ray_pipeline.settings.chain import upstream
from ray_pipeline.settings.run_folder import stage_folder
from ray_pipeline.settings.schema import STAGES, PipelineFields

CONFIG = PipelineFields(stages=list(STAGES))
BETA = CONFIG.model_copy(update={"grpo": CONFIG.grpo.model_copy(update={"beta": 0.02})})


def make_run(run_dir: Path, config: PipelineFields, done: tuple[str, ...]) -> None:
    """A run folder in which `done` are finished."""
    run = RunFile(run_dir)
    for stage, identity in identities(config, {}).items():
        folder = stage_folder(run_dir, stage, identity.key)
        run.stages[stage] = {"identity": identity.key, "folder": folder.name, "decides": dict(identity.decides)}
        if stage in done:
            close_record(folder, begin_record(folder, Record(stage, identity.key, "running")), "done")
    run.save()


def actions(rows) -> dict[str, str]:
    return {row.stage: row.action for row in rows}


def test_new_run_runs_everything(tmp_path):
    rows = plan(CONFIG, Layout(), tmp_path, StageSelection())
    assert set(actions(rows).values()) == {"run"}
    assert rows[0].reason == "not run yet"
    assert list(tmp_path.iterdir()) == []


def test_changed_beta_reruns_grpo_and_what_reads_it(tmp_path):
    make_run(tmp_path, CONFIG, STAGES)
    rows = {row.stage: row for row in plan(BETA, Layout(), tmp_path, StageSelection())}
    assert [rows[stage].action for stage in STAGES] == ["reuse", "reuse", "reuse", "reuse", "run", "run", "run"]
    assert rows["sft"].reason == "finished, 0 s, unchanged"
    assert rows["grpo"].reason == "config changed: grpo.beta 0.01 → 0.02"
    assert rows["distillation"].reason == "upstream grpo reruns"


def test_unfinished_stage_goes_on_from_its_newest_checkpoint(tmp_path):
    make_run(tmp_path, CONFIG, ("data_prep",))
    folder = stage_folder(tmp_path, "pretrain", identities(CONFIG, {})["pretrain"].key)
    begin_record(folder, Record("pretrain", "x", "running"))
    for step in (50, 150):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    row = plan(CONFIG, Layout(), tmp_path, StageSelection())[1]
    assert (row.action, row.reason) == ("resume", "unfinished: checkpoint at step 150 of 100")


def test_finished_stage_whose_model_was_deleted_runs_again(tmp_path):
    make_run(tmp_path, CONFIG, ("data_prep",))
    folder = stage_folder(tmp_path, "pretrain", identities(CONFIG, {})["pretrain"].key)
    close_record(folder, begin_record(folder, Record("pretrain", "x", "running")), "done", weights_digest="d")
    assert plan(CONFIG, Layout(), tmp_path, StageSelection())[1].action == "run"
    (folder / "model").mkdir()
    assert plan(CONFIG, Layout(), tmp_path, StageSelection())[1].action == "reuse"


def test_stage_flag_runs_that_stage_alone_and_afresh(tmp_path):
    make_run(tmp_path, CONFIG, STAGES)
    rows = plan(CONFIG, Layout(), tmp_path, StageSelection(only="sft"))
    assert [row.stage for row in rows if row.action == "run"] == ["sft"]
    assert rows[2].fresh
    assert rows[2].reason == "asked for by --stage"
    assert rows[3].reason == "not asked for; finished, 0 s"


@given(st.sampled_from([*STAGES, None]), st.sampled_from([*STAGES, None]))
def test_range_runs_exactly_its_stages(first, last):
    selection = StageSelection(from_=first, until=last)
    low = STAGES.index(first) if first else 0
    high = STAGES.index(last) if last else len(STAGES) - 1
    if low > high and first and last:
        with pytest.raises(UserError, match=rf"--from {first} --until {last}: {first} comes after {last}"):
            selection.check()
        return
    selection.check()
    assert [stage for stage in STAGES if selection.selects(stage)] == list(STAGES[low : high + 1])


@settings(deadline=None)  # it writes and fsyncs files
@given(st.sets(st.sampled_from(STAGES)), st.sampled_from(STAGES), st.booleans())
def test_selected_stage_always_has_its_inputs(finished, stage, only):
    """Whatever is finished: a plan refuses, or every stage that runs has inputs that are there or run before."""
    selection = StageSelection(only=stage) if only else StageSelection(from_=stage)
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), CONFIG, tuple(finished))
        try:
            rows = {row.stage: row for row in plan(CONFIG, Layout(), Path(folder), selection)}
        except UserError as error:
            assert "which is not finished" in str(error)
            assert any(name not in finished for s in STAGES if selection.selects(s) for name in upstream(CONFIG, s))
            return
    for row in rows.values():
        if row.action == "run":
            assert all(rows[name].action in ("run", "reuse") for name in upstream(CONFIG, row.stage))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            StageSelection(only="sfd"),
            r'--stage sfd: no such stage \(did you mean "sft"\?\)\. The stages are data_prep, ',
        ),
        (StageSelection(until="exprt"), r'--until exprt: no such stage \(did you mean "export"\?\)'),
        (StageSelection(only="sft", until="grpo"), "--stage sft runs one stage and --from/--until a range"),
    ],
)
def test_selection_that_makes_no_sense_is_refused(tmp_path, selection, message):
    with pytest.raises(UserError, match=message):
        plan(CONFIG, Layout(), tmp_path, selection)


def test_name_in_use_lists_what_differs(tmp_path):
    make_run(tmp_path / "toy", CONFIG, ())
    refuse_other_config(CONFIG, tmp_path / "toy")
    with pytest.raises(
        UserError, match=r"run toy is in use with another config:\n  grpo\.beta 0\.01 → 0\.02\nUse `python.* resume toy"
    ):
        refuse_other_config(BETA, tmp_path / "toy")


def test_many_differences_are_counted(tmp_path):
    make_run(tmp_path / "toy", CONFIG, ())
    other = CONFIG.model_copy(
        update={"model": ModelConfig(**dict.fromkeys(list(ModelConfig.__dataclass_fields__)[:16], 2)), "seed": 1}
    )
    with pytest.raises(UserError, match=r"seed 0 → 1(.|\n)*and \d+ more"):
        refuse_other_config(other, tmp_path / "toy")


def test_settings_that_came_or_went_are_named():
    assert changed_settings({"a": 1}, {"b": 2}) == ["a 1 → (absent)", "b (absent) → 2"]


def test_more_pipeline_ranks_need_less_memory_each():
    def memory(pp: int) -> int:
        big = ModelConfig(hidden_size=2048, num_hidden_layers=16, n_routed_experts=32)
        return rank_bytes(CONFIG.model_copy(update={"model": big}), Layout(gpus=pp, pp=pp), "pretrain")

    assert memory(4) < memory(2) < memory(1)


def test_signals_stay_the_programs_own_where_ray_takes_them(tmp_path, monkeypatch):
    """Ray's handler of SIGTERM ends the process with a dump of C++ frames."""
    import ray

    from ray_pipeline.dag import workflow

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(workflow, "wait_for", lambda *_: None)
    monkeypatch.setattr(workflow, "start_local_ray", lambda: signal.signal(signal.SIGTERM, lambda *_: os.abort()))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with workflow.connected_ray(Layout(), tmp_path):
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def test_ray_address_where_nothing_answers_is_told_at_once(tmp_path, monkeypatch):
    from ray_pipeline.dag.workflow import connected_ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with (
        pytest.raises(UserError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: no Ray cluster answers there"),
        connected_ray(Layout(), tmp_path),
    ):
        pass
