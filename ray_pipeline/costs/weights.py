"""Every trained weight of the model by kind, with how it is cut: one list, from which all counts follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.config_rules import VALUE_GATE_FEATURES
from ray_pipeline.costs.workload import Workload
from ray_pipeline.settings.lora_targets import chosen_targets, linear_layers

KINDS = ("embedding", "attention", "dense ffn", "routed experts", "shared experts", "router", "norms", "head", "MTP")


@dataclass(frozen=True)
class Weight:
    """One parameter, or several that are alike.

    Attributes:
        count: numbers in the whole model. largest: of them in a single parameter.
        active: how many of them one token meets: its own row of the embedding, its own experts.
        matmul: multiplied with activations (autocast then makes a bf16 copy).
        tp: cut over tensor-parallel ranks. expert: cut over expert-parallel ranks.
    """

    kind: str
    count: int
    active: int
    largest: int
    matmul: bool = True
    tp: bool = False
    expert: bool = False

    def local(self, tp: int, ep: int) -> int:
        """Numbers that one rank holds before ZeRO."""
        return self.count // ((tp if self.tp else 1) * (ep if self.expert else 1))

    def local_largest(self, tp: int, ep: int) -> int:
        """Of the largest single parameter, what one rank holds."""
        return self.largest // ((tp if self.tp else 1) * (ep if self.expert else 1))


def _matrix(kind: str, rows: int, columns: int, *, tp: bool = False) -> Weight:
    size = rows * columns
    return Weight(kind, size, size, size, tp=tp)


def _norm(*widths: int) -> Weight:
    return Weight("norms", sum(widths), sum(widths), max(widths), matmul=False)


def _block_norms(model: ModelConfig, number: int) -> Weight:
    """Norms in front of sublayers and around the stack."""
    each = (model.hidden_size, model.hidden_size, 1) if model.norm == "dyt" else (model.hidden_size,)
    return _norm(*each * number)


def _attention(model: ModelConfig) -> Iterator[Weight]:
    yield from _latent_attention(model) if model.is_latent else _grouped_attention(model)
    if model.position == "cope":
        yield _matrix("attention", model.cope_positions, model.qk_head_dim)


def _grouped_attention(model: ModelConfig) -> Iterator[Weight]:
    hidden, width, name = model.hidden_size, model.num_attention_heads * model.head_dim, "attention"
    yield _matrix(name, hidden, width, tp=True)
    if model.attention == "mqa":  # one key and one value head, whole on every rank
        yield _matrix(name, hidden, 2 * model.head_dim)
    else:
        for _ in range(2):
            yield _matrix(name, hidden, model.num_kv_heads * model.head_dim, tp=True)
    yield _matrix(name, width, hidden, tp=True)


def _latent_attention(model: ModelConfig) -> Iterator[Weight]:
    heads, hidden, name = model.num_attention_heads, model.hidden_size, "attention"
    if model.q_lora_rank is None:
        yield _matrix(name, hidden, heads * model.qk_head_dim, tp=True)
    else:
        yield _matrix(name, hidden, model.q_lora_rank)
        yield _norm(model.q_lora_rank)
        yield _matrix(name, model.q_lora_rank, heads * model.qk_head_dim, tp=True)
    yield _matrix(name, hidden, model.kv_lora_rank + model.qk_rope_head_dim)
    yield _norm(model.kv_lora_rank)
    yield _matrix(name, model.kv_lora_rank, heads * (model.qk_nope_head_dim + model.v_head_dim), tp=True)
    yield _matrix(name, heads * model.v_head_dim, hidden, tp=True)
    if model.attention == "dsa":
        yield from _indexer(model)


def _indexer(model: ModelConfig) -> Iterator[Weight]:
    assert model.q_lora_rank is not None
    heads, width, name = model.index_n_heads, model.index_head_dim, "attention"
    # Its inputs are detached: no gradient needs autocast's copies of these, so none are kept.
    yield replace(_matrix(name, model.q_lora_rank, heads * width), matmul=False)
    yield replace(_matrix(name, model.hidden_size, width), matmul=False)
    yield _norm(width, width)
    yield replace(_matrix(name, model.hidden_size, heads), matmul=False)


def _value_embedding(model: ModelConfig) -> Iterator[Weight]:
    cut, size = model.attention != "mqa", model.value_table_params
    yield Weight("embedding", size, size // model.vocab_size, size, matmul=False, tp=cut)
    yield _matrix("attention", model.num_kv_heads, VALUE_GATE_FEATURES, tp=cut)


def _swiglu(kind: str, hidden: int, inner: int) -> Iterator[Weight]:
    for _ in range(3):
        yield _matrix(kind, hidden, inner, tp=True)


def _experts(model: ModelConfig) -> Iterator[Weight]:
    hidden, inner, experts = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts
    for width in (2 * inner, inner):  # gate and up stacked; down
        each = hidden * width
        chosen = model.num_experts_per_tok * each
        yield Weight("routed experts", experts * each, chosen, experts * each, tp=True, expert=True)
    # Multiplied in fp32, outside autocast.
    yield replace(_matrix("router", experts, hidden), matmul=False)
    if model.n_shared_experts:
        yield from _swiglu("shared experts", hidden, model.n_shared_experts * inner)


def layer_weights(model: ModelConfig, layer: int) -> list[Weight]:
    """One block; MTP blocks have indices from `num_hidden_layers` on."""
    dense = _swiglu("dense ffn", model.hidden_size, model.intermediate_size)
    feed_forward = _experts(model) if model.is_moe_layer(layer) else dense
    scales = [_norm(2)] if model.residual_scales and layer < model.num_hidden_layers else []
    values = _value_embedding(model) if model.has_value_embedding(layer) else ()
    return [*_attention(model), *values, _block_norms(model, 2), *feed_forward, *scales]


def alike(model: ModelConfig, layers: Iterable[int]) -> list[tuple[int, int]]:
    """One layer of each kind, and how many there are of it: they differ by feed-forward and values."""
    first: dict[tuple[bool, bool], int] = {}
    of = ((model.is_moe_layer(layer), model.has_value_embedding(layer), layer) for layer in layers)
    kinds = Counter(first.setdefault((moe, values), layer) for moe, values, layer in of)
    return list(kinds.items())


def mtp_projection(model: ModelConfig) -> Weight:
    """Joins hidden state and embedding in one multi-token prediction module."""
    return _matrix("MTP", 2 * model.hidden_size, model.hidden_size)


def mtp_weights(model: ModelConfig) -> list[Weight]:
    """All multi-token prediction modules; embedding and head are the main model's."""
    around = [mtp_projection(model), _block_norms(model, 3)]
    modules = (weight for layer in model.mtp_layers for weight in [*layer_weights(model, layer), *around])
    return [replace(weight, kind="MTP") for weight in modules]


