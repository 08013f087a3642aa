"""llama.cpp (the `xllamacpp` package) as a reference for exported GGUF files. One model, this process, CPU."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INSTALL = "install ray-pipeline[llama]"
WHOLE = 8192  # tokens of a vocabulary up to which a program on this machine is asked for all log-probabilities
SOME = 256  # of a larger one
_SURE = 1e4  # logit that makes a token certain; the log-probabilities that are told are those without it


class LlamaMissing(Exception):
    """xllamacpp is not installed; the message says how to get it."""


class LlamaCpp:
    """A loaded GGUF file; see `proof.Program`.

    Args:
        vocab_size: of the model. plain: a token that is a whole character and ends nothing.
    Raises:
        LlamaMissing: when xllamacpp is not installed.
        RuntimeError: when llama.cpp does not load the file.
    """

    def __init__(self, path: Path, *, context: int, threads: int, vocab_size: int, plain: int):
        try:
            import xllamacpp
        except ImportError:
            raise LlamaMissing(INSTALL) from None
        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        self.vocab_size, self.plain = vocab_size, plain
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.n_gpu_layers = 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.warmup = False
        settings.verbosity = -1
        settings.port = 0  # any free one, on the loopback interface
        # Full precision everywhere but in the weights: those are what is checked.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(settings)
        # A proxy from the environment must not see requests to this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, data, headers)
        with self._opener.open(request, timeout=60) as answer:
            return json.load(answer)

    def _complete(self, ids: list[int], limit: int, **more: Any) -> dict[str, Any]:
        answer = self._post("/completion", {"prompt": ids, "n_predict": limit, "temperature": 0.0, **more})
        if "error" in answer:
            raise RuntimeError(f"llama.cpp: {answer['error']}")
        return answer

    def ids(self, text: str) -> list[int]:
        """As `Program.ids`."""
        return self._tokenize(text, special=False)

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text, with bos before it where the file says so. special: control tokens in it count as such."""
        body = {"content": text, "add_special": True, "parse_special": special}
        return [int(t) for t in self._post("/tokenize", body)["tokens"]]

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """As `Program.chat`."""
        body: dict[str, Any] = {"messages": [_as_sent(message) for message in messages]}
        if tools:
            body["tools"] = list(tools)
        return self._tokenize(self._post("/apply-template", body)["prompt"], special=True)

    def ends_at(self, token: int) -> bool:
        """As `Program.ends_at`: the token is made certain, and what happens is looked at."""
        answer = self._complete([self.plain], 2, logit_bias=[[token, _SURE]])
        return bool(answer["stop_type"] == "eos")

    def logprobs(self, ids: list[int], first: int) -> Tensor:
        """As `Program.logprobs`.

        llama.cpp withholds what follows where the next token is part of a character or ends the answer, so one that is
        neither is made certain; what is told are the log-probabilities before that.
        """
        count = self.vocab_size if self.vocab_size <= WHOLE else SOME
        rows = torch.full((len(ids) - first, self.vocab_size), torch.nan)
        for row, end in enumerate(range(first, len(ids))):
            answer = self._complete(ids[:end], 1, n_probs=count, logit_bias=[[self.plain, _SURE]])
            for told in answer["completion_probabilities"][0]["top_logprobs"]:
                rows[row, int(told["id"])] = float(told["logprob"])
        return rows

    def logprob(self, ids: list[int], token: int) -> float | None:
        """Of one token after `ids`; None where llama.cpp withholds it, of a vocabulary too large to ask for all."""
        told = self._complete(ids, 1, n_probs=1, logit_bias=[[token, _SURE]]).get("completion_probabilities")
        if told and int(told[0]["id"]) == token:
            return float(told[0]["logprob"])
        return float(self.logprobs([*ids, token], len(ids))[0, token]) if self.vocab_size <= WHOLE else None

    def token_logprobs(self, ids: list[int]) -> list[float | None]:
        """As `Program.token_logprobs`."""
        return [self.logprob(ids[:end], ids[end]) for end in range(1, len(ids))]

    def greedy(self, prompt: list[int], limit: int) -> list[int]:
        """As `Program.greedy`."""
        return [int(token) for token in self._complete(prompt, limit, return_tokens=True)["tokens"]]

    def close(self) -> None:
        """Stop the server."""
        del self._server


def _as_sent(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as OpenAI's clients send it: arguments of calls are JSON texts, and calls have ids."""
    calls = [
        {**call, "id": str(i), "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for i, call in enumerate(message.get("tool_calls") or [])
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}
