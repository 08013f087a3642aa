"""Which GGML type each tensor of a GGUF file has: llama.cpp's own mixtures, for the tensors that deepseek archs have.

The choice is that of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp, so that a file is the one that its
`llama-quantize` would make of the fp32 one. Numbers and names alone: no tensor, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.convert.export_kinds import KINDS, GgufKind

# Weights that share scales; of all other types here each weight stands for itself.
BLOCKS = {
    "Q8_0": 32,
    "Q5_0": 32,
    "Q5_1": 32,
    "Q4_0": 32,
    "Q2_K": 256,
    "Q3_K": 256,
    "Q4_K": 256,
    "Q5_K": 256,
    "Q6_K": 256,
}
# Where rows do not divide into a type's blocks.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_SMALL = ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m")  # whose o_proj has more bits in models of eight experts


@dataclass
class Mixture:
    """Chooses types for one file.

    Attributes:
        layers: blocks in the file, MTP's counted. experts: routed ones of a layer.
        fallbacks: tensors that could not have their type -> (the type meant, the one they have).
    """

    kind: GgufKind
    layers: int
    experts: int
    fallbacks: dict[str, tuple[str, str]] = field(default_factory=dict)

    def type_of(self, name: str, shape: Sequence[int]) -> str:
        """GGML's name of the type of a tensor; norms, biases and the router stay F32."""
        if len(shape) < 2 or not name.endswith("weight") or "_norm.weight" in name or "ffn_gate_inp" in name:
            return "F32"
        wanted = self._wanted(name, shape[-1])
        found = wanted
        if shape[-1] % BLOCKS.get(found, 1):
            found = _FALLBACK.get(found, "F16")
        if shape[-1] % BLOCKS.get(found, 1):
            found = "F16"
        if found != wanted:
            self.fallbacks[name] = (wanted, found)
        return found

    def _wanted(self, name: str, columns: int) -> str:
        base, kind = KINDS[self.kind].stored, self.kind
        if not KINDS[kind].weighted:
            return base
        if name == "output.weight":
            return "Q8_0" if columns % BLOCKS[base] else "Q6_K"
        if "attn_k.weight" in name and self.experts == 8:
            return "Q8_0"
        if "attn_output" in name:
            if self.experts == 8:
                return "Q5_K" if kind in _SMALL else base
            return {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(kind, base)
        if "ffn_down" in name:
            return self._down(int(name.split(".")[1]))
        return base

    def _down(self, layer: int) -> str:
        """What leaves a feed-forward is the most sensitive: more bits in the first, the last and every third layer."""
        base, kind, eighth = KINDS[self.kind].stored, self.kind, self.layers // 8
        more = layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
        if kind == "q2_k":
            return "Q3_K"
        if kind == "q3_k_m":
            return "Q5_K" if layer < self.layers // 16 else "Q4_K"
        if kind in ("q4_k_m", "q5_k_m") and more:
            return "Q6_K"
        return "Q5_K" if kind == "q4_k_s" and layer < eighth else base
