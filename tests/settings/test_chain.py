"""Which stage reads which, for every list of stages a run may have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.dag.identity import identities
from ray_pipeline.errors import UserError
from ray_pipeline.settings.chain import (
    chain,
    edited,
    exported_stage,
    input_stage,
    lineage,
    reads_folder,
    reads_teacher,
    trained,
    upstream,
)
from ray_pipeline.settings.checks import problems
from ray_pipeline.settings.schema import STAGES, TRAINING_STAGES, PipelineFields

LISTS = st.lists(st.sampled_from(STAGES), unique=True)


def run(stages: list[str], **distillation: object) -> PipelineFields:
    return PipelineFields(stages=stages, init_from={"path": "given"}, distillation=distillation)


@given(LISTS, st.sampled_from([None, "a/folder"]))
def test_a_stage_reads_earlier_stages_of_the_run_alone(stages, teacher):
    config = run(stages, teacher=teacher)
    ordered = chain(config)
    assert set(ordered) == set(stages) and ordered == tuple(sorted(ordered, key=STAGES.index))
    for place, stage in enumerate(ordered):
        read = [name for name in upstream(config, stage) if name != "data_prep"]
        assert set(read) <= set(ordered[:place])


@given(LISTS)
def test_every_training_stage_has_one_beginning(stages):
    """Weights come from the stage before it, from the given folder, or, for PRETRAIN, from the seed."""
    config = run(stages)
    for stage in trained(config):
        assert (input_stage(config, stage) is None) == reads_folder(config, stage)
        beginning = lineage(config, stage)
        assert beginning[-1] == stage and input_stage(config, beginning[0]) is None
        assert list(beginning) == sorted(beginning, key=TRAINING_STAGES.index)


@given(LISTS)
def test_what_the_checks_let_through_has_identities(stages):
    config = run(stages)
    if not any(text.startswith("stages=") for text in problems(config)):
        assert list(identities(config, {})) == list(chain(config))
        assert "export" not in stages or exported_stage(config) in stages


def test_a_given_teacher_parts_distillation_from_the_stages_before():
    config = run(list(STAGES), teacher="a/folder")
    assert upstream(config, "distillation") == ("data_prep",)
    assert not reads_folder(config, "distillation")
    assert upstream(run(list(STAGES)), "distillation") == ("data_prep", "grpo")


def test_only_a_random_student_that_learns_on_tokens_alone_needs_no_teacher():
    alone = {"loss": "cross_entropy", "teacher_answers": 0, "init": "random"}
    assert not reads_teacher(run(list(STAGES), **alone))
    assert upstream(run(list(STAGES), **alone), "distillation") == ("data_prep",)
    for change in ({"init": "teacher_layers"}, {"teacher_answers": 1}, {"loss": "jsd"}):
        assert reads_teacher(run(list(STAGES), **alone | change))


@given(LISTS, st.lists(st.sampled_from(STAGES), unique=True), st.booleans())
def test_edited_lists_hold_what_was_asked(stages, skip, dpo):
    if not set(skip) <= set(stages):
        with pytest.raises(UserError, match=r"--skip \w+: this run has the stages"):
            edited(stages, skip, dpo=dpo)
        return
    found = edited(stages, skip, dpo=dpo)
    assert set(found) == (set(stages) | ({"dpo"} if dpo else set())) - set(skip)
