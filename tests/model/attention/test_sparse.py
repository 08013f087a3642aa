"""DeepSeek Sparse Attention against transformers' DeepseekV32, the plain formulas, and dense MLA."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import index_loss, indexer
from model.attention.core import document_mask
from model.attention.index_loss import indexer_kl
from model.attention.indexer import highest, index_scores, select
from model.attention.sparse import SparseAttention, set_warm_up
from model.config import ModelConfig, RopeScaling
from model.init import init_weights
from model.transformer import Transformer, layer_losses
from tests.model.probes import assert_causal, assert_packed_equals_alone

# 16 heads: with few of them, relu makes scores of exactly zero, and which of equals a sort takes is nobody's rule.
BASE = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=8, num_experts_per_tok=3, max_position_embeddings=128, initializer_range=0.2,
    attention="dsa", index_n_heads=16, index_head_dim=24, index_topk=12,
)  # fmt: skip
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.7)
VARIANTS = {
    "plain": {}, "yarn": {"rope_scaling": YARN}, "few_tokens": {"index_topk": 3}, "all_tokens": {"index_topk": 48},
}  # fmt: skip


def build(**changes) -> Transformer:
    """A model with random weights and balancing biases, in eval mode."""
    config = ModelConfig(**{**BASE, **changes})
    model = Transformer(config)
    init_weights(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith("e_score_correction_bias") or "k_norm" in name:
            tensor.data += 0.1 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def tokens(rows: int = 2, seq_len: int = 48) -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (rows, seq_len), generator=torch.Generator().manual_seed(2))


def hugging_face(model: Transformer):
    """transformers' model with the same weights under the same names."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    c = model.config
    keys = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts "
        "num_experts_per_tok n_group topk_group norm_topk_prob routed_scaling_factor max_position_embeddings "
        "rms_norm_eps first_k_dense_replace index_n_heads index_head_dim index_topk"
    ).split()
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        rope |= {"rope_type": "yarn", **vars(c.rope_scaling)}
    published = {key: getattr(c, key) for key in keys}
    config = DeepseekV32Config(**published, num_key_value_heads=c.num_attention_heads, rope_parameters=rope)
    hf = DeepseekV32ForCausalLM(config).float().eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    hf.load_state_dict({n if n.startswith("lm_head") else f"model.{n}": t for n, t in state.items()}, strict=True)
    return hf


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_match_hugging_face_deepseek_v32(variant):
    model = build(**VARIANTS[variant])
    hf, ids = hugging_face(model), tokens()
    ours, theirs = model(ids), hf(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.detach().abs().max()))
    ours.logsumexp(-1).sum().backward()
    theirs.logsumexp(-1).sum().backward()
    own = dict(model.named_parameters())
    for name, parameter in hf.named_parameters():
        grad = own[name.removeprefix("model.")].grad
        if "indexer" in name:
            assert grad is None and parameter.grad is None
            continue
        torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=1e-4 * float(parameter.grad.abs().max()) + 1e-7)


def test_rows_of_up_to_index_topk_tokens_equal_dense_mla_exactly():
    sparse, ids = build(index_topk=48), tokens()
    dense = Transformer(dataclasses.replace(sparse.config, attention="mla"))
    dense.load_state_dict({n: t for n, t in sparse.state_dict().items() if ".indexer." not in n})
    packed = (torch.arange(48)[None] >= 20).long().expand(2, -1)
    with torch.no_grad():
        for doc_ids in (None, packed):
            assert torch.equal(sparse(ids, doc_ids), dense.eval()(ids, doc_ids))
            assert not torch.allclose(build()(ids, doc_ids), dense(ids, doc_ids), atol=1e-3)


def test_analytic_parameter_counts_equal_the_built_model():
    model = build()
    assert model.config.num_params() == sum(p.numel() for p in model.parameters())
    assert all(isinstance(module.self_attn, SparseAttention) for module in model.layers.values())


def test_the_norm_of_index_keys_starts_as_the_identity():
    model = Transformer(ModelConfig(**BASE))
    init_weights(model, model.config, seed=0)
    norm = model.layers["0"].self_attn.indexer.k_norm
    assert (norm.weight == 1).all() and (norm.bias == 0).all()


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, 47), packed=st.booleans())
def test_changing_a_token_never_changes_logits_before_it(place, packed):
    assert_causal(build(), tokens(rows=1), place, packed=packed)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 47), min_size=1, max_size=4, unique=True).map(sorted))
def test_packed_documents_equal_documents_alone(cuts):
    assert_packed_equals_alone(build(), tokens(rows=1), cuts)


def test_scores_are_weighted_sums_of_rectified_products():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, generator=generator) for shape in ((2, 5, 3, 4), (2, 7, 4)))
    weights = torch.randn(2, 5, 3, generator=generator)
    products = torch.einsum("bthd,bsd->bths", q, k).relu()
    torch.testing.assert_close(index_scores(q, k, weights), (products * weights.unsqueeze(-1)).sum(2))


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=12), st.data())
def test_the_highest_scores_are_taken_and_of_equal_ones_the_last(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], -i))[:count]
    row = torch.tensor(scores).float()
    assert highest(row, count).nonzero().flatten().tolist() == sorted(order)
    padded = torch.cat([torch.full((3,), -torch.inf), row])
    assert torch.equal(highest(padded, count)[3:], highest(row, count))


