"""Where text, conversations, questions and preferences come from: built-in generators, a local file, a hub dataset by
name, or reasoning-gym."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from ray_pipeline.config import PipelineFields
from ray_pipeline.data import hub, local_files
from ray_pipeline.data.chat import ChatTemplate
from ray_pipeline.data.fields import BadRecord, Record
from ray_pipeline.data.local_files import Told
from ray_pipeline.data.preference_records import Preference, as_preference
from ray_pipeline.data.question_records import as_question
from ray_pipeline.data.reasoning_gym_source import check_task, parse_gym_name
from ray_pipeline.data.records import as_conversation, as_document
from ray_pipeline.data.tasks import TOOLS_MIX, draw_unique
from ray_pipeline.data.tasks.question import THINK_OPEN, Question
from ray_pipeline.data.text_files import TextRule, read_text_documents
from ray_pipeline.data.tokenizer import load_tokenizer
from ray_pipeline.data.tokenizer_files import trained_template
from ray_pipeline.data.tool_conversations import tool_conversation
from ray_pipeline.data.turns import Conversation
from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.input_files import data_files, form, is_pattern
from ray_pipeline.stage_chain import reads_text

BUILTIN = "builtin"
# Questions that a calculator is needed for: answered with one, and without.
BUILTIN_TOOLS, BUILTIN_NO_TOOLS = "builtin_tools", "builtin_no_tools"
SFT_BUILTIN = (BUILTIN, BUILTIN_TOOLS, BUILTIN_NO_TOOLS)
PROMPTS_BUILTIN = (BUILTIN, BUILTIN_TOOLS)
HUB_NAME = re.compile(r"^(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[^:/]+))?(?::(?P<column>[^:]+))?$")
# A hub dataset may have millions of documents; a run that names no limit should not download them all.
HUB_DOCUMENTS = 100_000
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A parsed source name.

    Attributes:
        location: path of a file, of a folder or glob of its shards, "org/name" or a reasoning-gym task.
        split, column: hub only. size: reasoning-gym only.
    """

    given: str
    kind: Literal["builtin", "file", "hub", "gym"]
    location: str = ""
    split: str = "train"
    column: str | None = None
    size: int | None = None

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
    path = Path(given)
    looks_local = form(path) in (*local_files.SUFFIXES, ".csv") or given.startswith((".", "/", "~"))
    if looks_local or (given and (path.exists() or is_pattern(given))):
        return Source(given, "file", str(path.expanduser()))
    match = HUB_NAME.match(given)
    if match is None:
        raise UserError(
            f'"{given}": no such file{did_you_mean(given, builtin)}. Give {_quoted(builtin)}, a '
            f"{', '.join(local_files.SUFFIXES)} file, a folder or glob of such files, or a datasets name like "
            "roneneldan/TinyStories:train:text."
        )
    return Source(given, "hub", match["name"], match["split"] or "train", match["column"])


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def figure_names(names: Sequence[str]) -> list[str]:
    """What the figures of sources are called: letters, digits, `.`, `_` and `-`, at most 60 of them, all different.

    A file goes by its name without folder and ending, so that its figures are called alike wherever it lies.
    """
    out: list[str] = []
    for name in names:
        path = Path(name)
        is_file = name.startswith((".", "/", "~")) or path.suffix in local_files.SUFFIXES
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


def _records(source: Source, told: Told | None = None) -> Iterator[tuple[str, Record]]:
    """(place, record) pairs, shard after shard; the place is "file:line" for messages."""
    if source.kind == "file":
        return itertools.chain.from_iterable(local_files.read_records(path, told) for path in source.files)
    return hub.stream_records(source.location, source.split)


def _convert(
    source: Source, convert: Callable[[Record], T], limit: int | None, told: Told | None = None
) -> Iterator[T]:
    if limit is None and source.kind == "hub":
        limit = HUB_DOCUMENTS
    for place, record in itertools.islice(_records(source, told), limit):
        try:
            yield convert(record)
        except BadRecord as error:
            raise UserError(f"{place}: {error}. Mend or remove it.") from None


def read_documents(
    source: Source, limit: int | None = None, *, rule: TextRule | None = None, told: Told | None = None
) -> Iterator[str]:
    """Texts of a file or hub source, shard after shard, in their order, `limit` at most.

    Args:
        rule: what is a document of a .txt file. told: told of the bytes read of each file.
    Raises:
        UserError: unreadable, naming file and line, or the byte that is not UTF-8.
    """
    if source.kind == "file":
        return itertools.islice(_file_documents(source, rule or TextRule(), told), limit)
    return _convert(source, lambda record: as_document(record, source.column), limit)


def _file_documents(source: Source, rule: TextRule, told: Told | None) -> Iterator[str]:
    for path in source.files:
        if form(path) == ".txt":
            yield from read_text_documents(path, rule, told)
        else:
            shard = replace(source, location=str(path))
            yield from _convert(shard, lambda record: as_document(record, source.column), None, told)


