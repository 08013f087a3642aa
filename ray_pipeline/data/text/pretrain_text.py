"""The pretraining documents of a mixture, and what becomes of them: clean blocks, a choice, a tokenizer.

Memory does not grow with the corpus: documents stream from the sources through worker processes into blocks on disk,
and from there, block after block, to the tokenizer. `text_rows` packs what was chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.chat.tokenizer_files import copy_pretrained, save_trained, train_bpe
from ray_pipeline.data.files.local_files import OnRead
from ray_pipeline.data.files.reading import Tally
from ray_pipeline.data.files.text_files import TextRule
from ray_pipeline.data.forms.turns import Conversation
from ray_pipeline.data.shared.decontaminate import Decontaminator
from ray_pipeline.data.sources.sources import (
    BUILTIN,
    BUILTIN_DIALOGUES,
    TEXT_BUILTIN,
    check_vocabulary,
    parse_source,
    read_documents,
)
from ray_pipeline.data.text.builtin_text import dialogue_at, document_at
from ray_pipeline.data.text.corpus import Cleaner, Corpus, block_columns, in_blocks
from ray_pipeline.data.text.mixture import Choice
from ray_pipeline.data.text.ray_prepare import map_blocks
from ray_pipeline.records.artifacts import read_json, write_json
from ray_pipeline.records.input_files import InputGuard
from ray_pipeline.records.progress import Report
from ray_pipeline.settings.schema import PipelineFields

# More text than this does not change a small vocabulary: bytes.
TOKENIZER_BYTES = 32_000_000
TALLIES = "tallies.json"
_WRITERS = {BUILTIN: document_at, BUILTIN_DIALOGUES: dialogue_at}
TOLD_EVERY = 1000  # documents between reports, while those of an earlier attempt are read again


def mixture_documents(
    config: PipelineFields, tallies: dict[str, Tally], on_read: OnRead | None = None
) -> Iterator[tuple[int, str]]:
    """(index of the source, text) of every document of the mixture, source after source.

    Args:
        tallies: gets what became of the records of each source that has any. on_read: called as files are read.
    """
    for number, source in enumerate(config.data.pretrain):
        texts: Iterable[str]
        if write := _WRITERS.get(source.name):
            count = min(config.data.builtin_documents, config.data.max_documents or config.data.builtin_documents)
            texts = map(partial(write, config.seed), range(count))
        else:
            given, rule = parse_source(source.name), TextRule.of(config.data)
            tally = tallies[f"--data {source.name}"] = Tally.of(config.data, checked=given.kind == "file")
            texts = read_documents(given, config.data.max_documents, rule=rule, on_read=on_read, tally=tally)
        for text in texts:
            yield number, text


class Reading:
    """How far the local files of a mixture are read, and whether they still are those the run was accepted with."""

    def __init__(self, config: PipelineFields, guard: InputGuard, report: Report):
        sources = [parse_source(source.name, TEXT_BUILTIN) for source in config.data.pretrain]
        files = [path for source in sources if source.kind == "file" for path in source.files]
        self.guard, self.report = guard, report
        self.total = sum(path.stat().st_size for path in files)
        self._done: dict[Path, int] = {}
        self._unchecked: set[Path] = set()

    def on_read(self, path: Path, done: int) -> None:
        """So many bytes of the file are read."""
        self._done[path] = done
        self._unchecked.add(path)

    def block_is_read(self, documents: int) -> None:
        """Before a block is kept: its files must be what they were.

        Raises:
            UserError: one changed.
        """
        self.guard.check(self._unchecked)
        self._unchecked.clear()
        self.tell(documents)

    def tell(self, documents: int) -> None:
        """Report how far reading is, in bytes where files are read."""
        if self.total:
            self.report("reading and cleaning", sum(self._done.values()), self.total, "bytes")
        else:
            self.report("reading and cleaning", documents, None)


def clean_corpus(
    config: PipelineFields,
    finder: Decontaminator,
    folder: Path,
    guard: InputGuard,
    report: Report,
    tallies: dict[str, Tally],
) -> Corpus:
    """Read and clean every document into blocks in `folder`, and compare them; goes on where an attempt broke off.

    The documents of the blocks that are there are read again, as records have to be counted, and not cleaned again.

    Args:
        tallies: gets what became of the records of each source.
    """
    corpus = Corpus(folder)
    if corpus.is_indexed():
        tallies |= {name: Tally.restored(facts) for name, facts in read_json(folder / TALLIES).items()}
        return corpus.open()
    reading = Reading(config, guard, report)
    blocks, documents = corpus.written()
    report("reading and cleaning", 0, reading.total, "bytes")
    unread = _behind(mixture_documents(config, tallies, reading.on_read), documents, reading)
    for number, block in enumerate(map_blocks(Cleaner, (finder,), in_blocks(unread)), start=blocks):
        documents += block_columns(block)[0]["read"]
        reading.block_is_read(documents)
        corpus.add(number, block)
    write_json(
        folder / TALLIES, {name: tally.stored() for name, tally in tallies.items() if name.startswith("--data ")}
    )
    report("comparing documents", 0, None)
    corpus.index(len(config.data.pretrain))
    return corpus.open()


def _behind(documents: Iterator[tuple[int, str]], prepared: int, reading: Reading) -> Iterator[tuple[int, str]]:
    """The documents behind the first `prepared`, which may be many: how far they are read is told, too."""
    for number, document in enumerate(documents):
        if number >= prepared:
            yield document
        elif number % TOLD_EVERY == 0:
            reading.tell(number)


def make_tokenizer(
    config: PipelineFields, choice: Choice, conversations: Iterable[Conversation], folder: Path
) -> ChatTokenizer:
    """Train on the training documents, or load, as the config says; the folder is written either way.

    With tool calls, `conversations` are learned from too: pretraining text has no JSON to spell calls with.
    """
    settings = config.tokenizer
    if settings.name != "train":
        return given_tokenizer(config, folder)
    texts: Iterable[str] = choice.sample(TOKENIZER_BYTES)
    if settings.tools:
        written = (text for conversation in conversations for text in conversation.spelled())
        texts = itertools.chain(texts, _up_to(written, TOKENIZER_BYTES))
    trained = train_bpe(texts, settings.vocab_size, tools=settings.tools)
    tokenizer = save_trained(trained, folder, settings.chat_template)
    check_vocabulary(len(tokenizer), config.model.vocab_size)
    return tokenizer


def given_tokenizer(config: PipelineFields, folder: Path) -> ChatTokenizer:
    """Load the tokenizer that the config names, and write it to the folder."""
    tokenizer = copy_pretrained(config.tokenizer.name, folder, config.tokenizer.chat_template)
    check_vocabulary(len(tokenizer), config.model.vocab_size)
    return tokenizer


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text
