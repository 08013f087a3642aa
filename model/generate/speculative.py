"""Speculative decoding: MTP modules propose tokens, one pass of the model verifies them all.

The modules are drafts as in DeepSeek-V3 (arXiv:2412.19437, §2.2 and §5.4.3): module k proposes the token k + 1 places
ahead. What is kept follows arXiv:2211.17192, so that answers have the model's own distribution. Rows of a batch accept
different numbers of tokens; the caches are then moved so that all rows end in the same column again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.generate.cache import KVCache
from model.generate.decoder import Decoder
from model.generate.drafter import Drafter, realign
from model.generate.extend import extend
from model.generate.routing_record import RoutingRecord, recording
from model.generate.sampler import draw, draw_uniforms, inverse_cdf
from model.generate.transcript import Completion, Request, Rules, Transcript, distinct_prompts

# Random numbers that one token of an answer may take.
DRAFT, ACCEPT, REPLACE = range(3)


def verify(target: Tensor, proposal: Tensor, tokens: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a proposed token with probability min(1, p / q), else draw from max(0, p - q) (arXiv:2211.17192, §2.3).

    Args:
        target, proposal: log-probabilities p of the model and q that the tokens were drawn from, [rows, vocab_size],
            not necessarily normalised.
        tokens: [rows]. uniforms: float64 [rows, 3].
    Returns:
        tokens [rows], distributed as `target`, and which of them are the proposed ones.
    """
    p, q = target.double().softmax(-1), proposal.double().softmax(-1)
    at = tokens.unsqueeze(1)
    kept = uniforms[:, ACCEPT] * q.gather(1, at).squeeze(1) < p.gather(1, at).squeeze(1)
    rest = (p - q).clamp(min=0)
    # p equal to q is never refused but by rounding; there is no rest then.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    return torch.where(kept, tokens, inverse_cdf(rest.log(), uniforms[:, REPLACE])), kept


class SpeculativeWave:
    """Requests decoded together, each at its own pace. Finished rows stay until half of the batch is done."""

    def __init__(self, decoder: Decoder, requests: list[Request], rules: Rules):
        self.decoder, self.requests, self.rules = decoder, requests, rules
        self.depth = decoder.config.num_nextn_predict_layers
        self.transcript = Transcript(requests, rules, decoder.config.vocab_size, decoder.device)
        longest = self.transcript.longest
        self.uniforms: Tensor | None = None
        if rules.sampling.temperature:
            drawn = draw_uniforms([r.seed for r in requests], 3 * longest).to(decoder.device)
            self.uniforms = drawn.view(-1, longest, 3)
        self.drafted, self.accepted = torch.zeros(2, len(requests), dtype=torch.long, device=decoder.device)

    @torch.inference_mode()
    def run(self) -> dict[int, Completion]:
        """Decode to the end: completions by request index."""
        wanted = self.rules.record_routing
        with recording(self.decoder, self.requests, wanted=wanted, ahead=self.depth + 1) as record:
            self._decode(record)
        out = self.transcript.completions()
        for request, drafted, accepted in zip(
            self.requests, self.drafted.tolist(), self.accepted.tolist(), strict=True
        ):
            out[request.index].drafted, out[request.index].accepted = drafted, accepted
        if record is not None:
            record.hand_over(out)
        return out

    def _decode(self, record: RoutingRecord | None) -> None:
        prompts, which = distinct_prompts([r.prompt for r in self.requests])
        batch = torch.arange(len(which), device=self.decoder.device)  # the request of each row of the batch
        capacity = self.transcript.longest + self.depth + 1
        drafter = Drafter(self.decoder, prompts, capacity)

        def watch(hidden: Tensor, part: slice) -> None:
            drafter.read(hidden, part)
            if record is not None:
                record.prefix(prompts, which, part)

        logits, cache = self.decoder.prefill(prompts, capacity, watch)
        prefix = torch.tensor(which, device=self.decoder.device)
        lengths = cache.positions[prefix]
        cache = realign(cache, prefix, lengths, 0)
        last, alive, _ = self._settle(batch, torch.ones_like(batch, dtype=torch.bool), logits[prefix], None, None)
        drafter.start(prefix, lengths, last)
        while bool(alive.any()):
            rows: Tensor | None = None
            if 2 * int(alive.sum()) <= len(batch):
                rows = alive.nonzero().squeeze(1)
                batch, alive, last, lengths = batch[rows], alive[rows], last[rows], lengths[rows]
            cache = realign(cache, rows, lengths, 0)
            drafter.realign(rows, lengths)
            first = cache.positions
            tokens, alive, settled, hidden = self._round(batch, alive, last, cache, drafter)
            if record is not None:
                # Drafts that were dropped are fed again in the next round, at the same positions.
                record.step(batch, first[:, None] + torch.arange(self.depth + 1, device=first.device))
            drafter.advance(hidden, tokens, settled)
            lengths = lengths + settled
            last = torch.where(settled > 0, tokens.gather(1, (settled - 1).clamp(min=0)[:, None])[:, 0], last)

    def _round(
        self, batch: Tensor, alive: Tensor, last: Tensor, cache: KVCache, drafter: Drafter
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draft and verify.

        Returns:
            The tokens behind the verified positions [rows, depth + 1], which rows go on, how many tokens each settled
            (none where it had ended), and the hidden states of the verified positions.
        """
        proposed, drawn_from = drafter.propose(self.transcript, batch, self._numbers(batch, self.depth, DRAFT))
        logits, hidden = extend(self.decoder, torch.cat([last[:, None], proposed], 1), cache)
        tokens = torch.cat([proposed, proposed[:, -1:]], 1)
        settled = torch.zeros_like(batch)
        open_ = alive
        for i in range(self.depth + 1):
            draft = (proposed[:, i], drawn_from[i]) if i < self.depth else (None, None)
            chosen, going, kept = self._settle(batch, open_, logits[:, i], *draft)
            tokens[:, i] = chosen
            settled += open_
            alive = torch.where(open_, going, alive)
            open_ = going & kept
            if not bool(open_.any()):
                break
        return tokens, alive, settled, hidden

    def _settle(
        self, batch: Tensor, open_: Tensor, logits: Tensor, proposed: Tensor | None, drawn_from: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write one more token in each open row: the tokens, which rows go on, and which took the proposed one."""
        logprobs, target, forced = self.transcript.distributions(logits, batch)
        numbers = self._numbers(batch, 1)
        kept = torch.zeros_like(open_)
        if proposed is None or drawn_from is None:
            tokens = draw(target, None if numbers is None else numbers[:, 0, REPLACE])
        elif numbers is None:
            tokens = draw(target, None)
            kept = tokens == proposed
        else:
            tokens, kept = verify(target, drawn_from, proposed, numbers[:, 0])
        if proposed is not None:
            self.drafted[batch] += open_
            self.accepted[batch] += open_ & kept
        return tokens, self.transcript.write(batch, tokens, logprobs, forced, open_), kept

    def _numbers(self, batch: Tensor, count: int, kind: int | None = None) -> Tensor | None:
        """Random numbers of the next `count` tokens of each row: [rows, count, 3], of one kind [rows, count].

        They belong to the token's place in the answer. A draft that is dropped had no influence on what was kept, so
        that its number may serve again.
        """
        if self.uniforms is None:
            return None
        at = self.transcript.lengths[batch, None] + torch.arange(count, device=batch.device)
        numbers = self.uniforms[batch[:, None], at.clamp(max=self.transcript.longest - 1)]
        return numbers if kind is None else numbers[:, :, kind]
