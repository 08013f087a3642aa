"""Where text, conversations, questions and preferences come from: built-in generators, a local file, a hub dataset by
name, or reasoning-gym."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from ray_pipeline.data.files import hub
from ray_pipeline.data.files.fields import BadRecord, Record
from ray_pipeline.data.files.local_files import OnRead
from ray_pipeline.data.files.reading import Tally, converted, limited
from ray_pipeline.data.files.record_files import read_records
from ray_pipeline.data.files.text_files import TextRule, read_text_documents
from ray_pipeline.data.forms.chat_records import as_conversation, as_document
from ray_pipeline.data.forms.column_names import Columns, parse_columns, with_columns
from ray_pipeline.data.forms.preference_records import Preference, as_preference
from ray_pipeline.data.forms.question_records import as_question
from ray_pipeline.data.forms.turns import Conversation
from ray_pipeline.data.tasks.question import Question
from ray_pipeline.data.tasks.reasoning_gym_source import parse_gym_name
from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.records.input_files import SUFFIXES, data_files, form, is_pattern, split_columns

BUILTIN = "builtin"
# Questions that a calculator is needed for: answered with one, and without.
BUILTIN_TOOLS, BUILTIN_NO_TOOLS = "builtin_tools", "builtin_no_tools"
BUILTIN_CHAT = "builtin_chat"  # as builtin, in more of people's words, and small talk
BUILTIN_DIALOGUES = "builtin_dialogues"  # text: questions answered at once or worked out
TEXT_BUILTIN = (BUILTIN, BUILTIN_DIALOGUES)
SFT_BUILTIN = (BUILTIN, BUILTIN_CHAT, BUILTIN_TOOLS, BUILTIN_NO_TOOLS)
PROMPTS_BUILTIN = (BUILTIN, BUILTIN_CHAT, BUILTIN_TOOLS)
HUB_NAME = re.compile(r"^(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[^:/]+))?(?::(?P<column>[^:]+))?$")
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A parsed source name.

    Attributes:
        location: path of a file, of a folder or glob of its shards, "org/name" or a reasoning-gym task.
        split: hub only. column: of documents. columns: which columns are read as what. size: reasoning-gym only.
    """

    given: str
    kind: Literal["builtin", "file", "hub", "gym"]
    location: str = ""
    split: str = "train"
    column: str | None = None
    size: int | None = None
    columns: Columns = ()

    @property
    def files(self) -> list[Path]:
        """The shards of a file source, in the order they are read in."""
        return data_files(self.location)

    @property
    def category(self) -> str:
        """What questions of this source are called in tables."""
        return Path(self.location).stem if self.kind == "file" else self.location.rpartition("/")[2]


def parse_source(given: str, builtin: Sequence[str] = (BUILTIN,)) -> Source:
    """Tell a built-in from a file and a hub name. What looks like a file, or exists, is a file.

    Args:
        builtin: names of built-in generators that are known here.
    Raises:
        UserError: none of them.
    """
    if given in builtin:
        return Source(given, "builtin")
    gym = parse_gym_name(given)
    if gym is not None:
        return Source(given, "gym", gym[0], size=gym[1])
    name, mapping = split_columns(given)
    columns = parse_columns(given, mapping) if mapping else ()
    head, _, column = name.rpartition(":")
    if form(Path(head)) in SUFFIXES and not Path(name).exists():
        return Source(given, "file", str(Path(head).expanduser()), column=column, columns=columns)
    path = Path(name)
    looks_local = form(path) in SUFFIXES or name.startswith((".", "/", "~"))
    if looks_local or (name and (path.exists() or is_pattern(name))):
        return Source(given, "file", str(path.expanduser()), columns=columns)
    match = HUB_NAME.match(name)
    if match is None:
        raise UserError(
            f'"{given}": no such file{did_you_mean(given, builtin)}. Give {_quoted(builtin)}, a '
            f"{', '.join(SUFFIXES)} file, a folder or glob of such files, or a datasets name like "
            "roneneldan/TinyStories:train:text."
        )
    return Source(given, "hub", match["name"], match["split"] or "train", match["column"], columns=columns)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def figure_names(names: Sequence[str]) -> list[str]:
    """What the figures of sources are called: letters, digits, `.`, `_` and `-`, at most 60 of them, all different.

    A file goes by its name without folder and ending, so that its figures are called alike wherever it lies.
    """
    out: list[str] = []
    for name in names:
        path = Path(name)
        is_file = name.startswith((".", "/", "~")) or path.suffix in SUFFIXES
        own = path.name.split(".")[0] if is_file else name
        short = re.sub(r"[^A-Za-z0-9._-]+", "-", own).strip("-.")[:50] or "source"
        taken, number = short, 2
        while taken in out:
            taken, number = f"{short}-{number}", number + 1
        out.append(taken)
    return out


