"""The model against Hugging Face's DeepseekV3 on the same weights, and what must hold whatever the weights are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig, RopeScaling
from model.convert.hf_config import to_hf
from model.init import init_weights
from model.layers.loss import IGNORE, cross_entropy_sum, label_logprobs, shifted_labels
from model.transformer import Transformer
from tests.model.probes import assert_causal, assert_packed_equals_alone

BASE = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=8, num_experts_per_tok=3, max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.7)
VARIANTS = {
    "plain": {},
    "yarn": {"rope_scaling": YARN},
    "groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "no_q_lora": {"q_lora_rank": None},
    "unnormalised": {"norm_topk_prob": False, "n_shared_experts": 2},
}


def build(**changes) -> Transformer:
    """A model with random weights and random balancing biases, in eval mode."""
    config = ModelConfig(**{**BASE, **changes})
    model = Transformer(config)
    init_weights(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.rand(buffer.shape, generator=generator))
    return model.eval()


def hugging_face(model: Transformer):
    """transformers' model with the same weights; its live module names are ours but for MTP."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    hf = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf(model.config))).float().eval()
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("mtp."):
            state[name if name.startswith("lm_head") else f"model.{name}"] = tensor
    hf.load_state_dict(state, strict=True)
    return hf


def tokens(rows: int = 2, seq_len: int = 48) -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (rows, seq_len), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_match_hugging_face_deepseek_v3(variant):
    model = build(**VARIANTS[variant])
    hf, ids = hugging_face(model), tokens()
    ours, theirs = model(ids), hf(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    ours.logsumexp(-1).sum().backward()
    theirs.logsumexp(-1).sum().backward()
    own = dict(model.named_parameters())
    for name, parameter in hf.named_parameters():
        grad = own[name.removeprefix("model.")].grad
        torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=1e-4 * float(parameter.grad.abs().max()) + 1e-7)


def test_mtp_hidden_states_match_the_transformers_oracle():
    from transformers.modeling_layers import MtpModel

    model, ids = build(), tokens()
    hf = hugging_face(model)
    hf.config.num_mtp_layers = 1
    oracle = MtpModel(hf, 1).float().eval()
    ours = model.mtp[0].state_dict()
    renamed = {}
    for name in oracle.state_dict():
        key = name.removeprefix("layers.0.").replace("mtp_block.", "block.").replace("post_norm", "shared_head_norm")
        if key in ours:
            renamed[name] = ours[key]
    missing = oracle.load_state_dict(renamed, strict=False).missing_keys
    assert len(renamed) == len(ours), missing
    hidden = hf.model(ids).last_hidden_state
    positions = torch.arange(1, ids.shape[1])[None]
    expected = oracle.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
    got = model.predict_ahead(hidden, model.embed(ids)[1], None)[0][:, :-1]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, 47), packed=st.booleans())
def test_changing_a_token_never_changes_logits_before_it(place, packed):
    assert_causal(build(), tokens(rows=1), place, packed=packed)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 47), min_size=1, max_size=4, unique=True).map(sorted))
def test_packed_documents_equal_documents_alone(cuts):
    assert_packed_equals_alone(build(), tokens(rows=1), cuts)


def test_packed_mtp_never_reads_the_next_document():
    ids = tokens(rows=1, seq_len=16)
    doc_ids = (torch.arange(16)[None] >= 8).long()
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), IGNORE)], 1)
    labels[0, 7] = IGNORE
    shifted = shifted_labels(labels, doc_ids, 1)
    assert (shifted[0, :6] == ids[0, 2:8]).all() and (shifted[0, 6:8] == IGNORE).all()
    assert (shifted[0, 8:14] == ids[0, 10:]).all() and (shifted[0, 14:] == IGNORE).all()


def test_analytic_parameter_counts_equal_the_built_model():
    # A module's block is as its place behind the last layer says: here the first is dense, the second is not.
    mixed = {"num_hidden_layers": 1, "first_k_dense_replace": 2, "num_nextn_predict_layers": 2}
    for changes in (*VARIANTS.values(), mixed):
        model = build(**changes)
        assert model.config.num_params() == sum(p.numel() for p in model.parameters())


def test_published_counts_of_deepseek_v3():
    config = ModelConfig(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        first_k_dense_replace=3, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=163840,
    )  # fmt: skip
    assert round(config.num_params(mtp=False) / 1e9) == 671
    assert 37 <= config.num_params(active=True, mtp=False) / 1e9 < 38


def test_initial_weights_do_not_depend_on_the_layout():
    config = ModelConfig(**BASE)
    whole = Transformer(config)
    init_weights(whole, config, seed=3)
    state = whole.state_dict()
    for layers in (range(0, 1), range(1, 3)):
        stage = Transformer(config, layers)
        init_weights(stage, config, seed=3)
        for name, tensor in stage.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_label_logprobs_sum_to_cross_entropy():
    model, ids = build(), tokens()
    hidden = torch.randn(2, 48, 64)
    labels = ids.clone()
    labels[:, ::3] = IGNORE
    logprobs = label_logprobs(hidden, model.lm_head, labels)
    total = cross_entropy_sum(hidden, model.lm_head, labels)
    torch.testing.assert_close(-logprobs.sum(), total)
    assert (logprobs[labels == IGNORE] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9: only 8 experts"),
        ({"n_group": 3}, "n_group=3: must divide n_routed_experts=8"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7: rotary features come in pairs"),
        ({"hidden_size": 0}, "hidden_size=0: must be at least 1"),
    ],
)
def test_impossible_config_is_refused_by_name_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        Transformer(ModelConfig(**{**BASE, **changes}))


def test_router_bias_moves_against_the_load():
    model = build().train()
    model(tokens())
    gate = model.layers["1"].mlp.gate
    load, before = gate.load.double(), gate.e_score_correction_bias.clone()
    assert load.sum() == 2 * 48 * 3
    gate.balance()
    moved = gate.e_score_correction_bias - before
    assert ((moved > 0) == (load < load.mean())).all() and (gate.load == 0).all()
