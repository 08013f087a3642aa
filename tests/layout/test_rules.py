"""The table of rules: what is told about a layout that cannot run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from ray_pipeline.errors import UserError
from ray_pipeline.layout.choice import resolve_layout
from ray_pipeline.layout.layout import Layout
from ray_pipeline.layout.rules import RULES, broken_rule, elastic_layouts, refusal
from tests.layouts import SIX_LAYERS, WANTED, asked_for, recipe

# Rule of the table -> settings that break it, what is told, the way out. The default model has 6 layers, its
# student 3, 4 heads, 8 experts, widths 384 and 96, a vocabulary of 512, rows of 256 tokens, 32 rows a step.
BROKEN = {
    "pp x dp x tp x sp is the number of ranks": [
        ({"gpus": 4, "pp_size": 3}, "gpus=4: pp_size=3 x dp_size=1 x tp_size=1 x sp_size=1 is 3 ranks", "--gpus 3"),
        ({"gpus": 4, "pp_size": 2, "dp_size": 1}, "is 2 ranks, not 4", "Use --dp-size 2"),
    ],
    "schedules with two parts per rank need pp > 1": [
        ({"gpus": 2, "schedule": "zbv"}, "schedule=zbv: it orders the work of", "--schedule 1f1b, or --pp-size 2")
    ],
    "ZeRO 3 needs one part per rank": [
        (
            {"pp_size": 2, "schedule": "interleaved_1f1b", "zero_stage": 3, **SIX_LAYERS},
            "zero_stage=3 with schedule=interleaved_1f1b: two parts",
            "Use --schedule 1f1b, or --zero-stage 2",
        )
    ],
    "ZeRO 2 and 3 need whole backward passes": [
        (
            {"pp_size": 2, "schedule": "zbv", "zero_stage": 2, **SIX_LAYERS},
            "zero_stage=2 with schedule=zbv: gradients are reduced while backward makes them",
            "Use --zero-stage 1, or --schedule 1f1b",
        )
    ],
    "offloading needs ZeRO 2 or 3": [
        (
            {"gpus": 2, "zero_stage": 1, "offload_optimizer": True},
            "offload_optimizer=true: only ZeRO 2 and 3 keep optimizer state in CPU memory, and zero_stage=1",
            "Use --zero-stage 2, or --no-offload-optimizer",
        )
    ],
    "ep divides dp x sp": [
        ({"gpus": 2, "ep_size": 4}, "dp_size=2 x sp_size=1 = 2 replicas, which 4 does not divide", "Use --ep-size 2")
    ],
    "every part of the pipeline has a layer": [
        ({"pp_size": 9}, "pp_size=9: more ranks than layers (model.num_hidden_layers=6)", "Use --pp-size 6 or less"),
        ({"pp_size": 4}, "(distillation.student.num_hidden_layers=3)", "Use --pp-size 3 or less"),
        ({"pp_size": 2, "schedule": "zbv"}, "2 with schedule=zbv, 4 parts of the model: more parts", "--pp-size 1 or"),
    ],
    "--pp-layout fits the model": [
        ({"pp_size": 2, "pp_layout": "E+4|3+H"}, "pp_layout='E+4|3+H': adds up to 7 layers", "add up to 6"),
        ({"pp_size": 2, "pp_layout": "4|x"}, "'x'", "for example --pp-layout"),
        ({"pp_size": 2, "pp_layout": "6"}, "1 part for 2 pipeline stages", 'for example --pp-layout "E+3|3+H"'),
    ],
    "attention heads are shared evenly by tp x sp": [
        ({"sp_size": 8}, "sp_size=8: each rank attends with its share of the heads", "Use --sp-size 4, the largest"),
        ({"sp_size": 4, "tp_size": 2}, "sp_size=4 with tp_size=2", "Use --sp-size 2, the largest"),
        ({"tp_size": 3}, "model.num_attention_heads=4 cannot be shared evenly by 3", "Use --tp-size 2, the largest"),
    ],
    "rows are cut evenly by sp": [
        ({"sp_size": 4, "data.seq_len": 250}, "sp_size=4: data.seq_len=250", "Use --sp-size 2, or --seq-len 252"),
        ({"sp_size": 4, "data.seq_len": 1022}, "data.seq_len=1022", "Use --sp-size 2, or --seq-len 1024"),
    ],
    "widths and vocabulary are cut evenly by tp": [
        (
            {"tp_size": 2, "model.moe_intermediate_size": 95},
            "tp_size=2: model.moe_intermediate_size=95 cannot be cut into 2 equal parts",
            "Use --tp-size 1, or --set model.moe_intermediate_size=96",
        ),
        ({"tp_size": 2, "model.vocab_size": 513}, "model.vocab_size=513", "Use --tp-size 1, or"),
        (
            {"tp_size": 2, "distillation.student.intermediate_size": 33},
            "distillation.student.intermediate_size=33",
            "--set distillation.student.intermediate_size=34",
        ),
    ],
    "experts are shared evenly by ep": [
        ({"gpus": 16, "ep_size": 16}, "ep_size=16: model.n_routed_experts=8 cannot be shared", "Use --ep-size 8"),
        (
            {"gpus": 4, "ep_size": 4, "distillation.student.n_routed_experts": 6},
            "distillation.student.n_routed_experts=6",
            "Use --ep-size 2",
        ),
    ],
    "rows of a step are shared evenly by dp": [
        ({"gpus": 3}, "dp_size=3: pretrain.batch_size=32 rows cannot be shared evenly", "Use --dp-size 2"),
        ({"gpus": 4, "sft.batch_size": 6}, "sft.batch_size=6", "Use --dp-size 2"),
    ],
    "dualpipev needs 2 x pp micro-batches": [
        (
            {"pp_size": 2, "dp_size": 2, "schedule": "dualpipev", **SIX_LAYERS},
            "needs at least 4 micro-batches per rank and step, and pretrain.batch_size=32 gives 2",
            "Use a smaller layout.micro_batch, pretrain.batch_size of 64, or --schedule zbv",
        )
    ],
    "key and value heads are shared evenly by tp": [
        (
            {"tp_size": 4, "model.attention": "gqa", "model.num_key_value_heads": 2},
            "tp_size=4: each rank keeps the keys and values of its share of the heads, and model.num_key_value_heads=2",
            "Use --tp-size 2, the largest that works; --sp-size shares heads",
        ),
        (
            {"tp_size": 2, "model.attention": "sliding", "model.num_key_value_heads": 1},
            "model.num_key_value_heads=1 cannot be shared evenly by 2 ranks",
            "Use --tp-size 1, the largest that works",
        ),
    ],
    "a stack that is applied several times is on one pipeline rank": [
        (
            {"pp_size": 2, "model.recursion_depth": 3},
            "pp_size=2 with model.recursion_depth=3: the stack of layers is applied several times",
            "Use --pp-size 1, or --set model.recursion_depth=1",
        )
    ],
    "Muon needs whole matrices": [
        (
            {"gpus": 2, "zero_stage": 1, "sft.optimizer.name": "muon"},
            "zero_stage=1 with sft.optimizer.name=muon: ZeRO shards",
            "Use --zero-stage 0, or --set sft.optimizer.name=adamw",
        ),
        (
            {"tp_size": 2, "pretrain.optimizer.name": "muon"},
            "tp_size=2 with pretrain.optimizer.name=muon: tensor parallelism cuts matrices, and a part of a matrix",
            "Use --tp-size 1, or --set pretrain.optimizer.name=adamw",
        ),
    ],
    "embedding and head with rates of their own are on every ZeRO rank": [
        (
            {"gpus": 4, "pp_size": 2, "zero_stage": 1, "pretrain.optimizer.embedding_lr_factor": 20},
            "zero_stage=1 with pp_size=2 and pretrain.optimizer.embedding_lr_factor=20: ZeRO sums the gradient norm",
            "Use --zero-stage 0, --pp-size 1, or --set pretrain.optimizer.embedding_lr_factor=1",
        ),
        (
            {"gpus": 4, "pp_size": 2, "zero_stage": 3, "sft.optimizer.head_lr_factor": 0.5},
            "zero_stage=3 with pp_size=2 and sft.optimizer.head_lr_factor=0.5: ZeRO sums",
            "Use --zero-stage 0, --pp-size 1, or --set sft.optimizer.head_lr_factor=1",
        ),
    ],
    "adapters are not cut by tp": [
        (
            {"tp_size": 2, "sft.lora.r": 4},
            "tp_size=2 with sft.lora.r=4: tensor parallelism cuts the matrices that adapters are put on",
            "Use --tp-size 1 (--sp-size, --pp-size and --dp-size work), or --set sft.lora.r=0",
        )
    ],
    "ZeRO does not know frozen experts": [
        (
            {"gpus": 2, "ep_size": 2, "zero_stage": 2, "sft.lora.r": 4},
            "zero_stage=2 with ep_size=2 and sft.lora.r=4: DeepSpeed takes frozen experts",
            "Use --zero-stage 0 (the optimizer holds adapters alone), or --ep-size 1",
        )
    ],
    "every pipeline rank has an adapter": [
        (
            {"pp_size": 2, "sft.lora.r": 4, "sft.lora.target_modules": ["eh_proj"]},
            "pp_size=2 with sft.lora.target_modules=['eh_proj']: pipeline rank 0 has no layer of these names",
            "Use --pp-size 1, or leave sft.lora.target_modules empty",
        )
    ],
    "fewer ranks than --gpus can go on": [
        ({"gpus": 4, "min_gpus": 5}, "min_gpus=5: more than gpus=4", "Use --min-gpus 4 or less"),
        ({"gpus": 4, "min_gpus": 3}, "no dp_size below 4 works with 3 to 3 ranks", "Use --min-gpus 2"),
        ({"gpus": 2, "pp_size": 2, "min_gpus": 1}, "no dp_size below 1 works", "Omit --min-gpus"),
    ],
}


@pytest.mark.parametrize(
    ("rule", "settings", "reason", "way_out"),
    [(rule, *case) for rule, cases in BROKEN.items() for case in cases],
)
def test_a_layout_that_breaks_a_rule_is_told_value_reason_and_way_out(
    rule: str, settings: dict, reason: str, way_out: str
) -> None:
    asked = recipe(**settings)
    with pytest.raises(UserError) as caught:
        resolve_layout(asked, 0)
    text = str(caught.value)
    assert reason in text
    assert way_out in text
    assert "Nearest layout that works: --gpus" in text
    found = refusal(asked, asked_for(asked))
    assert found is not None and found[0] == rule
    assert text.startswith(f"{found[1].value}: {found[1].reason}. {found[1].way_out}. Nearest")


def test_every_rule_of_the_table_has_a_test() -> None:
    assert BROKEN.keys() == RULES.keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"gpus": 8, "pp_size": 2, "tp_size": 2, "ep_size": 2, "zero_stage": 3},
        {"gpus": 8, "pp_size": 2, "sp_size": 2, "ep_size": 4, "zero_stage": 2, "offload_optimizer": True},
        {"gpus": 4, "sp_size": 4, "ep_size": 4, "activation_checkpointing": "full"},
        {"zero_stage": 3},
        {"pp_size": 3, "pp_layout": "E+3|2|1+H"},
        {"pp_size": 3, "schedule": "interleaved_1f1b", "zero_stage": 2, **SIX_LAYERS},
        {"pp_size": 3, "schedule": "zbv", "zero_stage": 1, **SIX_LAYERS},
        {"pp_size": 2, "schedule": "dualpipev", **SIX_LAYERS},
        {"gpus": 4, "min_gpus": 2},
        {"gpus": 4, "min_gpus": 4},
        {"tp_size": 4, "model.attention": "mqa"},
        {"sp_size": 4, "model.attention": "gqa", "model.num_key_value_heads": 2},
        {"gpus": 4, "tp_size": 2, "ep_size": 2, "zero_stage": 3, "model.recursion_depth": 2},
        {"gpus": 8, "pp_size": 2, "sp_size": 2, "ep_size": 2, "pretrain.optimizer.name": "muon"},
        {"gpus": 2, "zero_stage": 3, "pretrain.optimizer.embedding_lr_factor": 20.0},
        {"gpus": 4, "pp_size": 2, "zero_stage": 2, "pretrain.optimizer.vector_lr_factor": 0.5},
        {"pp_size": 2, "tp_size": 2, "gpus": 4, "pretrain.optimizer.head_lr_factor": 0.5},
        {"gpus": 8, "pp_size": 2, "sp_size": 2, "ep_size": 2, "sft.lora.r": 4},
        {"gpus": 4, "pp_size": 2, "zero_stage": 3, "sft.lora.r": 4},
        {"pp_size": 2, "schedule": "zbv", "zero_stage": 1, "sft.lora.r": 4, **SIX_LAYERS},
    ],
)
def test_what_the_engine_can_do_is_not_refused(settings: dict) -> None:
    asked = recipe(**settings)
    assert resolve_layout(asked, 0) == asked_for(asked)


def test_a_lost_worker_leaves_layouts_with_fewer_replicas_and_as_many_experts_as_fit() -> None:
    settings = recipe(gpus=16, pp_size=2, ep_size=8, min_gpus=4)
    shrunk = elastic_layouts(settings, resolve_layout(settings, 0))
    sizes = [(found.gpus, found.pp, found.dp, found.ep) for found in shrunk]
    assert sizes == [(16, 2, 8, 8), (8, 2, 4, 4), (4, 2, 2, 2)]
    assert {found.min_gpus for found in shrunk} == {4}
    fixed = replace(shrunk[0], min_gpus=None)
    assert elastic_layouts(settings, fixed) == [fixed]


@given(wanted=WANTED)
def test_a_layout_is_legal_or_told_why_not(wanted: Layout) -> None:
    settings = recipe(**SIX_LAYERS)
    found = refusal(settings, wanted)
    assert (found is None) == (broken_rule(settings, wanted) is None)
    if found is not None:
        rule, told = found
        assert rule in RULES
        assert told.value and told.reason and told.way_out
        assert not str(told).endswith("..")
