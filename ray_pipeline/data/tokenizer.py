"""The tokenizer as training and sampling see it: `tokenizers` and a chat template, without importing transformers.

A folder is the Hugging Face one (tokenizer.json, tokenizer_config.json, special_tokens_map.json); transformers loads
the same folder and gives the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ray_pipeline.data.chat import Chat, ChatTemplate, Message, Tool
from ray_pipeline.errors import UserError
from ray_pipeline.integrity import verify_files

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WAY_OUT = "Give a folder saved by save_pretrained of a fast tokenizer, or use --set tokenizer.name=train."


class ChatTokenizer:
    """Text and conversations to ids and back.

    Attributes:
        bos_id, eos_id, pad_id: ids; a tokenizer without bos or pad uses eos for them, as GPT-2 does.
        vocab_size: one more than the largest id.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, special: dict[str, str]):
        self._chat = tokenizer
        self._chat.no_padding()
        self._chat.no_truncation()
        # In plain text "<｜end▁of▁sentence｜>" is just letters: a document must not be able to end itself.
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self.special = special
        self.template = ChatTemplate(template, special)
        self.eos_id = self._id("eos_token")
        self.bos_id = self._id("bos_token") if "bos_token" in special else self.eos_id
        self.pad_id = self._id("pad_token") if "pad_token" in special else self.eos_id
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    def __len__(self) -> int:
        return self.vocab_size

    def _id(self, name: str) -> int:
        found = self._chat.token_to_id(self.special[name])
        if found is None:
            raise UserError(f'the tokenizer\'s {name} "{self.special[name]}" is not in its vocabulary. {WAY_OUT}')
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, nothing added; the text's own special tokens are spelled out."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        return [list(e.ids) for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_document(self, text: str) -> list[int]:
        """bos + text + eos: a pretraining document."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of ids. Special tokens are left out unless asked for; `<think>` and `</think>` always stay."""
        return str(self._chat.decode(list(ids), skip_special_tokens=not keep_special))

    def to_json(self) -> str:
        """tokenizer.json's text, for tokenising elsewhere."""
        return str(self._chat.to_str())

    def token_text(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id (byte-level letters for bytes)."""
        return self._chat.id_to_token(token_id) or f"<{token_id}>"

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[list[int], list[int]]:
        """Ids of a conversation and, for each, 1 where it is the assistant's (stop token included), else 0.

        Raises:
            UserError: the template refuses the messages, drops something an assistant says, never ends an answer, or
                rewrites earlier turns.
        """
        return self.encode_chats([Chat(messages, tools)])[0]

    def encode_chats(self, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
        """`encode_chat` of many conversations on all cores."""
        rendered = [self.template.spans(chat) for chat in chats]
        encodings = self._chat.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        out = []
        for encoding, (_, spans) in zip(encodings, rendered, strict=True):
            ids = list(encoding.ids)
            mask = [0] * len(ids)
            for start, stop in spans:
                self._mark(ids, encoding.offsets, start, stop, mask)
            out.append((ids, mask))
        return out

    def _mark(self, ids: list[int], offsets: list[tuple[int, int]], start: int, stop: int, mask: list[int]) -> None:
        """Set `mask` to 1 for the answer in characters [start, stop), up to its last stop token."""
        inside = [i for i, (a, b) in enumerate(offsets) if a >= start and b <= stop]
        while inside and ids[inside[-1]] != self.eos_id:
            inside.pop()  # templates such as ChatML write a line end behind the stop token; nobody samples that
        if not inside:
            raise UserError(
                f'the chat template does not end an answer with the eos token "{self.special["eos_token"]}", so '
                "a model could never learn to stop. Set eos_token in tokenizer_config.json to what the template writes."
            )
        for i in inside:
            mask[i] = 1

    def encode_prompt(self, question: str | Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids of a question (or of a conversation that waits for an answer), ending with the generation prompt."""
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        text = self.template.render(messages, tools=tools, generation_prompt=True)
        return list(self._chat.encode(text, add_special_tokens=False).ids)

    def check(self) -> ChatTokenizer:
        """Raise UserError unless answers end with the stop token and go on from the generation prompt.

        What a template drops shows when conversations are encoded: not all data has reasoning or tool calls.
        """
        messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
        if "What is 2+2?" not in self.template.render(messages):
            raise UserError(f"the chat template drops what the user says. {WAY_OUT}")
        ids, _ = self.encode_chat(messages)
        prompt = self.encode_prompt(messages[:1])
        if ids[: len(prompt)] != prompt:
            raise UserError(
                "the chat template's generation prompt is not the start of an answered conversation, so a model would "
                f"be asked in a form it was not trained on. {WAY_OUT}"
            )
        return self


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """Read a Hugging Face tokenizer folder.

    Raises:
        UserError: a file is missing or damaged, or there is no eos token or chat template.
    """
    verify_files(folder, FILES)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: there is no tokenizer.json. {WAY_OUT}")
    try:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  `tokenizers` raises bare Exception for every parse error
        raise UserError(f"{folder / 'tokenizer.json'}: not a fast tokenizer ({error}). {WAY_OUT}") from None
    config = _read_json(folder / "tokenizer_config.json")
    special = special_strings(_read_json(folder / "special_tokens_map.json", missing_ok=True) | config)
    template = _template(folder, config)
    if template is None:
        raise UserError(f"{folder}: the tokenizer has no chat template. Add chat_template.jinja there. {WAY_OUT}")
    if "eos_token" not in special:
        raise UserError(f"{folder}: the tokenizer has no eos_token, so answers could not end. {WAY_OUT}")
    return ChatTokenizer(tokenizer, template, special)


def special_strings(config: dict[str, Any]) -> dict[str, str]:
    """`{"eos_token": "</s>", ...}` from a config where a token is a string or a dict with "content"."""
    out = {}
    for key, value in config.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                out[key] = text
    return out


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: a file of its own, a string in the config, or a list of named ones ("default" is meant)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file. {WAY_OUT}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {WAY_OUT}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). {WAY_OUT}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object. {WAY_OUT}")
    return value
