"""Which experts every token of a batch of requests went to while it was decoded (`model.moe.replay` uses them again).

Knows nothing of how tokens are chosen: the caller says, after each run of the decoder, which tokens it was fed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.generate.decoder import Decoder
from model.generate.transcript import Completion, Request
from model.moe.replay import FREE, columns


class RoutingRecord:
    """Expert ids by request and position: int16 [requests, longest, columns], FREE where nothing was fed.

    Args:
        ahead: positions behind the end of an answer that may be fed too (drafts that are dropped).
    """

    def __init__(self, decoder: Decoder, requests: list[Request], ahead: int):
        config = decoder.config
        longest = max(len(r.prompt) for r in requests) + max(r.limit for r in requests) + ahead
        shape = (len(requests), longest, columns(config))
        self.requests, self.decoder = requests, decoder
        self.columns = torch.tensor(decoder.routing_columns, dtype=torch.long, device=decoder.device)
        self.ids = torch.full(shape, FREE, dtype=torch.int16, device=decoder.device)
        self._chosen: list[Tensor] = []  # since the last run: [tokens, k] of each routed layer, in order

    def take_note(self, router: nn.Module, arguments: Any, out: tuple[Tensor, Tensor]) -> None:
        """Forward hook of a router."""
        self._chosen.append(out[0].to(torch.int16))

    def _last_run(self) -> Tensor:
        """[tokens, columns] of what ran since it was last asked for, of the layers here."""
        chosen, self._chosen = torch.cat(self._chosen, 1), []
        return chosen

    def prefix(self, prompts: list[list[int]], which: list[int], part: slice) -> None:
        """`part` of the distinct prompts ran, right-aligned; `which` of them each request continues."""
        if not self._chosen:  # a pipeline rank whose layers are all dense
            return
        ran = self._last_run().unflatten(0, (len(prompts[part]), -1))  # [rows, longest prompt, columns]
        for request, distinct in enumerate(which):
            if part.start <= distinct < part.stop:
                length = len(prompts[distinct])
                self.ids[request][:length, self.columns] = ran[distinct - part.start, -length:]

    def step(self, batch: Tensor, positions: Tensor) -> None:
        """Tokens at `positions` [rows, n] of the requests `batch` [rows] ran, in place of what ran there before."""
        if self._chosen:
            place = batch[:, None, None], positions[:, :, None], self.columns
            self.ids[place] = self._last_run().view(*positions.shape, -1)

    def hand_over(self, completions: dict[int, Completion]) -> None:
        """Give every completion its part."""
        joined = self.decoder.joined_routing(self.ids).to("cpu", torch.int16)
        for request, ids in zip(self.requests, joined, strict=True):
            completion = completions[request.index]
            completion.routing = ids[: len(request.prompt) + len(completion.tokens) - 1].clone()


@contextmanager
def recording(
    decoder: Decoder, requests: list[Request], *, wanted: bool, ahead: int = 0
) -> Iterator[RoutingRecord | None]:
    """A record of what the decoder's layers choose within; None where none is wanted, or the model routes nothing."""
    if not wanted or columns(decoder.config) == 0:
        yield None
        return
    record = RoutingRecord(decoder, requests, ahead)
    routers = [layer.router for layer in decoder.layers if layer.router is not None]
    hooks = [router.register_forward_hook(record.take_note) for router in routers]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()
