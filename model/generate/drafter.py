"""Drafts for speculative decoding: the MTP modules (DeepSeek-V3, arXiv:2412.19437, §2.2) over a cache of their own.

Knows nothing of how drafts are verified.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.generate.cache import KVCache
from model.generate.decoder import Decoder
from model.generate.extend import Span, extend_layer
from model.generate.sampler import distributions, draw
from model.generate.transcript import Transcript
from model.mtp import MultiTokenPredictor


def realign(cache: KVCache, rows: Tensor | None, lengths: Tensor, lead: int) -> KVCache:
    """A cache in which all rows end in the same column, each after its first `lengths` tokens.

    Args:
        rows: [n] of the old cache; None for all as they are. lengths: [n]; what was written behind them is forgotten.
        lead: columns of padding to keep in front of the longest row.
    """
    length = int(lengths.max()) + lead
    padding = length - lengths
    if rows is None and torch.equal(padding, cache.padding):
        cache.length = length
        return cache
    rows = torch.arange(len(lengths), device=lengths.device) if rows is None else rows
    columns = torch.arange(length, device=lengths.device) - padding[:, None] + cache.padding[rows, None]
    columns = columns.clamp(min=0)  # in front of the text: any column will do, as long as it is finite
    layers = []
    for old in cache.layers:
        new = old.new_empty(len(rows), old.shape[1], old.shape[2])
        new[:, :length] = old[rows[:, None], columns]
        layers.append(new)
    return KVCache(layers, padding, length)


class Drafter:
    """The MTP modules over a cache of their own.

    Module k reads, at position t, the hidden state of the module before it (of the model for k = 1) and token t + k.
    Where that token was only a draft the entry is not final, so each round runs over the last few positions again.
    """

    def __init__(self, decoder: Decoder, prompts: list[list[int]], capacity: int):
        """Room for the prompts, which `read` is to be called with, and `capacity` columns behind the longest."""
        self.decoder, self.depth = decoder, decoder.config.num_nextn_predict_layers
        self.modules = [module for module in decoder.model.mtp if isinstance(module, MultiTokenPredictor)]
        # A round settles at most depth + 1 tokens, and module k's entries are final k positions before the last token.
        self.window = 2 * self.depth
        device, longest = decoder.device, max(len(p) for p in prompts)
        self._padding = torch.tensor([longest - len(p) for p in prompts], device=device)
        self._tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        # The window may begin before a short prompt does: that many columns of padding, zero so that they are finite.
        columns, dtype = self.window + longest + capacity, decoder.dtype
        widths = [layer.attention.width for layer in decoder.draft_layers]
        self.cache = KVCache.allocate(widths, self._padding + self.window, columns, dtype)
        for layer in self.cache.layers:
            layer[:, : self.window] = 0
        self.cache.length = self.window + longest
        # Of the model, at the last `window` positions of each row; and from `start` on, the tokens behind those.
        shape = (len(prompts), self.window, decoder.config.hidden_size)
        self.hidden = torch.zeros(shape, dtype=dtype, device=device)
        self.next = F.pad(self._tokens, (max(0, self.window - longest), 0))[:, -self.window :]

    def read(self, hidden: Tensor, part: slice) -> None:
        """Remember the prompts `part`, given the model's hidden states: [rows, longest, hidden_size]."""
        model, tokens, length = self.decoder.model, self._tokens[part], hidden.shape[1]
        doc_ids = (torch.arange(length, device=tokens.device) >= self._padding[part, None]).long()
        rotation, mask = model.context(doc_ids if bool(self._padding[part].any()) else None, length)
        self.hidden[part, -length:] = hidden[:, -self.window :]
        layers = zip(self.modules, self.decoder.draft_layers, self.cache.layers, strict=True)
        for k, (module, layer, cache) in enumerate(layers, start=1):
            ahead = F.pad(tokens, (0, k))[:, k:]  # what is not known yet is not final: `propose` writes it again
            x = module.join(hidden, self.decoder.embed(ahead))
            layer.attention.remember(layer.input_norm(x), rotation, cache[part, self.window : self.window + length])
            hidden = module.shared_head_norm(module.block(x, rotation, mask))

    def start(self, rows: Tensor, lengths: Tensor, first: Tensor) -> None:
        """Make a row for each request: the prompt it continues, that prompt's length and its first token, all [n]."""
        self.realign(rows, lengths)
        self.next = torch.cat([self.next[:, 1:], first[:, None]], 1)

    def propose(self, transcript: Transcript, batch: Tensor, uniforms: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Draft the next tokens of each row.

        Args:
            batch: [rows], the request of each row. uniforms: float64 [rows, depth], None for the likeliest.
        Returns:
            tokens [rows, depth], and for each of them the log-probabilities it was drawn from, [rows, vocab_size].
        """
        model, hidden, known = self.decoder.model, self.hidden, self.next
        span = Span.at(model.rotary, self.cache, self.cache.length - self.window, self.window)
        seen = None if transcript.seen is None else transcript.seen[batch]
        drawn_from = []
        layers = zip(self.modules, self.decoder.draft_layers, self.cache.layers, strict=True)
        for k, (module, layer, cache) in enumerate(layers):
            x = module.join(hidden, self.decoder.embed(known[:, k:]))
            hidden = module.shared_head_norm(extend_layer(layer, x, cache, span))
            _, kept = distributions(self.decoder.logits(hidden[:, -1]), transcript.rules.sampling, seen)
            token = draw(kept, None if uniforms is None else uniforms[:, k])
            known = torch.cat([known, token[:, None]], 1)
            drawn_from.append(kept)
        return known[:, self.window :], drawn_from

    def advance(self, hidden: Tensor, tokens: Tensor, settled: Tensor) -> None:
        """Take what a round found.

        Args:
            hidden: [rows, depth + 1, hidden_size] of the model at the positions it verified. tokens: [rows, depth + 1],
                the tokens behind them. settled: [rows], how many of them stay.
        """
        index = settled[:, None] + torch.arange(self.window, device=settled.device)
        states = torch.cat([self.hidden, hidden], 1)
        self.hidden = states.gather(1, index[:, :, None].expand(-1, -1, states.shape[2]))
        self.next = torch.cat([self.next, tokens], 1).gather(1, index)

    def realign(self, rows: Tensor | None, lengths: Tensor) -> None:
        """Keep `rows`, each with its first `lengths` tokens."""
        self.cache = realign(self.cache, rows, lengths, self.window)
        if rows is not None:
            self.hidden, self.next = self.hidden[rows], self.next[rows]
