"""How evenly experts are used: loads of all ranks after a step, what routers learn from them, and the figures of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.moe.router import Router
from model.parallel.mesh import Mesh
from model.transformer import Transformer

SAVED = ("e_score_correction_bias",)  # what a saved model has of a router besides its weight
FEW_TOKENS = 8  # mean of an expert below which one without a token says nothing
KEPT = (*SAVED, "expert_fraction")  # and a checkpoint


class ExpertBalance:
    """The routers of this rank.

    Attributes:
        routers: by their prefix in the whole model, `layers.1.mlp.gate.`.
        loads: [experts] tokens that each expert of a router got in the last step, over all replicas; padding left out.
    """

    def __init__(self, config: ModelConfig, parts: Iterable[Transformer], mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.routers = {
            f"{name}.": module for part in parts for name, module in part.named_modules() if isinstance(module, Router)
        }
        self.loads: dict[str, Tensor] = {}

    def all_routers(self) -> dict[str, tuple[int, int]]:
        """Prefixes of the whole model's routers, in order -> depth of the MTP module (0: none), passes of a token."""
        config = self.config
        last, depths = config.num_hidden_layers, range(config.num_nextn_predict_layers)
        main = {f"layers.{i}.mlp.gate.": (0, config.recursion_depth) for i in range(last) if config.is_moe_layer(i)}
        return main | {f"mtp.{k}.block.mlp.gate.": (k + 1, 1) for k in depths if config.is_moe_layer(last + k)}

    def step(self, *, taken: bool = True) -> None:
        """After an optimizer step: add up loads over replicas and let the routers take note of them.

        Args:
            taken: whether the step was; else the routers learn nothing from it.
        """
        routers = list(self.routers.values())
        if routers:
            loads = self.mesh.all_reduce(torch.stack([router.load for router in routers]), "replica")
            self.loads = dict(zip(self.routers, loads, strict=True))
            for router, load in zip(routers, loads, strict=True):
                router.load.copy_(load)
                if taken:
                    router.balance()
                else:
                    router.load.zero_()

    def measured(self, tokens: Sequence[int]) -> Tensor:
        """[routers of the whole model, 4] fp64: entropy, largest, dropped, idle; zeros where another pipeline rank's.

        Args:
            tokens: of the global batch, padding left out, by how far ahead a router's module predicts: all of them,
                then those that the MTP modules count.
        """
        everywhere = self.all_routers()
        device = next(iter(self.loads.values())).device if self.loads else torch.device("cpu")
        out = torch.zeros(len(everywhere), 4, dtype=torch.float64, device=device)
        here = [
            (row, name, times * tokens[depth])
            for row, (name, (depth, times)) in enumerate(everywhere.items())
            if name in self.loads
        ]
        if here:
            loads = torch.stack([self.loads[name] for _, name, _ in here])
            sent = torch.tensor([passed for *_, passed in here], device=device) * self.config.num_experts_per_tok
            out[[row for row, *_ in here]] = _figures(loads, sent)
        return out

    def figures(self, measured: list[list[float]]) -> dict[str, float]:
        """What is reported: of every router, and the worst over all.

        `load_entropy` is the entropy of the shares over ln(experts), 1 where all are equal; `largest_load` the busiest
        expert's tokens over the mean; `dropped_tokens` choices that no expert served, which this model never drops;
        `idle_experts` those without a token, where an even share would have been `FEW_TOKENS` at least.
        """
        out: dict[str, float] = {}
        worst_entropy, worst_load, dropped, most_idle = 1.0, 1.0, 0.0, 0.0
        for name, (entropy, largest, lost, idle) in zip(self.all_routers(), measured, strict=True):
            if largest == 0 and name.startswith("mtp."):
                continue  # the objective did not ask for the MTP modules
            layer = name.removesuffix(".mlp.gate.")
            out |= {f"moe/{layer}/load_entropy": entropy, f"moe/{layer}/largest_load": largest}
            worst_entropy, worst_load = min(worst_entropy, entropy), max(worst_load, largest)
            dropped, most_idle = dropped + lost, max(most_idle, idle)
        assert dropped == 0, f"{dropped:.0f} choices of a token reached no expert"
        worst = {
            "moe/load_entropy": worst_entropy,
            "moe/largest_load": worst_load,
            "moe/dropped_tokens": dropped,
            "moe/idle_experts": most_idle,
        }
        return worst | out if out else {}

    def buffers(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of `names` that routers have, by name in the whole model."""
        return {
            prefix + name: getattr(router, name)
            for prefix, router in self.routers.items()
            for name in names
            if hasattr(router, name)
        }


def _figures(loads: Tensor, sent: Tensor) -> Tensor:
    """loads [n, experts], sent [n]: choices made -> [n, 4]: normalised entropy, largest over mean, sent but lost,
    experts without a token."""
    counts = loads.double()
    total = counts.sum(1)
    shares = counts / total.clamp(min=1).unsqueeze(1)
    experts = counts.shape[1]
    scale = torch.log(torch.tensor(float(experts), dtype=torch.float64, device=counts.device)).clamp(min=1e-12)
    entropy = torch.special.entr(shares).sum(1) / scale if experts > 1 else torch.ones_like(total)
    largest = shares.amax(1) * experts
    idle = (counts == 0).sum(1) * (total >= FEW_TOKENS * experts)
    return torch.stack([entropy, largest, sent - total, idle.double()], 1)
