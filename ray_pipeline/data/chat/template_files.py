"""Which chat templates a tokenizer's folder holds, and which of them is meant. Rendering them is in `chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ray_pipeline.errors import UserError, did_you_mean

FILE, NAMED_FOLDER = "chat_template.jinja", "additional_chat_templates"
DEFAULT, FOR_TOOLS = "default", "tool_use"
SETTING = "tokenizer.chat_template"
LARGEST = 1 << 26  # bytes of a template or a file of settings; published ones have a tenth of it at most


class Templates(NamedTuple):
    """Sources of the templates that are used: of all chats, and of those with tools where these have their own."""

    source: str
    for_tools: str | None = None


def read_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name, as transformers finds them: files come before what tokenizer_config.json (`config`) holds.

    Raises:
        UserError: a file that is not text, or a list of templates without names.
    """
    files = {path.stem: path for path in sorted((folder / NAMED_FOLDER).glob("*.jinja"))}
    if (folder / FILE).is_file():
        files[DEFAULT] = folder / FILE
    if files:
        return {name: read_template(path) for name, path in files.items()}
    given = config.get("chat_template")
    if not isinstance(given, list):
        return {DEFAULT: given} if isinstance(given, str) else {}
    named = {}
    for entry in given:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise UserError(
                f'{folder / "tokenizer_config.json"}: each of the list "chat_template" needs a "name" and a "template" '
                "that are text. Fix it."
            )
        named[entry["name"]] = entry["template"]
    return named


def refuse_odd_file(path: Path, largest: int = LARGEST) -> None:
    """Refuse a file that would be read without end; does nothing where there is none.

    Raises:
        UserError: a pipe, a device, or more bytes than `largest`.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file. Give a text file.")
    if path.exists() and path.stat().st_size > largest:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes, more than the {largest} that are read of such a file. Give the file "
            "as it was published."
        )


def read_template(path: Path) -> str:
    """The source in a file.

    Raises:
        UserError: it cannot be read, or is larger than any template.
    """
    try:
        refuse_odd_file(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path}: the chat template cannot be read ({reason}). Give a text file.") from None


def is_template_file(given: str) -> bool:
    """Whether the setting names a file and not one of the tokenizer's own templates."""
    return given.endswith(".jinja") or "/" in given


def choose(named: dict[str, str], given: str | None, folder: Path) -> Templates | None:
    """The templates that are meant: the one in `given`, a file or a name, for all chats; else the folder's own choice.

    Returns:
        None where the folder has none and none is given.
    Raises:
        UserError: no such file or name, or several names of which none is the default.
    """
    if given is not None and is_template_file(given):
        return Templates(read_template(Path(given)))
    names = ", ".join(sorted(named)) or "no template of its own"
    if given is not None:
        if given not in named:
            raise UserError(
                f"{SETTING}={given}: {folder} has {names}{did_you_mean(given, named)}. Name one of them, or a "
                ".jinja file."
            )
        return Templates(named[given])
    if named and DEFAULT not in named:
        raise UserError(
            f"{folder}: has the chat templates {names}, and none of them is the default. Choose one with --set "
            f"{SETTING}={next(iter(sorted(named)))}."
        )
    return Templates(named[DEFAULT], named.get(FOR_TOOLS)) if named else None
