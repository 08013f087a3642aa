"""Beam search: the likeliest answers found by following the `num_beams` likeliest beginnings side by side.

The rules are those of Hugging Face's `generate(num_beams=...)` with its default early stopping, so that results can be
compared; without a length penalty and with beams for every beginning, it is an exhaustive search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.generate.cache import KVCache
from model.generate.decode import Completion, check_prompts
from model.generate.decoder import Decoder
from model.generate.sampler import check_finite


@dataclass(frozen=True)
class Hypothesis:
    """An answer and what decides its rank: the sum of its tokens' log-probabilities over length ** length_penalty."""

    completion: Completion
    score: float


def beam_search(
    decoder: Decoder,
    prompts: list[list[int]],
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_ids: set[int],
    length_penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """The `num_beams` best answers to each prompt, best first; fewer where there are not so many.

    Args:
        length_penalty: 0 compares sums of log-probabilities, 1 their means; above 1 favours long answers.
    Raises:
        ValueError: for an empty prompt, one that fills the context, or an impossible setting.
    """
    config = decoder.config
    check_prompts(config.max_position_embeddings, config.vocab_size, prompts)
    if num_beams < 1 or max_new_tokens < 1:
        raise ValueError(f"num_beams={num_beams}, max_new_tokens={max_new_tokens}: both must be at least 1")
    kept = _candidates(num_beams, eos_ids)
    if kept > num_beams * config.vocab_size:
        raise ValueError(
            f"num_beams={num_beams} keeps {kept} candidates with {len(eos_ids)} end tokens: a vocabulary of "
            f"{config.vocab_size} does not have so many; give fewer end tokens"
        )
    room = [min(max_new_tokens, config.max_position_embeddings - len(p)) for p in prompts]
    return [
        _Search(decoder, prompt, num_beams, limit, eos_ids, length_penalty).run()
        for prompt, limit in zip(prompts, room, strict=True)
    ]


def _candidates(num_beams: int, eos_ids: set[int]) -> int:
    """Continuations looked at in each step: enough that `num_beams` of them do not end."""
    return max(2, 1 + len(eos_ids)) * num_beams


class _Search:
    """One prompt; its beams are the rows of a batch."""

    def __init__(
        self, decoder: Decoder, prompt: list[int], num_beams: int, limit: int, eos_ids: set[int], length_penalty: float
    ):
        self.decoder, self.prompt, self.num_beams, self.limit = decoder, prompt, num_beams, limit
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=decoder.device)
        self.candidates = _candidates(num_beams, eos_ids)
        self.length_penalty = length_penalty
        self.found: list[Hypothesis] = []

    @torch.inference_mode()
    def run(self) -> list[Hypothesis]:
        """Search until nothing better can come."""
        logits, prefix = self.decoder.prefill([self.prompt], 0)
        # All beams begin with the same prompt: only the first may branch, or all would find the same.
        scores = torch.full((self.num_beams,), -torch.inf, device=logits.device)
        scores[0] = 0.0
        rows = torch.zeros(self.num_beams, dtype=torch.long, device=logits.device)
        cache: KVCache = prefix.select(rows, self.limit)
        logits = logits[rows]
        tokens = torch.zeros(self.num_beams, 0, dtype=torch.long, device=logits.device)
        logprobs = torch.zeros(self.num_beams, 0, device=logits.device)
        for length in range(1, self.limit + 1):
            step = torch.log_softmax(logits.float(), -1)
            check_finite(logits, step)
            best = (scores[:, None] + step).flatten().topk(self.candidates)
            beam, token = best.indices // step.shape[1], best.indices % step.shape[1]
            written = torch.cat([tokens[beam], token[:, None]], 1)
            spoken = torch.cat([logprobs[beam], step[beam, token][:, None]], 1)
            ended = torch.isin(token, self.eos)
            # One that ends takes a place only if it is among the best `num_beams`; the others are there in reserve.
            stops = ended | (length == self.limit)
            self._collect(written, spoken, best.values, stops, ended)
            running = (~ended).nonzero().squeeze(1)[: self.num_beams]
            scores, tokens, logprobs = best.values[running], written[running], spoken[running]
            if length == self.limit or not self._can_improve(float(scores[0]), length):
                break
            if not torch.equal(beam[running], torch.arange(self.num_beams, device=beam.device)):
                cache = cache.select(beam[running], self.limit - length + 1)
            logits = self.decoder.step(tokens[:, -1], cache)
        return self.found

    def _collect(self, tokens: Tensor, logprobs: Tensor, sums: Tensor, stops: Tensor, ended: Tensor) -> None:
        """Enter finished answers among the first `num_beams` candidates, and keep the best of all found so far."""
        scale = tokens.shape[1] ** self.length_penalty
        for i in stops[: self.num_beams].nonzero().squeeze(1).tolist():
            if sums[i] > -torch.inf:
                done = Completion(self.prompt, tokens[i].tolist(), logprobs[i].tolist(), bool(ended[i]))
                self.found.append(Hypothesis(done, float(sums[i]) / scale))
        self.found = sorted(self.found, key=lambda h: -h.score)[: self.num_beams]

    def _can_improve(self, best_running: float, length: int) -> bool:
        """Whether the best beam, as it stands, would still enter the list."""
        if len(self.found) < self.num_beams:
            return True
        return best_running / length**self.length_penalty > self.found[-1].score
