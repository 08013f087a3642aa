"""A standard mixture of experts and DeepSeekMoE of as many weights, all and active: ours, equations, transformers.

Standard: 2 of 8 experts, 1024 wide, by a softmax (Mixtral, arXiv:2401.04088). DeepSeekMoE: 7 of 32 experts and a shared
one, 256 wide, by a sigmoid (arXiv:2401.06066; the router of arXiv:2412.19437).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.moe.experts import MixtureOfExperts
from scripts.component_bench.attentions import fill, inputs
from scripts.component_bench.form import WIDTH, Component, Form, Named

STANDARD: dict[str, Any] = {
    "n_routed_experts": 8, "n_shared_experts": 0, "num_experts_per_tok": 2, "moe_intermediate_size": 1024,
    "scoring_func": "softmax", "topk_method": "greedy",
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 32, "n_shared_experts": 1, "num_experts_per_tok": 7, "moe_intermediate_size": 256,
}  # fmt: skip
IMPLEMENTATION = "grouped_mm"  # transformers' quickest in `scripts/bench_model.py`


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) (arXiv:2002.05202)."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def weighted_experts(x: Tensor, scores: Tensor, k: int, weights: Named) -> Tensor:
    """Sum over a token's k best experts, their scores scaled to sum to one: tokens [n, 512], scores [n, experts]."""
    best, chosen = scores.topk(k, -1)
    share = best / best.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert, (gate_up, down) in enumerate(
        zip(weights["experts.gate_up_proj"], weights["experts.down_proj"], strict=True)
    ):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        made = feed_forward(x[token], *gate_up.chunk(2), down)
        out = out.index_add(0, token, made * share[token, place].unsqueeze(-1))
    return out


def standard() -> Component:
    """2 of 8 experts."""
    ours = _module(STANDARD)
    weights = dict(ours.named_parameters())

    def plain(x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = torch.softmax(F.linear(tokens, weights["gate.weight"]), -1)
        return weighted_experts(tokens, scores, STANDARD["num_experts_per_tok"], weights).view_as(x)

    forms = {"ours": Form(ours, weights), "plain": Form(plain, weights), "transformers Mixtral": _mixtral(ours)}
    return Component("arXiv:2401.04088", inputs(), forms)


def deepseek() -> Component:
    """7 of 32 experts, and a shared one."""
    ours = _module(DEEPSEEK)
    weights = dict(ours.named_parameters())

    def plain(x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = torch.sigmoid(F.linear(tokens, weights["gate.weight"]))
        routed = weighted_experts(tokens, scores, DEEPSEEK["num_experts_per_tok"], weights).view_as(x)
        shared = (weights[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return routed + feed_forward(x, *shared)

    forms = {"ours": Form(ours, weights), "plain": Form(plain, weights), "transformers DeepseekV3": _deepseek(ours)}
    return Component("arXiv:2401.06066", inputs(), forms)


def _module(settings: dict[str, Any]) -> nn.Module:
    module = MixtureOfExperts(ModelConfig(hidden_size=WIDTH, **settings))
    for buffer in module.buffers():  # loads and balancing bias
        buffer.zero_()
    return fill(module)


def _mixtral(ours: nn.Module) -> Form:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=STANDARD["moe_intermediate_size"],
        num_local_experts=STANDARD["n_routed_experts"], num_experts_per_tok=STANDARD["num_experts_per_tok"],
    )  # fmt: skip
    config._experts_implementation = IMPLEMENTATION
    peer = MixtralSparseMoeBlock(config)
    peer.load_state_dict(ours.state_dict())
    return Form(peer, dict(peer.named_parameters()))


def _deepseek(ours: nn.Module) -> Form:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(hidden_size=WIDTH, n_group=1, topk_group=1, routed_scaling_factor=1.0, **DEEPSEEK)
    config._experts_implementation = IMPLEMENTATION
    peer = DeepseekV3MoE(config)
    peer.load_state_dict(ours.state_dict())
    return Form(peer, dict(peer.named_parameters()))