def licence_of(source: str) -> str:
    """Licence of a source the config has no field for."""
    if source in SFT_BUILTIN:
        return "Apache-2.0"
    return "Apache-2.0 (reasoning-gym)" if parse_gym_name(source) else "unknown"


def source_records(source: Source, on_read: OnRead | None = None) -> Iterator[tuple[str, Record | BadRecord]]:
    """(place, record) pairs, shard after shard; the place is "file:line" for messages."""
    if source.kind == "file":
        return itertools.chain.from_iterable(read_records(path, on_read) for path in source.files)
    return hub.stream_records(source.location, source.split)


def read_documents(
    source: Source,
    limit: int | None = None,
    *,
    rule: TextRule | None = None,
    on_read: OnRead | None = None,
    tally: Tally | None = None,
) -> Iterator[str]:
    """Texts of a file or hub source, shard after shard, in their order, `limit` at most.

    Args:
        rule: what is a document of a .txt file. on_read: called as each file is read.
        tally: counts what is left out; without one, a bad record ends the reading.
    Raises:
        UserError: unreadable, naming file and line, or the byte that is not UTF-8.
    """
    tally = tally or Tally()
    return limited(_documents(source, rule or TextRule(), on_read, tally), limit, tally)


def _documents(source: Source, rule: TextRule, on_read: OnRead | None, tally: Tally) -> Iterator[str]:
    def document(record: Record) -> str:
        return as_document(record, source.column)

    convert = with_columns(document, source.columns)
    if source.kind == "hub":
        yield from converted(source_records(source), convert, tally)
        return
    for path in source.files:
        if form(path) == ".txt":
            yield from read_text_documents(path, rule, on_read)
        else:
            yield from converted(read_records(path, on_read), convert, tally)


def read_conversations(source: Source, limit: int | None = None, tally: Tally | None = None) -> Iterator[Conversation]:
    """Conversations of a file or hub source, in its order; the arguments are those of `read_documents`."""
    return _read(source, as_conversation, limit, tally)


def read_questions(source: Source, limit: int | None = None, tally: Tally | None = None) -> Iterator[Question]:
    """Questions with answers of a file or hub source, in its order."""
    return _read(source, lambda record: as_question(record, source.category), limit, tally)


def read_preferences(source: Source, limit: int | None = None, tally: Tally | None = None) -> Iterator[Preference]:
    """Pairs of answers of a file or hub source, in its order."""
    return _read(source, as_preference, limit, tally)


def _read(source: Source, convert: Callable[[Record], T], limit: int | None, tally: Tally | None) -> Iterator[T]:
    tally = tally or Tally()
    return limited(converted(source_records(source), with_columns(convert, source.columns), tally), limit, tally)


def check_vocabulary(entries: int, vocab_size: int) -> None:
    """Raise UserError unless every token of the tokenizer has an embedding."""
    if entries > vocab_size:
        raise UserError(
            f"the tokenizer has {entries} entries but model.vocab_size={vocab_size}, so some tokens would have no "
            f"embedding. Use --set model.vocab_size={entries}."
        )
