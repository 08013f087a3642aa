"""Random numbers of training that belong to a row of a batch: the same in every layout and after a resume.

A batch brings a seed per row (`extras.row_seed`), so that whoever computes a part of a row, in whatever
micro-batch, draws what one process would. Batches of evaluation bring none.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from ray_pipeline.data.rows.batch import Batch, required


def seed_rows(batch: Batch, seed: int, step: int) -> Batch:
    """The batch with a seed of its own for every row: `row_seed`, int64 [rows, seq], the same along a row."""
    first = batch.start or 0
    rows = range(first, first + len(batch))
    digests = (hashlib.sha256(f"rows/{seed}/{step}/{row}".encode()).digest() for row in rows)
    seeds = torch.tensor([int.from_bytes(digest[:8], "little") >> 1 for digest in digests])
    return replace(batch, extras=replace(batch.extras, row_seed=seeds[:, None].repeat(1, batch.tokens.shape[1])))


def row_generators(seeds: Tensor, name: str) -> list[torch.Generator]:
    """A generator for each row, on the device of `seeds` [rows, seq]; another one for every `name`."""
    out = []
    for seed in seeds[:, 0].tolist():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        out.append(torch.Generator(seeds.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1))
    return out


def disturb_embeddings(batch: Batch, alpha: float, hidden_size: int) -> Batch:
    """Ask for noise on the embeddings (NEFTune, arXiv:2310.05914, algorithm 1): `noise_scale`, fp32 [rows, seq].

    The scale is alpha / sqrt(L d). L is the length of the token's document, which is the sequence of the paper: packing
    changes nothing, and padding has no noise.
    """
    documents = batch.doc_ids
    counts = torch.zeros(len(batch), int(documents.max()) + 1, dtype=torch.long)
    counts.scatter_add_(1, documents, torch.ones_like(documents))
    scale = alpha / (counts.gather(1, documents).float() * hidden_size).sqrt()
    if batch.real is not None:
        scale = scale * batch.real
    return replace(batch, extras=replace(batch.extras, noise_scale=scale))


def embedding_noise(batch: Batch, hidden_size: int) -> Tensor | None:
    """Uniform in plus or minus `noise_scale`: [rows, seq, hidden_size] of whole rows; None for a batch without.

    MTP modules read the embeddings with the same noise: a token has one embedding in a step, wherever it is read.
    """
    if batch.extras.noise_scale is None:
        return None
    seq_len, seeds = batch.tokens.shape[1], required(batch.extras.row_seed)
    drawn = [
        torch.rand(seq_len, hidden_size, generator=generator, device=seeds.device)
        for generator in row_generators(seeds, "embedding")
    ]
    return torch.stack(drawn).mul_(2).sub_(1).mul_(batch.extras.noise_scale.unsqueeze(-1))
