"""A teacher's likeliest tokens on disk: for each position of SFT's training rows, k ids and their log-probabilities.

    folder/
      topk.json            {"k", "temperature", "rows", "seq_len", "vocab_sha256", "data_sha256"}
      00000.safetensors    ids [rows, seq_len, k] int32, logprobs [rows, seq_len, k] float32, likeliest first
      manifest.json        SHA-256 of every file

topk.json knows the rows it was made for (`data_sha256`: of their tokens, labels and documents) and the vocabulary its
ids belong to, so it is never read with other ones. Log-probabilities are those of the whole vocabulary at the
temperature, so that what the k leave out is known.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.data.rows.loader import PackedRows, row_order
from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import atomic_folder, read_json, write_json
from ray_pipeline.records.integrity import damage, refuse_foreign_folder
from ray_pipeline.settings.chain import TOP_K
from ray_pipeline.teachers.teacher_folder import vocabulary

DESCRIPTION = "topk.json"
ROWS_PER_FILE = 1024
ROWS_AT_ONCE = 8
WAY_OUT = "Write it again with `teacher-topk`."


@dataclass(frozen=True)
class TopKManifest:
    """What the files hold."""

    k: int
    temperature: float
    rows: int
    seq_len: int
    vocab_sha256: str
    data_sha256: str


def vocab_sha256(tokenizer: Path) -> str:
    """Of what each id means: equal for tokenizers whose ids can be compared."""
    return hashlib.sha256(json.dumps(sorted(vocabulary(tokenizer).items())).encode()).hexdigest()


def data_sha256(rows: PackedRows) -> str:
    """Of the rows' contents, in their stored order."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), ROWS_PER_FILE):
        batch = rows.slice(start, start + ROWS_PER_FILE)
        for values in (batch.tokens, batch.labels, batch.doc_ids):
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def read_manifest(folder: Path) -> TopKManifest:
    """The description, after the files were held against their digests.

    Raises:
        UserError: no such folder, no description, or a damaged file.
    """
    given = f"distillation.teacher={TOP_K}{folder}"
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{given}: there is no {DESCRIPTION} in it. {WAY_OUT}")
    if found := damage(folder):
        raise UserError(f"{given}: {found}. {WAY_OUT}")
    try:
        return TopKManifest(**read_json(folder / DESCRIPTION))
    except TypeError as error:
        raise UserError(f"{given}: {DESCRIPTION} is damaged ({error}). {WAY_OUT}") from None


class TopKRows:
    """SFT's training rows with the teacher's likeliest tokens as extras.

    Raises:
        UserError: the folder was made of other rows, with another tokenizer, or at another temperature.
    """

    def __init__(self, rows: PackedRows, tokenizer: Path, folder: Path, temperature: float):
        self.rows, self.folder, self.manifest = rows, folder, read_manifest(folder)
        made = self.manifest
        differing = {
            "conversations": made.data_sha256 != data_sha256(rows),
            "tokenizer": made.vocab_sha256 != vocab_sha256(tokenizer),
            f"temperature ({made.temperature}, not distillation.temperature={temperature})": made.temperature
            != temperature,
        }
        for what, differs in differing.items():
            if differs:
                raise UserError(f"distillation.teacher={TOP_K}{folder}: it was made with another {what}. {WAY_OUT}")

    def batch(self, seed: int, step: int, batch_size: int, part: slice = slice(None)) -> Batch:
        """The rows of one step, or a part of them; no others are read."""
        indices = row_order(len(self.rows), seed, step, batch_size, part)
        batch = self.rows.take(indices)
        found = [self._row(index) for index in indices]
        batch.extras.teacher_topk_ids = torch.stack([ids for ids, _ in found]).long()
        batch.extras.teacher_topk_logprobs = torch.stack([logprobs for _, logprobs in found])
        return batch

    def _row(self, index: int) -> tuple[Tensor, Tensor]:
        path, at = self.folder / _file_name(index // ROWS_PER_FILE), index % ROWS_PER_FILE
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice("ids")[at], file.get_slice("logprobs")[at]
        except SafetensorError as error:
            raise UserError(f"{path}: damaged ({error}). {WAY_OUT}") from None


def _file_name(number: int) -> str:
    return f"{number:05d}.safetensors"


def refuse_other_folder(folder: Path) -> None:
    """Refuse to write where anything but log-probabilities of an earlier call lies.

    Raises:
        UserError: naming what is there.
    """
    refuse_foreign_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file():
        raise UserError(
            f"{folder}: holds something that `teacher-topk` did not write (there is no {DESCRIPTION} in it), so it is "
            "not replaced. Give a new folder."
        )


@torch.no_grad()
def write_top_k(
    model: Transformer, rows: PackedRows, tokenizer: Path, folder: Path, *, k: int, temperature: float = 1.0
) -> TopKManifest:
    """Run the teacher over every row, and keep its k likeliest tokens at each position.

    Raises:
        ValueError: k is not within the vocabulary.
        UserError: another thing is at `folder`.
    """
    refuse_other_folder(folder)
    if not 1 <= k <= model.config.vocab_size:
        raise ValueError(f"k={k}: must be within 1..{model.config.vocab_size}, the vocabulary")
    device = next(model.parameters()).device
    made = TopKManifest(k, temperature, len(rows), rows.seq_len, vocab_sha256(tokenizer), data_sha256(rows))
    with atomic_folder(folder) as aside:
        for start in range(0, len(rows), ROWS_PER_FILE):
            parts = []
            for at in range(start, min(start + ROWS_PER_FILE, len(rows)), ROWS_AT_ONCE):
                batch = rows.slice(at, min(at + ROWS_AT_ONCE, start + ROWS_PER_FILE)).to(device)
                logits = model(batch.tokens, batch.doc_ids).float() / temperature
                parts.append(logits.log_softmax(-1).topk(k))
            tensors = {
                "ids": torch.cat([part.indices for part in parts]).int().cpu(),
                "logprobs": torch.cat([part.values for part in parts]).cpu(),
            }
            save_file(tensors, aside / _file_name(start // ROWS_PER_FILE))
        write_json(aside / DESCRIPTION, asdict(made))
    return made
