"""llama.cpp (the `xllamacpp` package) as a reference for exported GGUF files. One model, this process, CPU."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTALL = "install ray-pipeline[llama]"


class LlamaMissing(Exception):
    """xllamacpp is not installed; the message says how to get it."""


@dataclass(frozen=True)
class NextToken:
    """llama.cpp's view of the next token: the likeliest id, and log-probabilities of the likeliest few by id."""

    token: int
    logprobs: dict[int, float]


class LlamaCpp:
    """A loaded GGUF file.

    Raises:
        LlamaMissing: when xllamacpp is not installed.
        RuntimeError: when llama.cpp does not load the file.
    """

    def __init__(self, path: Path, *, context: int, threads: int):
        try:
            import xllamacpp
        except ImportError:
            raise LlamaMissing(INSTALL) from None
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

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text, with bos before it where the file says so. special: control tokens in it count as such."""
        body = {"content": text, "add_special": True, "parse_special": special}
        return [int(t) for t in self._post("/tokenize", body)["tokens"]]

    def prompt(self, question: str) -> list[int]:
        """Ids of a question through the file's own chat template."""
        rendered = self._post("/apply-template", {"messages": [{"role": "user", "content": question}]})["prompt"]
        return self.tokenize(rendered, special=True)

    def next_token(self, ids: list[int], count: int = 20) -> NextToken | None:
        """What follows `ids`; None where llama.cpp withholds it, because the token is only part of a UTF-8 character
        or ends the answer."""
        answer = self._server.handle_completions(
            {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": count, "cache_prompt": False}
        )
        if "error" in answer:
            raise RuntimeError(f"llama.cpp: {answer['error']}")
        content = (answer["choices"][0].get("logprobs") or {}).get("content")
        if not content:
            return None
        logprobs = {int(t["id"]): float(t["logprob"]) for t in content[0]["top_logprobs"]}
        return NextToken(max(logprobs, key=lambda token: logprobs[token]), logprobs)