def read_conversations(source: Source, limit: int | None = None) -> Iterator[Conversation]:
    """Conversations of a file or hub source, in its order."""
    return _convert(source, as_conversation, limit)


def read_questions(source: Source, limit: int | None = None) -> Iterator[Question]:
    """Questions with answers of a file or hub source, in its order."""
    return _convert(source, lambda record: as_question(record, source.category), limit)


def read_preferences(source: Source, limit: int | None = None) -> Iterator[Preference]:
    """Pairs of answers of a file or hub source, in its order."""
    return _convert(source, as_preference, limit)


def check_sources(config: PipelineFields) -> None:
    """Every cheap check of the data, before anything starts.

    Local files are read as far as CHECKED_RECORDS records, so that an error in an ordinary file is found now and not
    after the tokenizer was trained; hub names are asked for at the hub.

    Raises:
        UserError: what is wrong with which source.
    """
    data, template = config.data, _known_template(config)
    documents = [("--data", s.name, (BUILTIN,), read_documents) for s in data.pretrain if reads_text(config)]
    conversations = partial(_checked_conversations, template)
    jobs: list[tuple[str, str, Sequence[str], Callable[[Source], Iterable[object]]]] = [
        *documents,
        ("--sft-data", data.sft, SFT_BUILTIN, conversations),
        ("--prompt-data", data.prompts, PROMPTS_BUILTIN, read_questions),
    ]
    if "dpo" in config.stages:
        jobs.append(("data.preferences", data.preferences, (BUILTIN,), read_preferences))
    for flag, given, builtin, read in jobs:
        try:
            source = parse_source(given, builtin)
            if source.kind == "gym" and flag != "--prompt-data":
                raise UserError(f'"{given}": reasoning-gym makes questions, so it is for --prompt-data alone.')
            check_source(source, read, documents=flag == "--data")
        except UserError as error:
            raise UserError(f"{flag} {error}") from None
    if template is not None and data.sft == BUILTIN_TOOLS:
        template.spans(tool_conversation(draw_unique(TOOLS_MIX, config.seed, "check", 1)[0]).chat())


def _known_template(config: PipelineFields) -> ChatTemplate | None:
    """The chat template the data will be written with; None where it must be downloaded first."""
    tokenizer = config.tokenizer
    if tokenizer.name == "train":
        check_vocabulary(tokenizer.vocab_size, config.model.vocab_size)
        return trained_template(tools=tokenizer.tools)
    if tokenizer.tools:
        raise UserError(
            f"tokenizer.tools=true with tokenizer.name={tokenizer.name}: a tokenizer that is loaded has its own tokens "
            "and template. Leave tokenizer.tools away, or use --set tokenizer.name=train."
        )
    if not Path(tokenizer.name).is_dir():
        return None
    loaded = load_tokenizer(Path(tokenizer.name)).check()
    check_vocabulary(len(loaded), config.model.vocab_size)
    return loaded.template


def _checked_conversations(template: ChatTemplate | None, source: Source) -> Iterator[Conversation]:
    """`read_conversations`, rendering the first of each kind: with reasoning, with calls, of several turns."""
    rendered = set()
    for number, conversation in enumerate(read_conversations(source), start=1):
        kind = (THINK_OPEN in conversation.text, conversation.calls_tools, len(conversation.messages) > 2)
        if template is not None and kind not in rendered:
            rendered.add(kind)
            try:
                template.spans(conversation.chat())
            except UserError as error:
                raise UserError(f"{source.given}: conversation {number}: {error}") from None
        yield conversation


def check_vocabulary(entries: int, vocab_size: int) -> None:
    """Raise UserError unless every token of the tokenizer has an embedding."""
    if entries > vocab_size:
        raise UserError(
            f"the tokenizer has {entries} entries but model.vocab_size={vocab_size}, so some tokens would have no "
            f"embedding. Use --set model.vocab_size={entries}."
        )


def check_source(source: Source, read: Callable[[Source], Iterable[object]], *, documents: bool) -> None:
    """Check one source; `read` is how it will be read, `documents` whether plain text will do."""
    if source.kind == "hub":
        hub.check_reachable(source.location)
    if source.kind == "gym":
        check_task(source.location)
    if source.kind != "file":
        return
    files = source.files
    for path in files:
        local_files.check_file(path)
        if form(path) == ".txt":
            if not documents:
                raise UserError(
                    f'{path}: plain text has no questions and answers. Give .json, .jsonl, .parquet or "builtin".'
                )
            local_files.check_utf8(path)
    if all(form(path) == ".txt" for path in files):
        return
    found = 0
    for found, _ in enumerate(read(source), start=1):
        if found == local_files.CHECKED_RECORDS:
            break
    if not found:
        raise UserError(f"{source.location}: holds no records. Give a file with at least one.")
