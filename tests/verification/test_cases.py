"""Which layouts are verified, and with what model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.parallel.placement import num_stages
from ray_pipeline.errors import UserError
from ray_pipeline.layout.layout import Layout
from ray_pipeline.layout.rules import refusal
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.verification.cases import (
    SCHEDULES,
    STAGES,
    TOLERANCES,
    default_steps,
    every_layout,
    for_stage,
    micro_batch,
    own_subject,
    settings,
    small_subject,
)


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 8])
def test_every_layout_is_either_verified_or_refused_with_a_reason(gpus: int) -> None:
    selection = every_layout(gpus)
    assert len(set(selection.legal)) == len(selection.legal)
    for layout in selection.legal:
        assert layout.pp * layout.dp * layout.tp * layout.sp == gpus == layout.gpus
        assert refusal(settings(small_subject(layout), layout), layout) is None
    for rule, found in selection.refused.items():
        for layout, told in found:
            assert refusal(settings(small_subject(layout), layout), layout) == (rule, told)


def test_eight_ranks_can_use_every_axis_zero_stage_and_schedule() -> None:
    legal = every_layout(8).legal
    for axis in ("pp", "dp", "tp", "sp", "ep"):
        assert {getattr(layout, axis) for layout in legal} == {1, 2, 4, 8}
    assert {(layout.schedule, layout.zero_stage) for layout in legal} == (
        {("1f1b", stage) for stage in range(4)}
        | {("interleaved_1f1b", stage) for stage in range(3)}
        | {(name, stage) for name in ("zbv", "dualpipev") for stage in range(2)}
    )
    assert any(layout.offload_optimizer for layout in legal)
    assert {layout.activation_checkpointing for layout in legal} == {"none", "selective", "full"}
    assert all(any(found.pp == 8 and found.schedule == name for found in legal) for name in SCHEDULES)


def test_what_eight_ranks_cannot_do_is_refused_by_these_rules_alone() -> None:
    assert every_layout(8).refused.keys() == {
        "ep divides dp x sp",
        "schedules with two parts per rank need pp > 1",
        "ZeRO 3 needs one part per rank",
        "ZeRO 2 and 3 need whole backward passes",
    }


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_parts_differ_in_size_and_the_pipeline_is_full(schedule: str, pp: int, dp: int) -> None:
    layout = Layout(gpus=pp * dp, pp=pp, dp=dp, schedule=schedule)
    subject = small_subject(layout)
    assert subject.model.num_hidden_layers % num_stages(schedule, pp) or pp == 1 or num_stages(schedule, pp) == 1
    filled = settings(subject, layout).pretrain.batch_size
    assert subject.rows <= filled and filled % dp == 0
    micro_batches = -(-filled // dp // micro_batch(subject, layout))
    assert micro_batches >= (2 * pp if schedule == "dualpipev" else min(pp, filled // dp))


def test_the_small_models_experts_are_balanced_in_every_way() -> None:
    subject = small_subject(Layout())
    assert subject.model.router_bias_update_rate > 0 and subject.model.aux_loss_alpha > 0
    assert {for_stage(subject, stage).model.seq_aux for stage in STAGES} == {True, False}
    assert default_steps(["pretrain"]) == 4 and default_steps(STAGES) == default_steps(["dpo"]) == 40


def test_bf16_is_allowed_a_thousand_times_the_rounding_of_fp32() -> None:
    assert (TOLERANCES["fp32"].loss, TOLERANCES["bf16"].loss) == (2e-6, 2e-3)
    assert TOLERANCES["fp32"].norm == 1e-4


def test_a_small_model_of_ones_own_is_taken_and_a_large_one_refused() -> None:
    config = PipelineFields()
    subject = own_subject(config, 4)
    assert subject.model is config.model
    assert subject.seq_len <= config.data.seq_len
    large = config.model_copy(update={"model": ModelConfig(vocab_size=100_000, hidden_size=512)})
    with pytest.raises(UserError, match=r"has 112M parameters; .* at most 50M are taken. Omit --config"):
        own_subject(large, 4)
