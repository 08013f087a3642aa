"""What plain text begins with, by the files of a tokenizer folder: what transformers and llama.cpp put before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from model.convert.hf import TOKENIZER_FILES

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"


def begins_with_bos(folder: Path) -> bool:
    """Whether the folder's tokenizer puts a start token before plain text.

    `add_bos_token` speaks where it stands, as it does in transformers' Llama tokenizers; else the post-processor does.
    """
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if "add_bos_token" in settings:
        return bool(settings["add_bos_token"])
    tokenizer = Tokenizer.from_str((folder / TOKENIZER).read_text(encoding="utf-8"))
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return whole[:1] == [_start(tokenizer, settings)[1]] and whole[1 : 1 + len(plain)] == plain


def with_bos(folder: Path, out: Path) -> Path:
    """Copy a tokenizer folder to `out` so that plain text begins with bos, or with eos where there is no bos: what
    PRETRAIN's documents begin with.

    Text that comes with special tokens written out, as from a chat template, is tokenised without: transformers and
    llama.cpp both see to that.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_str((folder / TOKENIZER).read_text(encoding="utf-8"))
    token, number = _start(tokenizer, settings)
    template = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, number)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    (out / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings.pop("add_bos_token", None)
    if settings.get("bos_token") is not None:  # transformers refuses the key without a bos
        settings["add_bos_token"] = True
    (out / CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return out


def _start(tokenizer: Tokenizer, settings: dict[str, Any]) -> tuple[str, int]:
    """The token that documents begin with, and its id."""
    token = settings.get("bos_token") or settings["eos_token"]
    text = token["content"] if isinstance(token, dict) else token
    number = tokenizer.token_to_id(text)
    assert number is not None, "load_tokenizer refuses special tokens that the vocabulary has not"
    return text, number
