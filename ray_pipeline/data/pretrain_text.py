"""The pretraining documents of a mixture, and what becomes of them: a tokenizer, packed rows, and the counts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.config import DataConfig, PipelineFields
from ray_pipeline.data.cleaning import validation_members
from ray_pipeline.data.mixture import mixture_members
from ray_pipeline.data.packing import Row, pack_apart, pack_documents
from ray_pipeline.data.ray_prepare import Corpus, Progress, tokenise
from ray_pipeline.data.reading import Tally
from ray_pipeline.data.shards import write_rows
from ray_pipeline.data.sources import BUILTIN, check_vocabulary, figure_names, parse_source, read_documents
from ray_pipeline.data.text import document_at
from ray_pipeline.data.text_files import TextRule
from ray_pipeline.data.tokenizer import ChatTokenizer
from ray_pipeline.data.tokenizer_files import copy_pretrained, save_trained, train_bpe
from ray_pipeline.data.turns import Conversation
from ray_pipeline.errors import UserError

# More text than this does not change a small vocabulary.
TOKENIZER_CHARACTERS = 32_000_000


def mixture_documents(config: PipelineFields, tallies: dict[str, Tally]) -> Iterator[tuple[int, str]]:
    """(index of the source, text) of every document of the mixture, source after source.

    Args:
        tallies: gets what became of the records of each source that has any.
    """
    for number, source in enumerate(config.data.pretrain):
        texts: Iterable[str]
        if source.name == BUILTIN:
            count = min(config.data.builtin_documents, config.data.max_documents or config.data.builtin_documents)
            texts = (document_at(config.seed, index) for index in range(count))
        else:
            given, rule = parse_source(source.name), TextRule.of(config.data)
            tally = tallies[f"--data {source.name}"] = Tally.of(config.data, checked=given.kind == "file")
            texts = read_documents(given, config.data.max_documents, rule=rule, tally=tally)
        for text in texts:
            yield number, text


class Split:
    """Which documents of a corpus train and which validate.

    Attributes:
        train, validation: per document of the corpus.
    Raises:
        UserError: fewer than two documents.
    """

    def __init__(self, corpus: Corpus, data: DataConfig):
        if len(corpus) < 2:
            names = ", ".join(source.name for source in data.pretrain)
            raise UserError(
                f"--data {names}: {len(corpus)} documents are left of {corpus.read} (empty {corpus.empty}, duplicates "
                f"{corpus.duplicates}, holding evaluation questions {corpus.contaminated}), but at least 2 are needed, "
                "one to train and one to validate. Give more text."
            )
        weights = [source.weight for source in data.pretrain]
        members = mixture_members(corpus.sources, corpus.sizes, weights)
        chosen = [i for i, member in enumerate(members) if member]
        held = validation_members([corpus.digests[i] for i in chosen], data.validation_fraction)
        self.train, self.validation = [False] * len(corpus), [False] * len(corpus)
        for index, is_held in zip(chosen, held, strict=True):
            (self.validation if is_held else self.train)[index] = True


def make_tokenizer(
    config: PipelineFields, corpus: Corpus, split: Split, conversations: Iterable[Conversation], folder: Path
) -> ChatTokenizer:
    """Train on the training documents, or load, as the config says; the folder is written either way.

    With tool calls, `conversations` are learned from too: pretraining text has no JSON to spell calls with.
    """
    settings = config.tokenizer
    if settings.name != "train":
        return given_tokenizer(config, folder)
    texts = _up_to(itertools.compress(corpus.texts(), split.train), TOKENIZER_CHARACTERS)
    if settings.tools:
        written = (text for conversation in conversations for text in conversation.spelled())
        texts = itertools.chain(texts, _up_to(written, TOKENIZER_CHARACTERS))
    tokenizer = save_trained(train_bpe(texts, settings.vocab_size, tools=settings.tools), folder)
    check_vocabulary(len(tokenizer), config.model.vocab_size)
    return tokenizer


def given_tokenizer(config: PipelineFields, folder: Path) -> ChatTokenizer:
    """Load the tokenizer that the config names, and write it to the folder."""
    tokenizer = copy_pretrained(config.tokenizer.name, folder)
    check_vocabulary(len(tokenizer), config.model.vocab_size)
    return tokenizer


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


class PackedText:
    """Tokenises and packs a corpus into `folder/train` and `folder/validation`.

    Attributes:
        counts: [vocabulary], how often each token is a target of the training rows.
        datasets: for the manifest: rows, tokens, documents, bytes and sources of each split.
    """

    def __init__(self, config: PipelineFields, corpus: Corpus, split: Split, tokenizer: ChatTokenizer):
        self.config, self.corpus, self.split, self.tokenizer = config, corpus, split, tokenizer
        self.counts = np.zeros(len(tokenizer), np.int64)
        self.datasets: dict[str, dict[str, Any]] = {}
        self._validation: list[tuple[int, NDArray[np.uint32]]] = []
        self._tokens = 0

    def write(self, folder: Path, progress: Progress) -> PackedText:
        """One pass over the corpus; validation documents, a small share, wait in memory."""
        seq_len, pad_id = self.config.data.seq_len, self.tokenizer.pad_id
        self._write(folder, "train", pack_documents(self._train_documents(progress), seq_len, pad_id))
        self._tokens = sum(len(ids) for _, ids in self._validation)
        # Apart, so that the loss of each source can be told: at most one row more a source.
        held: Counter[int] = Counter()
        apart = pack_apart(sorted(self._validation, key=lambda document: document[0]), seq_len, pad_id, held)
        names = figure_names([source.name for source in self.config.data.pretrain])
        self._write(folder, "validation", apart, lambda: {names[source]: rows for source, rows in held.items()})
        return self

    def _train_documents(self, progress: Progress) -> Iterator[NDArray[np.uint32]]:
        bos, eos = [self.tokenizer.bos_id], [self.tokenizer.eos_id]
        wanted = [a or b for a, b in zip(self.split.train, self.split.validation, strict=True)]
        for index, ids in tokenise(self.corpus, self.tokenizer.to_json(), wanted, progress):
            document = np.concatenate([bos, ids, eos]).astype(np.uint32)
            if self.split.validation[index]:
                self._validation.append((self.corpus.sources[index], document))
                continue
            self._tokens += len(document)
            self.counts += np.bincount(document[1:], minlength=len(self.counts))
            yield document

    def _write(
        self, folder: Path, name: str, packed: Iterable[Row], sources: Callable[[], Mapping[str, int]] = dict
    ) -> None:
        rows = write_rows(
            folder / name,
            packed,
            seq_len=self.config.data.seq_len,
            vocab_size=len(self.tokenizer),
            tokens_per_shard=self.config.data.tokens_per_shard,
            sources=sources,
        )
        members = self.split.train if name == "train" else self.split.validation
        self.datasets[f"{folder.name}/{name}"] = {
            "rows": rows.rows,
            "tokens": self._tokens,
            "targets": rows.targets,
            "documents": sum(members),
            "bytes": sum(itertools.compress(self.corpus.sizes, members)),
            "sources": [
                {
                    "name": source.name,
                    "licence": source.licence,
                    "weight": source.weight,
                    "documents": list(itertools.compress(self.corpus.sources, members)).count(number),
                }
                for number, source in enumerate(self.config.data.pretrain)
            ],
        }
