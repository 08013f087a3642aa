"""Every trained weight of the model by kind, with how it is cut: one list, from which all counts follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from model.config import ModelConfig

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


def _attention(model: ModelConfig) -> Iterator[Weight]:
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
    return [*_attention(model), _norm(model.hidden_size, model.hidden_size), *feed_forward]


def mtp_projection(model: ModelConfig) -> Weight:
    """Joins hidden state and embedding in one multi-token prediction module."""
    return _matrix("MTP", 2 * model.hidden_size, model.hidden_size)


def mtp_weights(model: ModelConfig) -> list[Weight]:
    """All multi-token prediction modules; embedding and head are the main model's."""
    hidden = model.hidden_size
    around = [mtp_projection(model), _norm(hidden, hidden, hidden)]
    blocks = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
    modules = (weight for layer in blocks for weight in [*layer_weights(model, layer), *around])
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
        out += [_norm(model.hidden_size), head_weight(model), *mtp_weights(model)]
    return out


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
