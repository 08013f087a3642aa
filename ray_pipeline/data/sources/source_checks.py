"""What can be known of the data before anything starts: are the sources there, do their records hold what they must?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ray_pipeline.data.chat.chat import ChatTemplate
from ray_pipeline.data.chat.chat_layout import lay_out, lay_out_each
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import trained_template
from ray_pipeline.data.files import hub, local_files
from ray_pipeline.data.files.reading import Tally
from ray_pipeline.data.forms.column_names import ASKED, CONVERSATION, DOCUMENT, PREFERENCE, check_names
from ray_pipeline.data.forms.question_records import tool_conversation
from ray_pipeline.data.forms.turns import Conversation
from ray_pipeline.data.sources.sources import (
    BUILTIN,
    BUILTIN_TOOLS,
    PROMPTS_BUILTIN,
    SFT_BUILTIN,
    TEXT_BUILTIN,
    Source,
    check_vocabulary,
    parse_source,
    read_conversations,
    read_documents,
    read_preferences,
    read_questions,
)
from ray_pipeline.data.tasks.mixes import TOOLS_MIX, draw_unique
from ray_pipeline.data.tasks.question import THINK_OPEN
from ray_pipeline.data.tasks.reasoning_gym_source import check_task
from ray_pipeline.errors import UserError
from ray_pipeline.records.input_files import form
from ray_pipeline.settings.chain import reads_text
from ray_pipeline.settings.schema import PipelineFields

Reader = Callable[[Source, int | None, Tally], Iterator[object]]


class _Use(NamedTuple):
    """A source and what it is for. Attributes: names: columns may be read as. read: how it will be read."""

    flag: str
    given: str
    builtin: Sequence[str]
    names: Sequence[str]
    read: Reader


def check_sources(config: PipelineFields) -> list[str]:
    """Every cheap check of the data, before anything starts.

    Local files are read as far as CHECKED_RECORDS records, so that an error in an ordinary file is found now and not
    after the tokenizer was trained; hub names are asked for at the hub.

    Returns:
        What the user should know of the sources: columns that are not read, records that will be left out.
    Raises:
        UserError: what is wrong with which source.
    """
    data, template = config.data, _known_template(config)
    uses = [_Use("--data", s.name, TEXT_BUILTIN, DOCUMENT, _documents) for s in data.pretrain if reads_text(config)]
    conversations = partial(_checked_conversations, template)
    uses += [
        _Use("--sft-data", data.sft, SFT_BUILTIN, CONVERSATION, conversations),
        _Use("--prompt-data", data.prompts, PROMPTS_BUILTIN, ASKED, read_questions),
    ]
    if "dpo" in config.stages:
        uses.append(_Use("data.preferences", data.preferences, (BUILTIN,), PREFERENCE, read_preferences))
    notices = []
    for use in uses:
        try:
            source = parse_source(use.given, use.builtin)
            if source.kind == "gym" and use.flag != "--prompt-data":
                raise UserError(f'"{use.given}": reasoning-gym makes questions, so it is for --prompt-data alone.')
            check_names(use.given, source.columns, use.names)
            if source.column is not None and use.names is not DOCUMENT:
                raise UserError(f'"{use.given}": a column alone is for --data. Write "NAME={source.column}".')
            told = check_source(source, use.read, Tally.of(data), data.max_documents)
            notices += [f"{use.flag} {use.given}: {text}" for text in told]
        except UserError as error:
            raise UserError(f"{use.flag} {error}") from None
    if template is not None and data.sft == BUILTIN_TOOLS:
        lay_out(template, tool_conversation(draw_unique(TOOLS_MIX, config.seed, "check", 1)[0]).chat())
    return notices


def _documents(source: Source, limit: int | None, tally: Tally) -> Iterator[str]:
    return read_documents(source, limit, tally=tally)


def check_source(source: Source, read: Reader, tally: Tally, limit: int | None = None) -> list[str]:
    """Check one source; `read` is how it will be read, `limit` how many of its records at most.

    Returns:
        What of it is not read.
    """
    if source.kind == "hub":
        hub.check_reachable(source.location)
        return [] if limit else ["all of its records are read. Fewer: --set data.max_documents=100000"]
    if source.kind == "gym":
        check_task(source.location)
    if source.kind != "file":
        return []
    files = source.files
    for path in files:
        local_files.check_file(path)
        if form(path) == ".txt":
            if read is not _documents:
                raise UserError(
                    f'{path}: plain text has no questions and answers. Give .json, .jsonl, .csv, .parquet or "builtin".'
                )
            local_files.check_utf8(path)
    if all(form(path) == ".txt" for path in files):
        return []
    found = sum(1 for _ in read(source, min(limit or local_files.CHECKED_RECORDS, local_files.CHECKED_RECORDS), tally))
    if not found:
        raise UserError(f"{source.location}: holds no records. Give a file with at least one.")
    tally.cut = False  # it was the check's own limit
    return tally.notices()


def _known_template(config: PipelineFields) -> ChatTemplate | None:
    """The chat template the data will be written with; None where it must be downloaded first."""
    tokenizer = config.tokenizer
    if tokenizer.name == "train":
        check_vocabulary(tokenizer.vocab_size, config.model.vocab_size)
        return trained_template(tools=tokenizer.tools, chat_template=tokenizer.chat_template)
    if tokenizer.tools:
        raise UserError(
            f"tokenizer.tools=true with tokenizer.name={tokenizer.name}: a tokenizer that is loaded has its own tokens "
            "and template. Omit tokenizer.tools, or use --set tokenizer.name=train."
        )
    if not Path(tokenizer.name).is_dir():
        return None
    loaded = load_tokenizer(Path(tokenizer.name), tokenizer.chat_template).check()
    check_vocabulary(len(loaded), config.model.vocab_size)
    return loaded.template


def _checked_conversations(
    template: ChatTemplate | None, source: Source, limit: int | None, tally: Tally
) -> Iterator[Conversation]:
    """`read_conversations`, rendering the first of each kind: with reasoning, with calls, of several turns."""
    rendered = set()
    for number, conversation in enumerate(read_conversations(source, limit, tally), start=1):
        kind = (THINK_OPEN in conversation.text, conversation.calls_tools, len(conversation.messages) > 2)
        if template is not None and kind not in rendered and not tally.skip:
            rendered.add(kind)
            try:
                lay_out_each(template, conversation.chat())
            except UserError as error:
                raise UserError(f"{source.given}: conversation {number}: {error}") from None
        yield conversation
