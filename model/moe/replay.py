"""Routing that was recorded at sampling and is used again in training (Rollout Routing Replay, arXiv:2510.11370).

A recorded routing has, for each token, the experts of every routed layer one after another; a stack that is applied
several times has them once per pass. MTP modules are not part of it: they route freely. Integers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from model.config import ModelConfig

FREE = -1  # in place of expert ids: the token is routed by its scores


def routed_layers(config: ModelConfig) -> int:
    """How often a token is routed on its way through the model."""
    once = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    return once * config.recursion_depth


def columns(config: ModelConfig) -> int:
    """Width of a recorded routing: expert ids per token."""
    return routed_layers(config) * config.num_experts_per_tok


def layer_columns(config: ModelConfig, layers: Sequence[int]) -> Iterator[list[slice | None]]:
    """Where each of `layers` has its experts in a recorded routing, for every pass; None for a dense one."""
    k, once = config.num_experts_per_tok, routed_layers(config) // config.recursion_depth
    for index in range(config.recursion_depth):
        places = [index * once + layer - config.first_k_dense_replace for layer in layers]
        yield [
            slice(place * k, (place + 1) * k) if config.is_moe_layer(layer) else None
            for place, layer in zip(places, layers, strict=True)
        ]


def split_routing(config: ModelConfig, layers: range, routing: Tensor | None) -> Iterator[list[Tensor | None]]:
    """What each of `layers` is given, for every pass through them.

    Args:
        routing: [batch, seq, columns] of the whole model; None routes everything freely.
    Yields:
        Per layer [batch, seq, num_experts_per_tok], None for a dense one.
    Raises:
        ValueError: a routing of another model.
    """
    if routing is not None and routing.shape[-1] != columns(config):
        raise ValueError(
            f"a routing of {routing.shape[-1]} expert ids per token: this model's has {columns(config)}, "
            f"{config.num_experts_per_tok} for each of {routed_layers(config)} routed layers"
        )
    for places in layer_columns(config, layers):
        yield [None if routing is None or place is None else routing[..., place] for place in places]
