"""Where the student's weights start."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.settings.schema import StudentConfig
from ray_pipeline.training.distillation.student import InitialStudent, teacher_layer
from tests.engine.test_parity import CONFIG


def teacher_state() -> dict[str, torch.Tensor]:
    model = Transformer(CONFIG)
    init_weights(model, CONFIG, 1)
    return model.state_dict()


@given(st.data())
def test_student_layers_are_spread_over_the_teachers_in_order(data):
    teacher = data.draw(st.integers(1, 64))
    student = data.draw(st.integers(1, teacher))
    chosen = [teacher_layer(i, student, teacher) for i in range(student)]
    assert chosen == sorted(set(chosen)) and chosen[-1] == teacher - 1
    assert student == 1 or chosen[0] == 0


def test_a_student_of_the_same_shape_is_the_teacher():
    state = InitialStudent(CONFIG, CONFIG, teacher_state(), "teacher_layers", 0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher_state().items())


def test_a_narrower_student_starts_from_the_teachers_first_units():
    student = StudentConfig(num_hidden_layers=2, n_routed_experts=3, moe_intermediate_size=8, intermediate_size=24)
    config = student.applied_to(CONFIG)
    teacher, state = teacher_state(), InitialStudent(config, CONFIG, teacher_state(), "teacher_layers", 0)
    source = teacher["layers.3.mlp.experts.gate_up_proj"]
    expected = torch.cat([source[:3, :8], source[:3, 16:24]], 1)  # gate rows first, then up rows
    assert torch.equal(state["layers.1.mlp.experts.gate_up_proj"], expected)
    assert torch.equal(state["layers.0.mlp.down_proj.weight"], teacher["layers.0.mlp.down_proj.weight"][:, :24])
    assert torch.equal(state["layers.1.mlp.gate.weight"], teacher["layers.3.mlp.gate.weight"][:3])
    assert not any(name.startswith("mtp.") for name in state)


def test_a_random_student_takes_nothing_and_a_wider_one_what_fits():
    teacher = teacher_state()
    random = InitialStudent(CONFIG, CONFIG, teacher, "random", 0)
    assert not torch.equal(random["embed_tokens.weight"], teacher["embed_tokens.weight"])
    wide = replace(CONFIG, hidden_size=64)
    state = InitialStudent(wide, CONFIG, teacher, "teacher_layers", 0)
    assert state["embed_tokens.weight"].shape == (64, 64)
