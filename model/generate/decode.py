"""Batched generation: requests in, completions out. The arithmetic is in `decoder`, the drawing in `sampler`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.generate.cache import LatentCache
from model.generate.decoder import Decoder
from model.generate.sampler import choose, draw_uniforms

__all__ = ["Completion", "Decoder", "generate"]


@dataclass
class Completion:
    """What the model wrote.

    Attributes:
        tokens: the end token included, where there is one.
        logprobs: of each token at the sampling temperature, nats.
        finished: whether it ended with an end token rather than at a limit.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool


@dataclass(frozen=True)
class _Settings:
    eos: Tensor
    temperature: float
    top_k: int
    top_p: float
    on_token: Callable[[int, int], None] | None


def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_ids: set[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: list[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    max_batch: int = 256,
) -> list[Completion]:
    """Continue every prompt until an end token, `max_new_tokens`, or the end of the context.

    Args:
        prompts: token ids; equal prompts are run once.
        temperature: 0 is greedy. top_k: 0 for all. top_p: 1 for all.
        seeds: one per prompt; default: its index.
        on_token: called with (index of the prompt, token) for each token as it is made.
        max_batch: rows decoded together; more requests than that take turns, shortest prompts first.
    Returns:
        One completion per prompt, in the order given.
    Raises:
        ValueError: for an empty prompt, one that fills the context, or an impossible setting.
    """
    _check(decoder.config.max_position_embeddings, decoder.config.vocab_size, prompts)
    if max_new_tokens < 1 or max_batch < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, max_batch={max_batch}, temperature={temperature}, top_k={top_k}, "
            f"top_p={top_p}: the first two must be at least 1, temperature and top_k not negative, top_p in (0, 1]"
        )
    seeds = list(range(len(prompts))) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed per prompt")
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=decoder.device)
    settings = _Settings(eos, temperature, top_k, top_p, on_token)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    waves = -(-len(order) // max_batch)
    out: dict[int, Completion] = {}
    for wave in range(waves):
        # Waves of equal size: a small last one would cost as many steps as a full one.
        rows = order[wave * len(order) // waves : (wave + 1) * len(order) // waves]
        out.update(
            _Wave(decoder, rows, [prompts[i] for i in rows], [seeds[i] for i in rows], max_new_tokens, settings).run()
        )
    return [out[i] for i in range(len(prompts))]


def _check(context: int, vocab_size: int, prompts: list[list[int]]) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: give it at least the start token")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens: the context of {context} leaves no room for an answer"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {i} has token ids from {min(prompt)} to {max(prompt)}: the vocabulary has {vocab_size}"
            )


class _Wave:
    """Requests decoded together. Finished rows go on until half of the batch is done, then the batch is compacted."""

    def __init__(
        self,
        decoder: Decoder,
        ids: list[int],
        prompts: list[list[int]],
        seeds: list[int],
        max_new: int,
        settings: _Settings,
    ):
        self.decoder, self.ids, self.prompts, self.settings = decoder, ids, prompts, settings
        room = [min(max_new, decoder.config.max_position_embeddings - len(p)) for p in prompts]
        device = decoder.device
        self.max_new = max(room)
        self.limit = torch.tensor(room, device=device)
        self.uniforms = draw_uniforms(seeds, self.max_new).to(device) if settings.temperature else None
        self.tokens = torch.zeros(len(ids), self.max_new, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(len(ids), self.max_new, device=device)
        self.lengths = self.limit.clone()
        self.finished = torch.zeros(len(ids), dtype=torch.bool, device=device)

    @torch.inference_mode()
    def run(self) -> dict[int, Completion]:
        """Decode to the end: completions by request id."""
        logits, cache = self._prefill()
        batch = torch.arange(
            len(self.ids), device=self.decoder.device
        )  # which request each row of the batch belongs to
        alive = torch.ones_like(batch, dtype=torch.bool)
        for step in range(self.max_new):
            tokens = self._emit(step, logits, batch, alive)
            num_alive = int(alive.sum())
            if num_alive == 0:
                break
            if 2 * num_alive <= len(batch):
                rows = alive.nonzero().squeeze(1)
                batch, alive, tokens = batch[rows], alive[rows], tokens[rows]
                cache = cache.select(rows, self.max_new - step)
            logits = self.decoder.step(tokens, cache)
        return self._collect()

    def _prefill(self) -> tuple[Tensor, LatentCache]:
        """Each distinct prompt once: a GRPO group shares one."""
        distinct: dict[tuple[int, ...], int] = {}
        which = [distinct.setdefault(tuple(p), len(distinct)) for p in self.prompts]
        if len(distinct) == len(which):
            return self.decoder.prefill(self.prompts, self.max_new)
        logits, cache = self.decoder.prefill([list(p) for p in distinct], 0)
        rows = torch.tensor(which, device=self.decoder.device)
        return logits[rows], cache.select(rows, self.max_new)

    def _emit(self, step: int, logits: Tensor, batch: Tensor, alive: Tensor) -> Tensor:
        """Choose and record token number `step` of every row; rows that end here leave `alive`."""
        settings = self.settings
        uniforms = None if self.uniforms is None else self.uniforms[batch, step]
        tokens, logprobs = choose(
            logits, uniforms, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )
        # Rows that have ended still write here, behind their recorded length.
        self.tokens[batch, step], self.logprobs[batch, step] = tokens, logprobs
        if settings.on_token is not None:
            for row in alive.nonzero().squeeze(1).tolist():
                settings.on_token(self.ids[int(batch[row])], int(tokens[row]))
        ended = torch.isin(tokens, settings.eos) & alive
        self.lengths[batch[ended]] = step + 1
        self.finished[batch[ended]] = True
        alive &= ~ended & (self.limit[batch] > step + 1)
        return tokens

    def _collect(self) -> dict[int, Completion]:
        rows = zip(
            self.ids,
            self.tokens.tolist(),
            self.logprobs.tolist(),
            self.lengths.tolist(),
            self.finished.tolist(),
            strict=True,
        )
        return {i: Completion(tokens[:n], logprobs[:n], finished) for i, tokens, logprobs, n, finished in rows}
