"""A Hugging Face byte-level BPE as llama.cpp's tokenizer metadata. Refuses what llama.cpp would split differently."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.convert.tokenizer_start import begins_with_bos

# gguf.TokenType, kept as numbers so that reading a tokenizer needs no gguf.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# DeepSeek-V3's own three splits, as its tokenizer.json has them (escapes or letters, both occur).
_DEEPSEEK_FIRST = r"\p{N}{1,3}"


@dataclass(frozen=True)
class GgufTokenizer:
    """What llama.cpp needs of a tokenizer.

    Attributes:
        pre: name of llama.cpp's pre-tokenizer. tokens, types: by id, as many as the model has. merges: "left right".
        special: `{bos,eos,pad}` ids there are.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    chat_template: str | None


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the way `tokenizer.json` splits text before merging.

    Raises:
        ValueError: for any splitting but the two known ones.
    """
    parts = tokenizer.get("pre_tokenizer") or {}
    steps = parts.get("pretokenizers", [parts])
    kinds = [step.get("type") for step in steps]
    normalizer = tokenizer.get("normalizer")
    plain = normalizer is None or normalizer == {"type": "Sequence", "normalizers": []}
    last = steps[-1]
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") is True:
        if last.get("add_prefix_space") is False and last.get("use_regex", True):
            return "smollm"
    if plain and kinds == ["Split", "Split", "Split", "ByteLevel"] and last.get("use_regex") is False:
        if steps[0]["pattern"].get("Regex") == _DEEPSEEK_FIRST:
            return "deepseek-v3"
    raise ValueError(
        f"tokenizer.json splits text by {kinds} and normalizes by {normalizer}: llama.cpp has no equal known here. "
        "GGUF works with a tokenizer trained by this pipeline (digits singly, then byte-level) or DeepSeek-V3's "
        "own; else set export.gguf=[]."
    )


def read_tokenizer(folder: Path, vocab_size: int) -> GgufTokenizer:
    """The tokenizer in `folder`, padded with unused tokens to the model's `vocab_size`.

    Raises:
        ValueError: for one that is not byte-level BPE, splits text in an unknown way, or outgrows the model.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"tokenizer.json is of type {model.get('type')!r}: only BPE can be written to GGUF; set export.gguf=[]"
        )
    by_id = {i: (token, NORMAL) for token, i in model["vocab"].items()}
    for added in tokenizer["added_tokens"]:
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(by_id) >= vocab_size:
        raise ValueError(f"the tokenizer has token ids up to {max(by_id)}: the model's vocabulary has {vocab_size}")
    entries = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]
    ids = {token: i for i, (token, _) in by_id.items()}
    special = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        content = token["content"] if isinstance(token, dict) else token
        if content is not None:
            special[name] = ids[content]
    add_bos = begins_with_bos(folder)
    if add_bos and "bos" not in special:  # it begins with eos, which llama.cpp must know as bos too
        special["bos"] = special["eos"]
    template = folder / "chat_template.jinja"
    return GgufTokenizer(
        pre=pre_tokenizer_name(tokenizer),
        tokens=[token for token, _ in entries],
        types=[kind for _, kind in entries],
        merges=[m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        special=special,
        add_bos=add_bos,
        chat_template=template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template"),
    )
