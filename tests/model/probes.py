"""What holds for any model of whole rows, whatever its weights: shared by the tests of several architectures."""

from __future__ import annotations

import torch

from model.transformer import Transformer


@torch.no_grad()
def assert_causal(model: Transformer, tokens: torch.Tensor, place: int, *, packed: bool) -> None:
    """Another token at `place` of one row changes the logits there and later ones alone."""
    doc_ids = (torch.arange(tokens.shape[1])[None] >= 20).long() if packed else None
    changed = tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % model.config.vocab_size
    before, after = model(tokens, doc_ids), model(changed, doc_ids)
    torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-5)
    assert (after[:, place] - before[:, place]).abs().max() > 1e-3


@torch.no_grad()
def assert_packed_equals_alone(model: Transformer, tokens: torch.Tensor, cuts: list[int]) -> None:
    """One row cut into documents at `cuts` gives each the logits it has in a row of its own."""
    length = tokens.shape[1]
    doc_ids = sum((torch.arange(length) >= cut).long() for cut in cuts)[None]
    packed = model(tokens, doc_ids)
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        torch.testing.assert_close(packed[:, start:stop], model(tokens[:, start:stop]), rtol=0, atol=2e-5)
