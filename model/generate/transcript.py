"""What a batch of requests has written so far, and which of them have ended. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.generate.sampler import Sampling, distributions
from model.generate.stopping import StopStrings, StopWatch, ThinkBudget, ThinkWatch


@dataclass
class ToolUse:
    """What a completion did with tools: calls, those that a tool could take, and those that an error answered."""

    calls: int = 0
    valid: int = 0
    errors: int = 0


@dataclass
class Completion:
    """What was sampled after a prompt, as the tokens that were sampled: they are never tokenised again.

    Attributes:
        prompt: token ids. tokens: those behind it, the end token included, where there is one.
        logprobs: of each token at the sampling temperature, nats; of the model itself, before any penalty or cut.
        finished: whether it ended with an end token or a stop string rather than at a limit.
        forced: for each token, whether it was written for the model (a think budget that was spent, what a tool said).
            Nothing can be learned from such a choice. Empty for none.
        text: where stop strings were asked for, the text without the one that was met and what follows it.
        drafted, accepted: tokens that speculative decoding proposed, and how many of them were kept.
        routing: where it was asked for and the model routes, int16 [prompt + answer - 1, columns] (`model.moe.replay`):
            the experts of every token that was fed to the model, which is all but the last.
        tools: None where none were offered.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finished: bool
    forced: list[bool] = field(default_factory=list)
    text: str | None = None
    drafted: int = 0
    accepted: int = 0
    routing: Tensor | None = field(default=None, compare=False)
    tools: ToolUse | None = None


@dataclass(frozen=True)
class Request:
    """One prompt: its place among all of the call, its token ids and seed, and the most tokens it may get."""

    index: int
    prompt: list[int]
    seed: int
    limit: int


def distinct_prompts(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Each prompt once, and which of them every request continues: a GRPO group shares one."""
    distinct: dict[tuple[int, ...], int] = {}
    which = [distinct.setdefault(tuple(p), len(distinct)) for p in prompts]
    return [list(p) for p in distinct], which


@dataclass(frozen=True)
class Rules:
    """What holds for every request of a call: how tokens are chosen and what ends an answer.

    `on_token` is called with (index of the request, token) for each token as it is made; `record_routing` asks for
    `Completion.routing`.
    """

    sampling: Sampling
    eos_ids: frozenset[int]
    stop: StopStrings | None = None
    think: ThinkBudget | None = None
    on_token: Callable[[int, int], None] | None = None
    record_routing: bool = False


class Transcript:
    """Tensors by request; `which` below are rows of them, each at most once."""

    def __init__(self, requests: list[Request], rules: Rules, vocab_size: int, device: torch.device):
        self.requests, self.rules = requests, rules
        count = len(requests)
        self.longest = max(r.limit for r in requests)
        self.last = torch.tensor([r.limit - 1 for r in requests], device=device)  # column
        self.eos = torch.tensor(sorted(rules.eos_ids), dtype=torch.long, device=device)
        # One column more than needed, for what rows write that have ended.
        self.tokens = torch.zeros(count, self.longest + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(count, self.longest + 1, device=device)
        self.forced = torch.zeros(count, self.longest + 1, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.seen: Tensor | None = None
        if rules.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(count, vocab_size, dtype=torch.bool, device=device)
            for row, request in zip(self.seen, requests, strict=True):
                row[torch.tensor(request.prompt, device=device)] = True
        stop = rules.stop
        self.stops = None if stop is None else [StopWatch(stop.strings, stop.detokenize) for _ in requests]
        self.thinking = None if rules.think is None else [ThinkWatch(rules.think, r.prompt) for r in requests]

    def distributions(self, logits: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The model's log-probabilities, and those the next token is drawn from: both [rows, vocab_size].

        A token that has to come has all of the mass. The third result says where: bool [rows], None for nowhere.
        """
        logprobs, kept = distributions(logits, self.rules.sampling, None if self.seen is None else self.seen[which])
        if self.thinking is None:
            return logprobs, kept, None
        tokens = [self.thinking[i].forced for i in which.tolist()]
        forced = torch.tensor([t is not None for t in tokens], device=logits.device)
        if bool(forced.any()):
            certain = torch.full_like(kept, -torch.inf)
            certain.scatter_(1, torch.tensor([[t or 0] for t in tokens], device=logits.device), 0.0)
            kept = torch.where(forced[:, None], certain, kept)
        return logprobs, kept, forced

    def write(self, which: Tensor, tokens: Tensor, logprobs: Tensor, forced: Tensor | None, alive: Tensor) -> Tensor:
        """Append a token to each request of `which` that is `alive`.

        Args:
            which, tokens: [rows]; logprobs: [rows, vocab_size]; forced, alive: bool [rows].
        Returns:
            Those that go on: bool [rows].
        """
        at = self.lengths[which]  # rows that have ended write behind their end, where nobody reads
        self.tokens[which, at] = tokens
        self.logprobs[which, at] = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        if forced is not None:
            self.forced[which, at] = forced
        if self.seen is not None:
            self.seen[which, tokens] |= alive
        self.lengths[which] = at + alive
        ended = torch.isin(tokens, self.eos)
        if self.stops is not None or self.thinking is not None or self.rules.on_token is not None:
            ended |= self._follow(which, tokens, alive)
        return alive & ~ended & (at < self.last[which])

    def _follow(self, which: Tensor, tokens: Tensor, alive: Tensor) -> Tensor:
        """Tell everyone who listens; returns where a stop string was met: bool [rows]."""
        stopped = torch.zeros_like(alive)
        for row in alive.nonzero().squeeze(1).tolist():
            request, token = int(which[row]), int(tokens[row])
            if self.rules.on_token is not None:
                self.rules.on_token(self.requests[request].index, token)
            if self.thinking is not None:
                self.thinking[request].add(token)
            if self.stops is not None and token not in self.rules.eos_ids:  # the end token is no text
                stopped[row] = self.stops[request].add(token)
        return stopped

    def completions(self) -> dict[int, Completion]:
        """By index of the request."""
        lengths, tokens, logprobs = self.lengths.tolist(), self.tokens.tolist(), self.logprobs.tolist()
        forced, eos_ids = self.forced.tolist(), self.rules.eos_ids
        out = {}
        for i, (request, n) in enumerate(zip(self.requests, lengths, strict=True)):
            watch = None if self.stops is None else self.stops[i]
            finished = (n > 0 and tokens[i][n - 1] in eos_ids) or (watch is not None and watch.stopped is not None)
            text = None if watch is None else watch.finish()
            written = tokens[i][:n], logprobs[i][:n], finished, forced[i][:n], text
            out[request.index] = Completion(request.prompt, *written)
        return out
