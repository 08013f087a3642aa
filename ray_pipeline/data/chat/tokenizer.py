"""The tokenizer as training and sampling see it: `tokenizers` and a chat template, without importing transformers.

A folder is the Hugging Face one (tokenizer.json, tokenizer_config.json, special_tokens_map.json); transformers loads
the same folder and gives the same ids.
"""

from __future__ import annotations

import datetime
import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ray_pipeline.data.chat.chat import Chat, ChatTemplate, Message, Tool
from ray_pipeline.data.chat.chat_encoding import Encoded, MarkedEncoder
from ray_pipeline.data.chat.chat_layout import each_answer, lay_out, lay_out_each, lay_out_prompt
from ray_pipeline.data.chat.template_files import NAMED_FOLDER, SETTING, choose, read_templates, refuse_odd_file
from ray_pipeline.data.chat.template_jinja import TODAY, literal_text
from ray_pipeline.data.tasks.question import THINK_CLOSE, THINK_OPEN
from ray_pipeline.errors import UserError
from ray_pipeline.records.integrity import verify_files
from ray_pipeline.tools.format import TOOL_TOKENS

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
LARGEST_TOKENIZER = 1 << 29  # bytes of tokenizer.json; that of a vocabulary of 262,000 has 33 million
THINK_MARKS = (THINK_OPEN, THINK_CLOSE)
# Control tokens even where tokenizer.json does not list them as added ones.
_ENDS = ("bos_token", "eos_token", "pad_token")
WAY_OUT = "Give a folder saved by save_pretrained of a fast tokenizer, or use --set tokenizer.name=train."


class NeverEnds(UserError):
    """An answer that is not followed by the stop token."""


class ChatTokenizer:
    """Text and conversations to ids and back.

    Args:
        template: of chats; for_tools: of those with tools, where there is one of their own.
        today: the day that a template may ask for.
    Attributes:
        bos_id, eos_id, pad_id: ids; a tokenizer without bos or pad uses eos for them, as GPT-2 does.
        vocab_size: one more than the largest id.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        special: dict[str, str],
        *,
        for_tools: str | None = None,
        today: datetime.date = TODAY,
    ):
        self._chat = tokenizer
        self._chat.no_padding()
        self._chat.no_truncation()
        # In plain text "<｜end▁of▁sentence｜>" is just letters: a document must not be able to end itself.
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self.special = special
        self.eos_id = self._id("eos_token")
        self.bos_id = self._id("bos_token") if "bos_token" in special else self.eos_id
        self.pad_id = self._id("pad_token") if "pad_token" in special else self.eos_id
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        controls = self._controls(template, for_tools)
        self.template = ChatTemplate(template, special, for_tools=for_tools, controls=controls, today=today)
        self._marked = MarkedEncoder(tokenizer, controls, special["eos_token"])

    def _controls(self, *templates: str | None) -> dict[str, int]:
        """Names and ids of the tokens that only a template may write: special ones, and any other added token that
        stands in the template or means reasoning or calls to this project. White space is text."""
        written = "\0".join([*(literal_text(source) for source in templates if source), *THINK_MARKS, *TOOL_TOKENS])
        added = {
            token.content: (number, token.special) for number, token in self._chat.get_added_tokens_decoder().items()
        }
        found = {name: number for name, (number, special) in added.items() if special or name in written}
        found |= {text: self._id(name) for name, text in self.special.items() if name in _ENDS}
        return {name: number for name, number in found.items() if name.strip()}

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

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[list[int], list[int]]:
        """Ids of a conversation and, for each, 1 where it is the assistant's (stop token included), else 0.

        What messages hold stays text: a control token's name in them is spelled out, but for the marks of reasoning in
        an answer. Each answer goes on from exactly the ids that `encode_prompt` gives for what stands before it.

        Raises:
            UserError: the template refuses the messages, drops something an assistant says, never ends an answer, or
                rewrites earlier turns.
        """
        return self.encode_chats([Chat(messages, tools)])[0]

    def encode_chats(self, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
        """`encode_chat` of many conversations on all cores."""
        return self._masked([lay_out(self.template, chat) for chat in chats])

    def encode_turns(self, chats: Sequence[Chat]) -> list[list[tuple[list[int], list[int]]]]:
        """For each conversation its `encode_chat`; where the template changes earlier turns when later ones follow, one
        for each trained answer, up to which the conversation then goes."""
        laid_out = [lay_out_each(self.template, chat) for chat in chats]
        encoded = iter(self._marked.encode([text for texts in laid_out for text in texts]))
        own = [[next(encoded) for _ in texts] for texts in laid_out]
        return [self._masked_turns(chat, parts) for chat, parts in zip(chats, own, strict=True)]

    def _masked_turns(self, chat: Chat, parts: Sequence[Encoded]) -> list[tuple[list[int], list[int]]]:
        try:
            return [(part.tokens.ids, self._mask(part)) for part in parts]
        except NeverEnds:
            # A stop token may stand behind the last answer alone (gpt-oss, Phi-3): then each has to be the last once.
            if len(chat.trained) < 2 or len(parts) > 1:
                raise
            return self._masked([lay_out(self.template, one) for one in each_answer(chat)])

    def _masked(self, marked: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        return [(one.tokens.ids, self._mask(one)) for one in self._marked.encode(marked)]

    def _mask(self, encoded: Encoded) -> list[int]:
        """1 for each answer, up to its last stop token."""
        ids, offsets = encoded.tokens
        mask = [0] * len(ids)
        for start, stop in encoded.read.trained:
            first = encoded.starts[start]
            behind = bisect_left(offsets, stop, key=lambda span: span[0])
            # Templates such as ChatML write a line end behind the stop token; nobody samples that. And some leave the
            # stop token behind `{% endgeneration %}`.
            ends = [i for i in range(first, behind) if ids[i] == self.eos_id] or [behind]
            if ends[-1] == len(ids) or ids[ends[-1]] != self.eos_id:
                raise self._never_ends(encoded, first, behind)
            mask[first : ends[-1] + 1] = [1] * (ends[-1] + 1 - first)
        return mask

    def _never_ends(self, encoded: Encoded, first: int, behind: int) -> NeverEnds:
        end = self.decode(encoded.tokens.ids[max(first, behind - 8) : behind], keep_special=True)
        return NeverEnds(
            f'the chat template does not end an answer with the eos token "{self.special["eos_token"]}" but with '
            f"{end[-40:]!r}, so a model could never learn to stop. Set eos_token in tokenizer_config.json to what the "
            "template writes."
        )

    def encode_prompt(self, question: str | Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids of a question (or of a conversation that waits for an answer), ending with the generation prompt."""
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return self._marked.encode([lay_out_prompt(self.template, messages, tools)])[0].tokens.ids

    def encode_marked(self, text: str) -> list[int]:
        """Ids of what `template.marked` rendered."""
        return self._marked.encode([text])[0].tokens.ids

    def encode_more(self, text: str) -> list[int]:
        """Ids of a text that goes on after other tokens. It holds no control token, but for the marks of reasoning."""
        return self._marked.continued(text, keep=THINK_MARKS)

    def check(self) -> ChatTokenizer:
        """Raise UserError unless answers end with the stop token and go on from the generation prompt.

        What a template drops shows when conversations are encoded: not all data has reasoning or tool calls.
        """
        messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
        if "What is 2+2?" not in self.template.render(messages):
            raise UserError(f"the chat template drops what the user says. {WAY_OUT}")
        self.encode_chat(messages)
        return self


