"""Batched generation: requests in, completions out.

The arithmetic is in `decoder`, the drawing in `sampler`, what ends an answer in `stopping`, the record in `transcript`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.generate.cache import KVCache
from model.generate.decoder import Decoder
from model.generate.routing_record import RoutingRecord, recording
from model.generate.sampler import Sampling, draw, draw_uniforms
from model.generate.speculative import SpeculativeWave
from model.generate.stopping import StopStrings, ThinkBudget
from model.generate.transcript import Completion, Request, Rules, ToolUse, Transcript, distinct_prompts

__all__ = ["Completion", "Decoder", "ToolUse", "check_prompts", "generate"]


def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    *,
    max_new_tokens: int | Sequence[int],
    eos_ids: set[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: StopStrings | None = None,
    think: ThinkBudget | None = None,
    speculative: bool = False,
    seeds: list[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    record_routing: bool = False,
    max_batch: int = 256,
) -> list[Completion]:
    """Continue every prompt until an end token, a stop string, `max_new_tokens`, or the end of the context.

    Args:
        prompts: token ids; equal prompts are run once.
        max_new_tokens: of every answer, or of each.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
        speculative: let the MTP modules propose tokens. Greedy answers stay the same (but where two tokens are equally
            likely to the last digit); sampled ones are other draws from the same distribution.
        seeds: one per prompt; default: its index.
        on_token: called with (index of the prompt, token) for each token as it is made.
        record_routing: note which experts every token went to, for training to use them again.
        max_batch: rows decoded together; more requests than that take turns, shortest prompts first.
    Returns:
        One completion per prompt, in the order given.
    Raises:
        ValueError: for an empty prompt, one that fills the context, or an impossible setting.
    """
    config = decoder.config
    check_prompts(config.max_position_embeddings, config.vocab_size, prompts)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts):
        raise ValueError(f"{len(limits)} limits of max_new_tokens for {len(prompts)} prompts: give one for each")
    if min(limits, default=1) < 1 or max_batch < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}, max_batch={max_batch}: both must be at least 1")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    seeds = list(range(len(prompts))) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed per prompt")
    if think is not None:
        _check_think(config.vocab_size, think)
    if speculative and not config.num_nextn_predict_layers:
        raise ValueError(
            "speculative decoding with num_nextn_predict_layers=0: the model has no MTP module to propose tokens; "
            "decode it without"
        )
    rules = Rules(sampling, frozenset(eos_ids), stop, think, on_token, record_routing)
    room = [min(n, config.max_position_embeddings - len(p)) for n, p in zip(limits, prompts, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    waves = -(-len(order) // max_batch)
    out: dict[int, Completion] = {}
    for wave in range(waves):
        # Waves of equal size: a small last one would cost as many steps as a full one.
        rows = order[wave * len(order) // waves : (wave + 1) * len(order) // waves]
        requests = [Request(i, prompts[i], seeds[i], room[i]) for i in rows]
        run = SpeculativeWave(decoder, requests, rules).run if speculative else _Wave(decoder, requests, rules).run
        out.update(run())
    return [out[i] for i in range(len(prompts))]


def check_prompts(context: int, vocab_size: int, prompts: list[list[int]]) -> None:
    """Refuse prompts that cannot be continued.

    Raises:
        ValueError: naming the prompt.
    """
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


def _check_think(vocab_size: int, think: ThinkBudget) -> None:
    marks = [*think.opening, *think.closing]
    if not 0 <= min(marks) <= max(marks) < vocab_size:
        raise ValueError(
            f"think budget with opening={think.opening}, closing={think.closing}: the vocabulary has {vocab_size} "
            "tokens; give the ids of this model's tokenizer"
        )


class _Wave:
    """Requests decoded together. Finished rows go on until half of the batch is done, then the batch is compacted."""

    def __init__(self, decoder: Decoder, requests: list[Request], rules: Rules):
        self.decoder, self.requests, self.rules = decoder, requests, rules
        self.transcript = Transcript(requests, rules, decoder.config.vocab_size, decoder.device)
        self.max_new = self.transcript.longest
        self.uniforms: Tensor | None = None
        if rules.sampling.temperature:
            self.uniforms = draw_uniforms([r.seed for r in requests], self.max_new).to(decoder.device)

    @torch.inference_mode()
    def run(self) -> dict[int, Completion]:
        """Decode to the end: completions by request index."""
        with recording(self.decoder, self.requests, wanted=self.rules.record_routing) as record:
            self._decode(record)
        out = self.transcript.completions()
        if record is not None:
            record.hand_over(out)
        return out

    def _decode(self, record: RoutingRecord | None) -> None:
        logits, cache = self._prefill(record)
        batch = torch.arange(len(self.requests), device=self.decoder.device)  # the request of each row of the batch
        alive = torch.ones_like(batch, dtype=torch.bool)
        for step in range(self.max_new):
            logprobs, kept, forced = self.transcript.distributions(logits, batch)
            tokens = draw(kept, None if self.uniforms is None else self.uniforms[batch, step])
            alive = self.transcript.write(batch, tokens, logprobs, forced, alive)
            num_alive = int(alive.sum())
            if num_alive == 0:
                break
            if 2 * num_alive <= len(batch):
                rows = alive.nonzero().squeeze(1)
                batch, alive, tokens = batch[rows], alive[rows], tokens[rows]
                cache = cache.select(rows, self.max_new - step)
            logits = self.decoder.step(tokens, cache)
            if record is not None:
                record.step(batch, cache.positions.unsqueeze(1) - 1)

    def _prefill(self, record: RoutingRecord | None) -> tuple[Tensor, KVCache]:
        """Each distinct prompt once."""
        prompts, which = distinct_prompts([r.prompt for r in self.requests])
        watch = None if record is None else lambda hidden, part: record.prefix(prompts, which, part)
        if len(prompts) == len(which):
            return self.decoder.prefill(prompts, self.max_new, watch)
        logits, cache = self.decoder.prefill(prompts, 0, watch)
        rows = torch.tensor(which, device=self.decoder.device)
        return logits[rows], cache.select(rows, self.max_new)
