"""Which layers of a built model compute in 8 bits."""

from __future__ import annotations

from model.layers.fp8 import fp8_grouped_linear, fp8_linear
from model.layers.linear import Linear
from model.moe.experts import RoutedExperts
from model.transformer import Block, Transformer


def use_fp8(model: Transformer) -> None:
    """Let attention's projections, feed-forwards and routed experts of every block compute in 8 bits.

    Embedding, head, router, norms, attention itself, MTP's joining projection and the indexer stay as they are
    (DeepSeek-V3, arXiv:2412.19437, §3.3.1).
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for name, module in ((name, module) for block in blocks for name, module in block.named_modules()):
        if isinstance(module, RoutedExperts):
            module.product = fp8_grouped_linear
        elif isinstance(module, Linear) and "indexer" not in name:
            module.product = fp8_linear