def embedding_weight(model: ModelConfig) -> Weight:
    """The token table; a token reads one row of it."""
    size = model.vocab_size * model.hidden_size
    return Weight("embedding", size, model.hidden_size, size, matmul=False, tp=True)


def head_weight(model: ModelConfig) -> Weight:
    """The output projection."""
    return _matrix("head", model.vocab_size, model.hidden_size, tp=True)


def part_weights(model: ModelConfig, layers: range) -> list[Weight]:
    """A pipeline stage of consecutive layers: the first also has the embedding, the last norm, head and MTP modules."""
    out = [weight for layer in layers for weight in layer_weights(model, layer)]
    if layers.start == 0:
        out.append(embedding_weight(model))
    if layers.stop == model.num_hidden_layers:
        if model.recursion_depth > 1:
            out.append(_norm(model.recursion_params()))
        out += [_block_norms(model, 1), head_weight(model), *mtp_weights(model)]
    return out


def trained_weights(work: Workload, layers: range) -> list[Weight]:
    """What is trained of the pipeline stage of `layers`: all its weights, or the two matrices of every adapter."""
    if work.lora is None:
        return part_weights(work.model, layers)
    targets, r = chosen_targets(work.model, work.lora.target_modules), work.lora.r
    sizes = [r * width for name, *widths in linear_layers(work.model, layers) if name in targets for width in widths]
    return [Weight("adapters", size, size, size) for size in sizes]


def by_kind(weights: Iterable[Weight], *, active: bool = False) -> dict[str, int]:
    """Numbers per kind, in the order of `KINDS`."""
    found = dict.fromkeys(KINDS, 0)
    for weight in weights:
        found[weight.kind] += weight.active if active else weight.count
    return {kind: count for kind, count in found.items() if count}


def counts(model: ModelConfig) -> dict[str, dict[str, int]]:
    """`total` and `active` numbers per kind of the whole model."""
    weights = part_weights(model, range(model.num_hidden_layers))
    return {"total": by_kind(weights), "active": by_kind(weights, active=True)}


def main_model(kinds: dict[str, int]) -> int:
    """The count that is published: without the MTP modules, which inference does not need."""
    return sum(count for kind, count in kinds.items() if kind != "MTP")
