"""An importance matrix: how much each input feature of each matrix weighs, measured on text (llama.cpp's imatrix).

The weight is the mean square of the feature over the text's tokens; rounding then spends its error where little comes
in. Measured by hooks on our own model, so it needs no second program. As in llama.cpp's tool, embedding and head have
none. Of `attn_v_b`, whose input exists only in the absorbed form, the latent that attention averages stands in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.convert.gguf_tensors import gguf_names, mtp_modules
from model.layers.linear import Linear
from model.layers.vocab import Head
from model.moe.experts import RoutedExperts
from model.transformer import Transformer


class _Sums:
    """Sums of squares and how many tokens they are of, by the name of a tensor in the file."""

    def __init__(self, model: Transformer):
        self.model = model
        self.squares: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.real = torch.ones(0, dtype=torch.bool)  # tokens of the batch that are no padding

    def add(self, name: str, squares: Tensor, count: Tensor) -> None:
        """squares [matrices, features], count [matrices]."""
        if name in self.squares:
            self.squares[name] += squares.double()
            self.counts[name] += count
        else:
            self.squares[name], self.counts[name] = squares.double(), count.clone()

    def rows(self, x: Tensor) -> Tensor:
        """[batch, seq, features] or [tokens, features] -> those of real tokens."""
        return x.reshape(-1, x.shape[-1])[self.real].float()

    def linear(self, name: str, module: nn.Module) -> None:
        """Watch what a product reads."""
        names = gguf_names(self.model.config, f"{name}.weight")

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            rows = self.rows(inputs[0])
            squares, count = rows.square().sum(0, keepdim=True), torch.tensor([len(rows)])
            if name.endswith("kv_b_proj"):
                heads = self.model.config.num_attention_heads
                self.add(names[1], squares.expand(heads, -1), count.expand(heads))
                return
            self.add(names[0], squares, count)
            if name.endswith(("q_b_proj", "q_proj")):
                self._queries(names[0].rpartition("attn_q")[0], output)

        module.register_forward_hook(hook)

    def _queries(self, prefix: str, output: Tensor) -> None:
        """`attn_k_b` reads the part of each head's query that has no position."""
        config = self.model.config
        heads = self.rows(output).unflatten(-1, (config.num_attention_heads, -1))[..., : config.qk_nope_head_dim]
        count = torch.full((config.num_attention_heads,), len(heads))
        self.add(f"{prefix}attn_k_b.weight", heads.square().sum(0), count)

    def experts(self, name: str, module: RoutedExperts) -> None:
        """Watch what each expert reads: the tokens sent to it, and its own inner features."""
        config = self.model.config
        gate, up = gguf_names(config, f"{name}.gate_up_proj")
        [down] = gguf_names(config, f"{name}.down_proj")

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, indices = self.rows(inputs[0]), inputs[1][self.real]
            count = torch.bincount(indices.flatten(), minlength=config.n_routed_experts)
            read, inner = (torch.zeros(len(count), width) for width in (x.shape[-1], config.moe_intermediate_size))
            for expert in count.nonzero().flatten().tolist():
                own = x[(indices == expert).any(1)]
                one, other = F.linear(own, module.gate_up_proj[expert].float()).chunk(2, -1)
                read[expert], inner[expert] = own.square().sum(0), (F.silu(one) * other).square().sum(0)
            self.add(gate, read, count)
            self.add(up, read, count)
            self.add(down, inner, count)

        module.register_forward_hook(hook)


@torch.no_grad()
def importance_matrix(
    model: Transformer, batches: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, NDArray[np.float32]]:
    """Name of a tensor in the file -> [matrices, features]; an expert that no token reached has zeros.

    Args:
        model: on the CPU, a module for evaluation; it is watched while this runs.
        batches: tokens, ids of documents and whether a token is no padding, each [rows, seq].
    """
    sums, config = _Sums(model), model.config
    before = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    try:
        for name, module in model.named_modules():
            if name.startswith("mtp.") and int(name.split(".")[1] if "." in name else 0) >= mtp_modules(config):
                continue
            if isinstance(module, RoutedExperts):
                sums.experts(name, module)
            elif isinstance(module, Linear) and not isinstance(module, Head):
                sums.linear(name, module)
        for tokens, documents, real in batches:
            sums.real = real.flatten()
            rotation, mask = model.context(documents, tokens.shape[1])
            embedded, ahead = model.embed(tokens)
            hidden = model.norm(model.run_layers(embedded, rotation, mask))
            if ahead is not None and mtp_modules(config):
                model.predict_ahead(hidden, ahead, documents, real)
    finally:
        for name, module in model.named_modules():
            module._forward_hooks.clear()
            module._forward_hooks.update(before[name])
    return {
        name: (squares / sums.counts[name].clamp(min=1).unsqueeze(1)).float().numpy()
        for name, squares in sums.squares.items()
    }