def random_index(batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((batch, seq, 3, 4), (batch, seq, 4), (batch, seq, 3))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes)


def two_documents(seq: int) -> torch.Tensor:
    doc_ids = torch.stack([(torch.arange(seq) >= cut).long() for cut in (seq // 3, seq - 2)])
    return document_mask(doc_ids)[:, 0]


@settings(max_examples=20, deadline=None)
@given(seq=st.integers(3, 20), topk=st.integers(1, 22), block=st.sampled_from([1, 200, 1 << 24]))
def test_every_query_reads_its_topk_visible_tokens_in_blocks_of_any_size(seq, topk, block):
    index, visible = random_index(2, seq), two_documents(seq)
    scores = index_scores(*index).masked_fill(~visible, -torch.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer, "BLOCK", block)
        selected = select(*index, visible, topk)
        half = seq // 2
        late = select(index[0][:, half:], index[1], index[2][:, half:], visible[:, half:], topk, first=half)
    assert torch.equal(selected[:, half:], late)
    assert (selected <= visible).all()
    assert torch.equal(selected.sum(-1), visible.sum(-1).clamp(max=topk))
    worst = scores.masked_fill(~selected, torch.inf).amin(-1)
    assert (worst >= scores.masked_fill(selected, -torch.inf).amax(-1)).all()


@pytest.mark.parametrize("block", [1, 300, 1 << 24])
def test_the_indexers_loss_and_gradients_equal_the_plain_formula(monkeypatch, block):
    monkeypatch.setattr(index_loss, "BLOCK", block)
    index, read, local = random_index(2, 9), two_documents(9), SparseAttention.tp
    q, k = (torch.randn(2, 9, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (6, 7))
    ours, plain = ([t.clone().requires_grad_() for t in index] for _ in range(2))
    got = indexer_kl(tuple(ours), q, k, read, 0.3, tp=local, sp=local)
    attention = torch.einsum("bthd,bshd->bhts", q, k).mul(0.3).masked_fill(~read.unsqueeze(1), -torch.inf).softmax(-1)
    target = attention.sum(1) / 4
    chosen = index_scores(*plain).masked_fill(~read, -torch.inf).softmax(-1)
    want = (target[read] * (target[read] / chosen[read]).log()).sum()
    torch.testing.assert_close(got, want)
    assert got > 0
    (3 * got).backward()
    (3 * want).backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_indexer_learns_from_its_own_loss_alone_and_the_model_from_the_main_one(warm_up):
    model, ids = build().train(), tokens()
    set_warm_up(model, warm_up)
    grads = []
    for scale in (None, 0.5):
        model.zero_grad()
        if scale is None:
            model(ids).logsumexp(-1).sum().backward()
        else:
            with layer_losses([model], scale) as sums:
                model(ids).logsumexp(-1).sum().backward()
            total, count = sums.pair("indexer_kl")
            assert total > 0 and count == 3 * ids.numel()
        grads.append({name: p.grad for name, p in model.named_parameters() if not name.startswith("mtp.")})
    for name, grad in grads[0].items():
        if ".indexer." in name:
            assert grad is None and grads[1][name].abs().max() > 0
        else:
            assert torch.equal(grad, grads[1][name])


def test_the_warm_up_attends_to_everything_in_training_and_to_the_chosen_tokens_in_evaluation():
    model, ids = build(), tokens()
    dense = build(index_topk=48)
    with torch.no_grad():
        sparse = model(ids)
        set_warm_up(model, True)
        assert torch.equal(model(ids), sparse)
        torch.testing.assert_close(model.train()(ids), dense(ids))
        set_warm_up(model, False)
        assert torch.equal(model(ids), sparse)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("warm_up", [True, False])
def test_recomputing_activations_changes_no_gradient_and_counts_the_loss_once(recompute, warm_up):
    model, ids = build().train(), tokens()
    set_warm_up(model, warm_up)
    found = []
    for kind in ("none", recompute):
        model.zero_grad()
        model.set_recompute(kind)
        with layer_losses([model], 0.1) as sums:
            model(ids).logsumexp(-1).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((sums.pair("indexer_kl"), grads))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())


def test_training_the_indexer_brings_its_choice_to_what_attention_reads():
    """Ten steps on the loss alone lower it, in either phase."""
    for warm_up in (True, False):
        model, ids = build(), tokens()
        set_warm_up(model.train(), warm_up)
        parameters = [p for name, p in model.named_parameters() if ".indexer." in name and not name.startswith("mtp.")]
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        losses = []
        for _ in range(10):
            model.zero_grad()
            with layer_losses([model], 1 / ids.numel()) as sums:
                model(ids).sum().backward()
            losses.append(sums.pair("indexer_kl")[0])
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0], losses


@given(seq=st.integers(1, 60), topk=st.integers(1, 60))
def test_the_tokens_a_query_reads_are_counted(seq, topk):
    config = ModelConfig(**{**BASE, "index_topk": topk})
    read = sum(min(place + 1, topk) for place in range(seq))
    assert config.attended_tokens(seq) == (read // seq if seq > topk else seq // 2)