def load_tokenizer(folder: Path, chat_template: str | None = None) -> ChatTokenizer:
    """Read a Hugging Face tokenizer folder.

    Args:
        chat_template: another template than the folder's default, as `tokenizer.chat_template` names it.
    Raises:
        UserError: a file is missing or damaged, or there is no eos token or chat template.
    """
    named = [f"{NAMED_FOLDER}/{path.name}" for path in (folder / NAMED_FOLDER).glob("*.jinja")]
    verify_files(folder, [*FILES, *named])
    tokenizer = raw_tokenizer(folder)
    config = _read_json(folder / "tokenizer_config.json")
    special = special_strings(_read_json(folder / "special_tokens_map.json", missing_ok=True) | config)
    templates = choose(read_templates(folder, config), chat_template, folder)
    if templates is None:
        raise UserError(
            f"{folder}: the tokenizer has no chat template. Add chat_template.jinja there, or name a file with --set "
            f"{SETTING}=FILE.jinja. {WAY_OUT}"
        )
    if "eos_token" not in special:
        raise UserError(f"{folder}: the tokenizer has no eos_token, so answers could not end. {WAY_OUT}")
    return ChatTokenizer(tokenizer, templates.source, special, for_tools=templates.for_tools)


def raw_tokenizer(folder: Path) -> Tokenizer:
    """What tokenizer.json says, without names of special tokens and chat template.

    Raises:
        UserError: missing, too large, or damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: there is no tokenizer.json. {WAY_OUT}")
    refuse_odd_file(path, LARGEST_TOKENIZER)
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  `tokenizers` raises bare Exception for every parse error
        raise UserError(f"{path}: not a fast tokenizer ({error}). {WAY_OUT}") from None


def special_strings(config: dict[str, Any]) -> dict[str, str]:
    """`{"eos_token": "</s>", ...}` from a config where a token is a string or a dict with "content"."""
    out = {}
    for key, value in config.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                out[key] = text
    return out


def _read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    refuse_odd_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {WAY_OUT}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). {WAY_OUT}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object. {WAY_OUT}")
    return value
