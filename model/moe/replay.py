"""Routing that was recorded at sampling and is used again in training (Rollout Routing Replay, arXiv:2510.11370).

A recorded routing has, for each token, the experts of every routed layer one after another; a stack that is applied
several times has them once per pass. MTP modules are not part of it: they route freely. Integers only.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def split_routing(config: ModelConfig, layers: range, routing: Tensor | None) -> Iterator[list[Tensor | None]]:
    """What each of `layers` is given, for every pass through them.

    Args:
        routing: [batch, seq, columns] of the whole model; None routes everything freely.
    Yields:
        Per layer [batch, seq, num_experts_per_tok], None for a dense one.
    Raises:
        ValueError: a routing of another model.
    """
    k, once = config.num_experts_per_tok, routed_layers(config) // config.recursion_depth
    if routing is not None and routing.shape[-1] != columns(config):
        raise ValueError(
            f"a routing of {routing.shape[-1]} expert ids per token: this model's has {columns(config)}, "
            f"{k} for each of {routed_layers(config)} routed layers"
        )
    for index in range(config.recursion_depth):
        given: list[Tensor | None] = []
        for layer in layers:
            if routing is None or not config.is_moe_layer(layer):
                given.append(None)
                continue
            place = index * once + layer - config.first_k_dense_replace
            given.append(routing[..., place * k : (place + 1) * k])
        yield given
