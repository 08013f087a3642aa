"""Continuous batching: rows of a batch that are refilled as answers end. Knows no text, no threads, no HTTP.

Each answer is what `model.generate.decode.generate` gives for its prompt, settings and seed, whatever is beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.generate.cache import KVCache
from model.generate.decoder import Decoder
from model.generate.sampler import Sampling, distributions, draw, draw_uniforms
from model.generate.transcript import distinct_prompts

SPARE_COLUMNS = 128  # room that a new cache has behind its longest row, so that it is not copied at every step


@dataclass(frozen=True)
class Written:
    """A token of an answer.

    Attributes:
        logprob: the model's own, at temperature 1, nats; 0 where no log-probabilities were asked for.
        likeliest: so many as were asked for, with theirs, best first.
    """

    token: int
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class SlotRequest:
    """A prompt and how it is to be continued.

    Attributes:
        limit: most tokens of the answer. top: how many of the likeliest tokens are reported; None for no
            log-probabilities at all.
        take: called with each token as it is written; returns whether the answer goes on.
    """

    prompt: list[int]
    limit: int
    sampling: Sampling
    seed: int
    take: Callable[[Written], bool]
    top: int | None = None


class _Row:
    """A request in a slot: how far it is, and the random numbers it draws by."""

    def __init__(self, request: SlotRequest):
        self.request, self.count = request, 0
        drawn = request.sampling.temperature > 0
        self.uniforms = draw_uniforms([request.seed], request.limit)[0] if drawn else None
        self.seen = set(request.prompt) if request.sampling.repetition_penalty != 1 else set()


class Slots:
    """At most `most` requests written together."""

    def __init__(self, decoder: Decoder, most: int):
        self.decoder, self.most = decoder, most
        self._rows: list[_Row] = []
        self._cache: KVCache | None = None
        self._logits: Tensor | None = None  # [rows, vocab_size], of the next token of each row

    @property
    def free(self) -> int:
        """Requests that could be added."""
        return self.most - len(self._rows)

    @property
    def used(self) -> int:
        """Requests being written."""
        return len(self._rows)

    def clear(self) -> list[SlotRequest]:
        """Forget every request; those that were being written."""
        dropped = [row.request for row in self._rows]
        self._rows, self._cache, self._logits = [], None, None
        return dropped

    @torch.inference_mode()
    def add(self, requests: Sequence[SlotRequest]) -> None:
        """Run the prompts of at most `free` requests and give each a row."""
        assert len(requests) <= self.free
        prompts, which = distinct_prompts([r.prompt for r in requests])
        logits, cache = self.decoder.prefill(prompts, 0 if self._rows else SPARE_COLUMNS)
        if len(prompts) < len(which):
            rows = torch.tensor(which, device=self.decoder.device)
            logits, cache = logits[rows], cache.select(rows, SPARE_COLUMNS)
        if self._cache is not None and self._logits is not None:
            every = torch.arange(len(self._rows), device=self.decoder.device)
            cache = self._cache.joined(every, cache, SPARE_COLUMNS)
            logits = torch.cat([self._logits, logits])
        self._rows += [_Row(request) for request in requests]
        self._cache, self._logits = cache, logits

    @torch.inference_mode()
    def step(self) -> None:
        """Write one token of every request; rows whose answer ended are free afterwards."""
        if self._cache is None or self._logits is None:
            return
        tokens = self._choose(self._logits)
        logprobs = self._reported(self._logits, tokens)
        going = []
        for i, (row, token) in enumerate(zip(self._rows, tokens.tolist(), strict=True)):
            row.count += 1
            if row.request.sampling.repetition_penalty != 1:
                row.seen.add(token)
            goes_on = row.request.take(logprobs.get(i, Written(token)))
            if goes_on and row.count < row.request.limit:
                going.append(i)
        if not going:
            self.clear()
            return
        if len(going) < len(self._rows) or self._cache.length == self._cache.layers[0].shape[1]:
            rows = torch.tensor(going, device=self.decoder.device)
            self._rows, tokens = [self._rows[i] for i in going], tokens[rows]
            self._cache = self._cache.select(rows, SPARE_COLUMNS)
        self._logits = self.decoder.step(tokens, self._cache)

    def _choose(self, logits: Tensor) -> Tensor:
        """The next token of each row: [rows]. Rows of equal settings are chosen together."""
        groups: dict[Sampling, list[int]] = {}
        for i, row in enumerate(self._rows):
            groups.setdefault(row.request.sampling, []).append(i)
        tokens = torch.zeros(len(self._rows), dtype=torch.long, device=logits.device)
        for sampling, members in groups.items():
            which = torch.tensor(members, device=logits.device)
            seen = self._seen(members, logits) if sampling.repetition_penalty != 1 else None
            _, kept = distributions(logits[which], sampling, seen)
            tokens[which] = draw(kept, self._uniforms(members, logits.device))
        return tokens

    def _uniforms(self, members: list[int], device: torch.device) -> Tensor | None:
        rows = [self._rows[i] for i in members]
        numbers = [row.uniforms[row.count] for row in rows if row.uniforms is not None]
        return torch.stack(numbers).to(device) if numbers else None

    def _seen(self, members: list[int], logits: Tensor) -> Tensor:
        seen = torch.zeros(len(members), logits.shape[1], dtype=torch.bool, device=logits.device)
        for line, i in zip(seen, members, strict=True):
            line[torch.tensor(sorted(self._rows[i].seen), device=logits.device)] = True
        return seen

    def _reported(self, logits: Tensor, tokens: Tensor) -> dict[int, Written]:
        """Tokens with log-probabilities, of the rows that asked for them."""
        out = {}
        for i, row in enumerate(self._rows):
            top = row.request.top
            if top is None:
                continue
            logprobs = torch.log_softmax(logits[i].float(), -1)
            best = logprobs.topk(min(top, len(logprobs)))
            likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            token = int(tokens[i])
            out[i] = Written(token, float(logprobs[token]), likeliest)
        return out
