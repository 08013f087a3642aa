"""What OpenAI's API answers, as JSON values: whole answers, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.serving.slots import Written

Json = dict[str, Any]


class Reply:
    """The part that all chunks of an answer share.

    Args:
        kind: "chat.completion" or "text_completion".
    """

    def __init__(self, kind: str, model: str, tokenizer: ChatTokenizer):
        self.kind, self.model, self.tokenizer = kind, model, tokenizer
        self.id = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, choices: list[Json], usage: Json) -> Json:
        """A complete answer."""
        return self._base(self.kind, choices) | {"usage": usage}

    def chunk(self, choices: list[Json], usage: Json | None = None) -> Json:
        """A piece of a stream."""
        kind = "chat.completion.chunk" if self.kind.startswith("chat") else self.kind
        return self._base(kind, choices) | ({} if usage is None else {"usage": usage})

    def _base(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def chat_logprobs(self, tokens: Sequence[Written]) -> Json:
        """Log-probabilities as chat completions have them."""
        return {"content": [self._token(w) for w in tokens], "refusal": None}

    def _token(self, written: Written) -> Json:
        top = [self._entry(token, logprob) for token, logprob in written.likeliest]
        return self._entry(written.token, written.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self.text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    def text_logprobs(self, tokens: Sequence[Written], start: int) -> Json:
        """Log-probabilities as completions have them; offsets count characters from `start`."""
        texts, offsets = [self.text(w.token) for w in tokens], []
        for text in texts:
            offsets.append(start)
            start += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(w.logprob, -9999.0) for w in tokens],
            "top_logprobs": [{self.text(t): max(p, -9999.0) for t, p in w.likeliest} for w in tokens],
            "text_offset": offsets,
        }

    def text(self, token: int) -> str:
        """A token as text, special ones by their names."""
        return self.tokenizer.decode([token], keep_special=True)


def usage(prompt: int, completion: int) -> Json:
    """Tokens that were read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
