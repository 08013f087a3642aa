"""The tokenizer in a GGUF file's metadata as a Hugging Face folder: what `gguf_tokenizer` wrote, the other way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.convert.gguf_tokenizer import CONTROL, UNUSED, USER_DEFINED

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# As the tokenizer.json of DeepSeek-V3 has them.
_DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
# llama.cpp's name of a way to split text -> the same in tokenizer.json
_SPLITTERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
    "deepseek-v3": [
        *({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
          for regex in _DEEPSEEK_SPLITS),
        {**_BYTES, "use_regex": False},
    ],
}  # fmt: skip


def write_tokenizer(fields: Mapping[str, Any], folder: Path) -> Path:
    """Fill a folder with tokenizer.json and tokenizer_config.json.

    Args:
        fields: the file's metadata, values by key.
    Raises:
        ValueError: a tokenizer of another kind, or one that splits text in an unknown way.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _SPLITTERS:
        raise ValueError(
            f"its tokenizer is of model {kind!r} and splits text as {pre!r}; read are 'gpt2' with "
            f"{' or '.join(map(repr, _SPLITTERS))}"
        )
    tokens, types = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(types, list) or not isinstance(merges, list):
        raise ValueError("its tokenizer has no tokens, token types or merges")
    entries = [(i, token, kind) for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED]
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == CONTROL}
        for i, token, kind in entries if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    values = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITTERS[pre]}, "post_processor": None,
        "decoder": {**_BYTES, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token, _ in entries}, "merges": [merge.split(" ") for merge in merges],
        },
    }  # fmt: skip
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None:
            settings[f"{ours}_token"] = tokens[int(number)]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer.json", values), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder
