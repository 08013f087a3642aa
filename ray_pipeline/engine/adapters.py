"""Low-rank adapters (LoRA, arXiv:2106.09685) on a rank's parts of the model; everything else is frozen.

`peft` makes the adapters and computes with them. Here is what a layout needs besides: names in the whole model, initial
weights and dropout that are the same in every layout, and the merged weights under the base's names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.layers.linear import Linear
from model.layers.vocab import Head
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch, required
from ray_pipeline.engine.row_noise import row_generators
from ray_pipeline.errors import UserError
from ray_pipeline.settings.lora_targets import chosen_targets
from ray_pipeline.settings.post_training import LoraConfig

NAME = "default"  # peft's own for the only adapter


class RowDropout(nn.Module):
    """Dropout whose mask belongs to a row of the batch (`read`) and to the layer, not to who computes it."""

    def __init__(self, rate: float, name: str):
        super().__init__()
        self.rate, self.name = rate, name
        self._seeds: Tensor | None = None
        self._window = slice(None)

    def read(self, batch: Batch) -> None:
        """The next inputs are of these rows.

        Raises:
            AssertionError: a batch of training that brings no `row_seed`.
        """
        self._seeds = required(batch.extras.row_seed) if self.training else None
        self._window = batch.window or slice(None)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, seq / sp, width] -> same."""
        if self._seeds is None or not self.training:
            return x
        shape, device = (self._seeds.shape[1], x.shape[-1]), x.device
        drawn = [torch.rand(shape, generator=g, device=device) for g in row_generators(self._seeds, self.name)]
        kept = torch.stack(drawn)[:, self._window] >= self.rate
        return x * kept / (1 - self.rate)


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear layer: base + scaling * B A.

    Attributes:
        a, b: parameters [r, in] and [out, r].
    """

    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    def delta(self) -> Tensor:
        """What it adds to the base's weight: [out, in]."""
        return self.scaling * (self.b.detach() @ self.a.detach())


class Adapters:
    """Adapters on all target layers of `parts`, whose own weights are frozen.

    Args:
        seed: A is drawn from it, each layer's by its name; B starts at zero, so that the model is the base.
    Attributes:
        by_layer: the layer's name in the whole model -> its adapter.
        dropouts: to be told what batch comes next.
    Raises:
        UserError: peft is not installed.
    """

    def __init__(self, parts: Sequence[Transformer], settings: LoraConfig, seed: int):
        self.settings = settings
        self.by_layer: dict[str, Adapter] = {}
        self.dropouts: list[RowDropout] = []
        for part in parts:
            part.requires_grad_(False)
            names = target_layers(part, settings)
            if names:
                self._inject(part, names, seed)

    def _inject(self, part: Transformer, names: list[str], seed: int) -> None:
        config = peft_config(self.settings, names)
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, part, NAME)
        for name in names:
            layer: Any = part.get_submodule(name)
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            with torch.no_grad():
                a.copy_(_initial(name, a.shape, seed))
            self.by_layer[name] = Adapter(a, b, layer.scaling[NAME])
            if self.settings.dropout:
                layer.lora_dropout[NAME] = RowDropout(self.settings.dropout, name)
                self.dropouts.append(layer.lora_dropout[NAME])

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name in the whole model: `layers.0.self_attn.o_proj.lora_A.weight`."""
        out: dict[str, nn.Parameter] = {}
        for name, adapter in self.by_layer.items():
            out |= {f"{name}.lora_A.weight": adapter.a, f"{name}.lora_B.weight": adapter.b}
        return out

    @torch.no_grad()
    def merged(self, base: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The weights of a model without adapters that computes the same, by its names."""
        out: dict[str, Tensor] = {name: parameter.detach() for name, parameter in base.items()}
        for name, adapter in self.by_layer.items():
            out[f"{name}.weight"] = out[f"{name}.weight"] + adapter.delta()
        return out


def peft_config(settings: LoraConfig, targets: Sequence[str]) -> Any:
    """peft's own description of the adapters.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig as PeftConfig
    except ImportError:
        raise UserError(f"sft.lora.r={settings.r}: adapters need peft. Install it: pip install peft") from None
    rates: dict[str, Any] = {"lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    return PeftConfig(r=settings.r, target_modules=list(targets), task_type="CAUSAL_LM", **rates)


def target_layers(part: Transformer, settings: LoraConfig) -> list[str]:
    """Names of the linear layers of a part that get adapters."""
    targets = chosen_targets(part.config, settings.target_modules)
    linear = (name for name, module in part.named_modules() if isinstance(module, Linear) and type(module) is not Head)
    return [name for name in linear if name.rpartition(".")[2] in targets]


def base_name(name: str) -> str | None:
    """Name in the model without adapters of a parameter of a model with them; None for an adapter's own."""
    if ".lora_A." in name or ".lora_B." in name:
        return None
    return name.replace(".base_layer.", ".")


def _initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Uniform within 1 / sqrt(inputs), as peft draws it, but from the layer's name."""
    digest = hashlib.sha256(f"{seed}/{name}.lora_A".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return (torch.rand(shape, generator=generator) * 2 - 1) / shape[1] ** 0.5
