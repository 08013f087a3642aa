"""DISTILLATION's kinds of learning, on one process and on several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.errors import UserError
from ray_pipeline.stages import distillation
from ray_pipeline.teachers import teacher_answers
from ray_pipeline.training.distillation.distillation_batches import MixedRows, StudentAnswers, is_on_policy
from tests.training.distill_run import arguments, distil, largest_difference, stage_dir, teacher_run

SAME = {"student": {"num_hidden_layers": 2}}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_run(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd", "hidden"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(run_dir: Path, loss: str) -> None:
    figures = distillation.train(arguments(run_dir, f"same-{loss}", loss=loss, steps=1, **SAME))
    assert abs(figures["train_loss"]) < 1e-5
    other = distillation.train(arguments(run_dir, f"other-{loss}", loss=loss, steps=1))
    assert other["train_loss"] > 1e-3


def test_on_its_own_answers_too_a_student_that_is_its_teacher_has_nothing_to_learn(run_dir: Path) -> None:
    figures = distillation.train(arguments(run_dir, "same-own", on_policy=1.0, steps=1, **SAME))
    assert abs(figures["train_loss"]) < 1e-5


def test_killed_on_policy_it_resumes_to_the_same_weights(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = distil(run_dir, "unbroken", on_policy=1.0)
    real, asked = StudentAnswers.batch, []

    def dies(self, step):
        asked.append(step)
        if step == 2 and asked.count(2) == 1:
            raise ZeroDivisionError
        return real(self, step)

    monkeypatch.setattr(StudentAnswers, "batch", dies)
    with pytest.raises(ZeroDivisionError):
        distil(run_dir, "broken", on_policy=1.0)
    assert largest_difference(distil(run_dir, "broken", on_policy=1.0), unbroken) == 0
    assert asked == [0, 1, 2, 2], "it went on from its checkpoint"


def test_steps_are_on_policy_by_the_seed_and_in_the_given_share() -> None:
    drawn = [is_on_policy(3, step, 0.25) for step in range(2000)]
    assert drawn == [is_on_policy(3, step, 0.25) for step in range(2000)]
    assert drawn != [is_on_policy(4, step, 0.25) for step in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.25, abs=0.04)
    assert all(is_on_policy(3, step, 1.0) for step in range(100))
    assert not any(is_on_policy(3, step, 0.0) for step in range(100))


def test_the_students_answers_are_supervised_and_the_questions_are_not(run_dir: Path, monkeypatch) -> None:
    seen = []
    real = StudentAnswers.batch
    monkeypatch.setattr(StudentAnswers, "batch", lambda self, step: seen.append(real(self, step)) or seen[-1])
    distil(run_dir, "seen", on_policy=1.0, steps=1)
    (batch,) = seen
    trained = batch.labels != -100
    assert 3 <= int(trained.sum()) <= 3 * 6, "three answers of up to six tokens"
    for row in range(len(batch)):
        for document in batch.doc_ids[row].unique():
            at = (batch.doc_ids[row] == document).nonzero().flatten()
            labels = trained[row, at].tolist()
            assert labels == sorted(labels) or not labels[-1], "labels end a document"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"pp_size": 2}, {"dp_size": 2}, {"tp_size": 2}, {"sp_size": 2}])
def test_any_layout_learns_the_same_with_and_without_its_own_answers(run_dir: Path, layout: dict) -> None:
    expected = distil(run_dir, "one", on_policy=0.5, **SAME, init="random")
    name = f"layout-{next(iter(layout))}"
    found = distil(run_dir, name, ranks=2, layout=layout, on_policy=0.5, **SAME, init="random")
    assert largest_difference(found, expected) < 1e-5


def test_a_teacher_in_another_layout_teaches_the_same(run_dir: Path) -> None:
    same = distil(run_dir, "one-rank")
    given = {"layout": {"dp_size": 2}, "teacher_layout": {"pp_size": 2}}
    assert largest_difference(distil(run_dir, "moved", ranks=2, **given), same) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"tp_size": 2}, {"sp_size": 2}, {"dp_size": 2}, {"dp_size": 2, "ep_size": 2}])
def test_every_axis_may_be_the_teachers_alone(run_dir: Path, axes: dict) -> None:
    expected = distil(run_dir, "whole", layout={"tp_size": 2}, ranks=2, **SAME, init="random")
    given = {"layout": {"tp_size": 2}, "teacher_layout": axes, "ranks": 2}
    found = distil(run_dir, "-".join(axes), **given, **SAME, init="random")
    assert largest_difference(found, expected) < 1e-5


def test_the_baseline_of_sft_alone_reads_no_teacher(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = arguments(run_dir, "alone", loss="cross_entropy", init="random")
    del job["upstream"]["grpo"]
    monkeypatch.setattr(distillation, "EngineTeacher", None)
    figures = distillation.train(job)
    assert "teacher_params" not in figures and figures["train_loss"] > 0


def test_rows_are_stored_ones_first_and_may_be_either_kind_alone(run_dir: Path) -> None:
    stored = PackedRows(stage_dir(run_dir, "data_prep") / "sft" / "train")
    extra = stored.slice(0, 3)
    mixed, alone = MixedRows(stored, extra), MixedRows(None, extra)
    assert (len(mixed), len(alone)) == (len(stored) + 3, 3)
    drawn = torch.cat([alone.batch(0, step, 1).tokens for step in range(3)])
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, extra.tokens.tolist()))


def test_only_right_answers_are_learned_and_damaged_ones_are_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"teacher_answers": 2, "conversations": False}
    with pytest.raises(UserError, match=r"teacher_answers=2: the teacher answered none of them right"):
        distil(run_dir, "wrong", **given)
    seen = []
    real = teacher_answers.pack_answers
    monkeypatch.setattr(teacher_answers, "pack_answers", lambda a, *rest: seen.extend(a) or real(a, *rest))
    monkeypatch.setattr(teacher_answers, "are_right", lambda answers: [True] * len(answers))
    monkeypatch.setattr(teacher_answers, "write_answers", finished(teacher_answers.write_answers))
    distil(run_dir, "right", **given)
    assert len(seen) == 2 and all(prompt and answer for prompt, answer in seen)
    path = run_dir / "right" / "teacher_answers" / "rows.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"rows\.safetensors: damaged: its SHA-256.*teacher writes its answers again"):
        distil(run_dir, "right", **given)


def finished(write):
    """The same completions, said to have ended by themselves."""

    def wrapped(*arguments, **options):
        out = write(*arguments, **options)
        for completion in out:
            completion.finished = True
        return out

    return wrapped
