"""Any causal language model that transformers has a class for, asked through the interface of `models.Backend`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.generate.decode import Completion
from ray_pipeline.errors import first_line


class TransformersBackend:
    """Any causal language model that transformers has a class for."""

    def __init__(self, model: Any, pad_id: int):
        from transformers import GenerationConfig

        # The folder's own generation settings (a top_p, a repetition penalty) must not change what is measured.
        model.generation_config = GenerationConfig()
        self.model, self.pad_id = model.eval(), pad_id
        config = model.config
        self.context = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 1024))
        self.vocab_size = int(config.vocab_size)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seeds: list[int],
        eos_ids: frozenset[int],
    ) -> list[Completion]:  # fmt: skip
        """Padded on the left; drawn by the first seed of those that are written together."""
        # A prompt that leaves less room than was asked for is written alone, so that it shortens no other answer.
        room = [self.context - len(p) for p in prompts]
        groups = [[i] for i in range(len(prompts)) if room[i] < max_new_tokens]
        roomy = [i for i in range(len(prompts)) if room[i] >= max_new_tokens]
        out: dict[int, Completion] = {}
        for group in [*groups, roomy] if roomy else groups:
            limit = min(max_new_tokens, room[group[0]])
            drawing = _drawing(temperature, seeds[group[0]])
            out |= zip(group, self._write([prompts[i] for i in group], limit, eos_ids, drawing), strict=True)
        return [out[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def stream(
        self, prompt: list[int], on_token: Callable[[int], None], *, max_new_tokens: int, temperature: float, seed: int,
        eos_ids: frozenset[int],
    ) -> Completion:  # fmt: skip
        """As `Backend.stream`."""
        drawing = _drawing(temperature, seed) | {"streamer": _Streamer(on_token)}
        [written] = self._write([prompt], min(max_new_tokens, self.context - len(prompt)), eos_ids, drawing)
        return written

    def _write(
        self, prompts: list[list[int]], limit: int, eos_ids: frozenset[int], drawing: dict[str, Any]
    ) -> list[Completion]:
        longest = max(len(p) for p in prompts)
        ids = torch.tensor([[self.pad_id] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=limit, eos_token_id=sorted(eos_ids), pad_token_id=self.pad_id,
            **drawing,
        )  # fmt: skip
        return [_cut(p, row, eos_ids) for p, row in zip(prompts, out[:, longest:].tolist(), strict=True)]

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """As `Backend.logits`."""
        return self.model(tokens).logits


def _drawing(temperature: float, seed: int) -> dict[str, Any]:
    """How transformers chooses tokens; it draws from torch's own generator, which is set to begin at `seed`."""
    if not temperature:
        return {"do_sample": False}
    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


class _Streamer:
    """What transformers hands tokens to as they are made: first the prompt, then one token at a time."""

    def __init__(self, on_token: Callable[[int], None]):
        self.on_token, self._prompt = on_token, True

    def put(self, value: Tensor) -> None:
        """Tokens of one row."""
        if not self._prompt:
            for token in value.flatten().tolist():
                self.on_token(token)
        self._prompt = False

    def end(self) -> None:
        """Nothing is held back."""


def _cut(prompt: list[int], tokens: list[int], eos_ids: frozenset[int]) -> Completion:
    """A row of a finished batch up to its end token; behind that there is padding."""
    end = next((i for i, token in enumerate(tokens) if token in eos_ids), None)
    return Completion(prompt, tokens if end is None else tokens[: end + 1], [], finished=end is not None)


def load_causal_lm(folder: Path, dtype: torch.dtype | str) -> Any:
    """A causal language model that transformers runs, from safetensors alone: a pickle can run any program.

    Raises:
        ValueError: transformers has no class for it, or cannot read it.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    except Exception as error:  # noqa: BLE001  a stranger's config.json makes transformers raise anything
        raise ValueError(f"{folder}: transformers cannot load it ({first_line(error):.200})") from None
