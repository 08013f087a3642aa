"""Which linear layers low-rank adapters can be put on, by name and shape. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator

from model.config import ModelConfig
from ray_pipeline.errors import did_you_mean

# Every name a model of some kind has. Experts' matrices, router, embedding and head are no linear layers of this kind.
_OF_ATTENTION = (
    "q_proj", "k_proj", "v_proj", "kv_proj_with_mqa", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "o_proj",
)  # fmt: skip
_OTHERS = ("gate_proj", "up_proj", "down_proj", "eh_proj")


def _attention(model: ModelConfig) -> dict[str, tuple[int, int]]:
    heads, hidden = model.num_attention_heads, model.hidden_size
    out = {"o_proj": (heads * model.value_head_dim, hidden)}
    if not model.is_latent:
        dim = model.head_dim
        if model.attention == "mqa":
            keys = {"kv_proj_with_mqa": (hidden, 2 * dim)}
        else:
            keys = dict.fromkeys(("k_proj", "v_proj"), (hidden, model.num_kv_heads * dim))
        return out | {"q_proj": (hidden, heads * dim)} | keys
    if model.q_lora_rank is None:
        out["q_proj"] = (hidden, heads * model.qk_head_dim)
    else:
        out |= {"q_a_proj": (hidden, model.q_lora_rank), "q_b_proj": (model.q_lora_rank, heads * model.qk_head_dim)}
    expanded = heads * (model.qk_nope_head_dim + model.v_head_dim)
    down = {"kv_a_proj_with_mqa": (hidden, model.kv_lora_rank + model.qk_rope_head_dim)}
    return out | down | {"kv_b_proj": (model.kv_lora_rank, expanded)}


def _feed_forward(model: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    hidden, inner = model.hidden_size, model.intermediate_size
    if model.is_moe_layer(layer):
        inner = model.n_shared_experts * model.moe_intermediate_size
    if not inner:
        return {}
    return {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}


def linear_layers(model: ModelConfig, layers: range) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of every layer adapters can be put on, in the pipeline stage of `layers`.

    The last stage has the MTP modules.
    """
    ahead = model.mtp_layers if layers.stop == model.num_hidden_layers else range(0)
    for layer in (*layers, *ahead):
        for name, (inputs, outputs) in (_attention(model) | _feed_forward(model, layer)).items():
            yield name, inputs, outputs
    for _ in ahead:
        yield "eh_proj", 2 * model.hidden_size, model.hidden_size


def chosen_targets(model: ModelConfig, names: list[str]) -> tuple[str, ...]:
    """`names`, or without any those of the model's attention."""
    return tuple(names) or tuple(_attention(model))


def target_problem(model: ModelConfig, names: list[str]) -> str | None:
    """What is wrong with the first name that this model has no layer of, and the way out; None where all are right."""
    known = sorted({name for name, *_ in linear_layers(model, range(model.num_hidden_layers))})
    for name in names:
        if name in known:
            continue
        reason = "no linear layer has this name" if name not in _OF_ATTENTION + _OTHERS else "not in this model"
        return f"{name}: {reason}{did_you_mean(name, known)}. This model has {', '.join(known)}."
    return None


def adapter_params(model: ModelConfig, layers: range, rank: int, names: list[str]) -> int:
    """Numbers in the adapters of a pipeline stage: rank * (inputs + outputs) of every layer that has one."""
    targets = chosen_targets(model, names)
    return sum(rank * (a + b) for name, a, b in linear_layers(model, layers) if name in targets)
