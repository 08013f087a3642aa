"""Layers to stages to ranks, as integers."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.parallel.placement import PARTS_PER_RANK, balance, layer_costs, num_stages, parts_of, ranks_of, stage_layers


def all_cuts(layers: int, stages: int) -> list[list[range]]:
    """Every way to cut layers into non-empty consecutive runs."""
    out = []
    for inner in combinations(range(1, layers), stages - 1):
        stops = [*inner, layers]
        out.append([range(a, b) for a, b in zip([0, *stops], stops, strict=False)])
    return out


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.data())
def test_balance_is_the_best_of_all_cuts(costs, data):
    stages = data.draw(st.integers(1, len(costs)))

    def value(cut: list[range]) -> tuple[int, int]:
        runs = [sum(costs[i] for i in part) for part in cut]
        return max(runs), sum(run * run for run in runs)

    found = balance(costs, stages)
    assert [i for part in found for i in part] == list(range(len(costs))) and len(found) == stages
    assert value(found) == min(value(cut) for cut in all_cuts(len(costs), stages))


@given(st.sampled_from(sorted(PARTS_PER_RANK)), st.integers(1, 9))
def test_every_stage_is_a_part_of_one_rank(name, pp):
    held = {stage: rank for rank in range(pp) for stage in parts_of(name, pp, rank)}
    assert sorted(held) == list(range(num_stages(name, pp)))
    assert ranks_of(name, pp) == tuple(held[stage] for stage in sorted(held))


def test_the_loop_goes_round_and_the_v_comes_back():
    assert ranks_of("1f1b", 3) == (0, 1, 2)
    assert ranks_of("interleaved_1f1b", 3) == (0, 1, 2, 0, 1, 2)
    assert ranks_of("zbv", 3) == ranks_of("dualpipev", 3) == (0, 1, 2, 2, 1, 0)
    assert parts_of("zbv", 3, 0) == [0, 5] and parts_of("interleaved_1f1b", 3, 1) == [1, 4]


def test_costs_cover_every_active_weight_once():
    config = ModelConfig(num_nextn_predict_layers=0)
    # num_params also counts the final norm; the embedding counts as one row.
    rows = (config.vocab_size - 1) * config.hidden_size
    assert sum(layer_costs(config)) == config.num_params(active=True) - rows - config.hidden_size


def test_head_and_mtp_modules_take_layers_from_the_last_stage():
    config = ModelConfig(num_hidden_layers=12, vocab_size=4096)
    sizes = [len(part) for part in stage_layers(config, 3)]
    assert sizes[-1] < min(sizes[:-1]) and sum(sizes) == 12


def test_deepseek_v3_over_16_ranks():
    config = ModelConfig(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        first_k_dense_replace=3, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4,
    )  # fmt: skip
    assert [len(part) for part in stage_layers(config, 16)] == [4] * 15 + [1]


@pytest.mark.parametrize("text", ["E+2|3|1+H", "2|3|1", " e+2 | 3 | h+1 "])
def test_a_layout_set_by_hand(text):
    assert stage_layers(ModelConfig(), 3, text) == [range(2), range(2, 5), range(5, 6)]


def test_one_stage_has_both_ends():
    assert stage_layers(ModelConfig(), 1, "E+6+H") == [range(6)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3|3", "2 parts for 3 pipeline stages (pp_size x stages per rank). Give one number of layers per stage"),
        ("6", "1 part for 3 pipeline stages"),
        ("E+2|2|1+H", "adds up to 5 layers, but the model has num_hidden_layers=6. Make the numbers add up to 6"),
        ("2|E+3|1", "E in part 2, but the embedding belongs to the first stage. Put E into the first part or omit"),
        ("2+H|3|1", "H in part 1, but the head belongs to the last stage. Put H into the last part or omit"),
        ("2|x|1", "part 2 ('x') is not a number of layers of at least 1. Separate stages with '|'"),
        ("2||4", "part 2 ('') is not a number of layers of at least 1"),
        ("0|5|1", "part 1 ('0') is not a number of layers of at least 1"),
        ("E+E+2|3|1", "part 1 ('E+E+2') is not a number"),
        ("E|5|1", "part 1 ('E') is not a number"),
        ("²|3|1", "part 1 ('²') is not a number"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_an_example(text, message):
    with pytest.raises(ValueError) as error:
        stage_layers(ModelConfig(), 3, text)
    assert str(error.value).startswith(f"pp_layout={text!r}: {message}")
    assert str(error.value).endswith('for example --pp-layout "E+2|2|2+H".')
    stage_layers(ModelConfig(), 3, "E+2|2|2+H")  # and the example works


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"7 pipeline stages: .* num_hidden_layers=6 .* Use at most 6 stages"):
        stage_layers(ModelConfig(), 7)
