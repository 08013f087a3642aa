"""Where text, conversations and questions come from: built-in generators, a local file, or a hub dataset by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from ray_pipeline.config import PipelineFields
from ray_pipeline.data import hub, local_files
from ray_pipeline.data.records import BadRecord, Conversation, Record, as_conversation, as_document, as_question
from ray_pipeline.data.tasks.question import Question
from ray_pipeline.data.tokenizer import load_tokenizer
from ray_pipeline.errors import UserError, did_you_mean

BUILTIN = "builtin"
HUB_NAME = re.compile(r"^(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[^:/]+))?(?::(?P<column>[^:]+))?$")
# A hub dataset may have millions of documents; a run that names no limit should not download them all.
HUB_DOCUMENTS = 100_000
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A parsed source name.

    Attributes:
        location: file path or "org/name". split, column: hub only.
    """

    given: str
    kind: Literal["builtin", "file", "hub"]
    location: str = ""
    split: str = "train"
    column: str | None = None

    @property
    def category(self) -> str:
        """What questions of this source are called in tables."""
        return Path(self.location).stem if self.kind == "file" else self.location.rpartition("/")[2]


def parse_source(given: str) -> Source:
    """Tell a file from a hub name. What looks like a file, or exists, is a file.

    Raises:
        UserError: neither.
    """
    if given == BUILTIN:
        return Source(given, "builtin")
    path = Path(given)
    looks_local = path.suffix in (*local_files.SUFFIXES, ".json", ".csv") or given.startswith((".", "/", "~"))
    if looks_local or (given and path.exists()):
        return Source(given, "file", str(path.expanduser()))
    match = HUB_NAME.match(given)
    if match is None:
        raise UserError(
            f'"{given}": no such file{did_you_mean(given, [BUILTIN])}. Give "builtin", a '
            f"{', '.join(local_files.SUFFIXES)} file, or a datasets name like roneneldan/TinyStories:train:text."
        )
    return Source(given, "hub", match["name"], match["split"] or "train", match["column"])


def _records(source: Source) -> Iterator[tuple[str, Record]]:
    """(place, record) pairs; the place is "file:line" for messages."""
    if source.kind == "file":
        return local_files.read_records(Path(source.location))
    return hub.stream_records(source.location, source.split)


def _convert(source: Source, convert: Callable[[Record], T], limit: int | None) -> Iterator[T]:
    if limit is None and source.kind == "hub":
        limit = HUB_DOCUMENTS
    for place, record in itertools.islice(_records(source), limit):
        try:
            yield convert(record)
        except BadRecord as error:
            raise UserError(f"{place}: {error}. Mend or remove it.") from None


def read_documents(source: Source, limit: int | None = None) -> Iterator[str]:
    """Texts of a file or hub source, in its order, `limit` at most.

    Raises:
        UserError: unreadable, naming file and line, or the byte that is not UTF-8.
    """
    if source.kind == "file" and source.location.endswith(".txt"):
        return itertools.islice(local_files.read_text_documents(Path(source.location)), limit)
    return _convert(source, lambda record: as_document(record, source.column), limit)


def read_conversations(source: Source, limit: int | None = None) -> Iterator[Conversation]:
    """Conversations of a file or hub source, in its order."""
    return _convert(source, as_conversation, limit)


def read_questions(source: Source, limit: int | None = None) -> Iterator[Question]:
    """Questions with answers of a file or hub source, in its order."""
    return _convert(source, lambda record: as_question(record, source.category), limit)


def check_sources(config: PipelineFields) -> None:
    """Every cheap check of the data, before anything starts.

    Local files are read as far as CHECKED_RECORDS records, so that an error in an ordinary file is found now and not
    after the tokenizer was trained; hub names are asked for at the hub.

    Raises:
        UserError: what is wrong with which source.
    """
    data = config.data
    jobs: list[tuple[str, str, Callable[[Source], Iterable[object]]]] = [
        ("--data", source.name, read_documents) for source in data.pretrain
    ]
    jobs += [("--sft-data", data.sft, read_conversations), ("--prompt-data", data.prompts, read_questions)]
    for flag, given, read in jobs:
        try:
            check_source(parse_source(given), read, questions_only=flag != "--data")
        except UserError as error:
            raise UserError(f"{flag} {error}") from None
    if config.tokenizer.name == "train":
        check_vocabulary(config.tokenizer.vocab_size, config.model.vocab_size)
    elif Path(config.tokenizer.name).is_dir():
        check_vocabulary(len(load_tokenizer(Path(config.tokenizer.name)).check()), config.model.vocab_size)


def check_vocabulary(entries: int, vocab_size: int) -> None:
    """Raise UserError unless every token of the tokenizer has an embedding."""
    if entries > vocab_size:
        raise UserError(
            f"the tokenizer has {entries} entries but model.vocab_size={vocab_size}, so some tokens would have no "
            f"embedding. Use --set model.vocab_size={entries}."
        )


def check_source(source: Source, read: Callable[[Source], Iterable[object]], *, questions_only: bool) -> None:
    """Check one source; `read` is how it will be read."""
    if source.kind == "hub":
        hub.check_reachable(source.location)
    if source.kind != "file":
        return
    path = Path(source.location)
    local_files.check_file(path)
    if path.suffix == ".txt":
        if questions_only:
            raise UserError(f'{path}: plain text has no questions and answers. Give .jsonl, .parquet or "builtin".')
        local_files.check_utf8(path)
        return
    found = 0
    for found, _ in enumerate(read(source), start=1):
        if found == local_files.CHECKED_RECORDS:
            break
    if not found:
        raise UserError(f"{path}: holds no records. Give a file with at least one.")
