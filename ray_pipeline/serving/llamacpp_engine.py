"""The engine `llamacpp`: llama.cpp's own server in this process, behind the front door. Configured here, not rewritten.

It brings continuous batching, reuse of prefixes, chat completions, completions, responses, Anthropic's messages,
tools, grammars and metrics.
"""

from __future__ import annotations

import importlib.util
import secrets
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError
from ray_pipeline.hardware import num_cpus
from ray_pipeline.reasoning import OPEN
from ray_pipeline.serving.engines import EngineSettings, RunningEngine, ServedModel
from ray_pipeline.tools.format import TOOL_TOKENS

INSTALL = "xllamacpp is not installed: pip install 'ray-pipeline[serve]'"


DRAFTED = 2  # tokens at a time; the module drafts the second from its own state, which is less certain


class LlamaCppEngine:
    """See `Engine`."""

    name = "llamacpp"

    def missing(self) -> str | None:
        """See `Engine`."""
        return INSTALL if importlib.util.find_spec("xllamacpp") is None else None

    def why_not(self, model: ServedModel) -> str | None:
        """It runs .gguf files, and models of ours that GGUF can hold."""
        if (missing := self.missing()) is not None:
            return missing
        if model.gguf is not None:
            return None
        if model.config is None:
            return "only this project's architectures are converted to GGUF here; give a .gguf file of the model"
        from model.convert.gguf_rules import check_gguf
        from model.convert.gguf_tokenizer import read_tokenizer

        assert model.source is not None
        try:
            check_gguf(model.config)
            read_tokenizer(model.source.tokenizer, model.config.vocab_size)
        except ValueError as error:
            return str(error).partition(". Set export.gguf")[0].rstrip(".")
        return None

    def start(self, model: ServedModel, settings: EngineSettings) -> RunningEngine:
        """Load the GGUF file, made first where there is none."""
        from ray_pipeline.serving.door import Upstream, door_app
        from ray_pipeline.serving.gguf_file import gguf_context, gguf_drafts, gguf_of

        path = gguf_of(model)
        own = gguf_context(path)
        if settings.context is not None and own is not None and settings.context > own:
            raise UserError(f"--context {settings.context}: the model's own is {own}. Give at most that.")
        if settings.speculative and not gguf_drafts(path):
            raise UserError(f"--speculative: {path} holds no MTP module, which would draft. Leave the flag out.")
        context = settings.context or own or 4096
        key = secrets.token_urlsafe(24)  # pages in a browser could find its port, too
        try:
            server = _server(path, model.name, context, settings, key)
        except RuntimeError as error:
            raise UserError(f"{path}: llama.cpp does not load it ({error}). Try --engine native.") from None
        address = str(server.listening_address)
        running = [server]
        thinking = _opens_thinking(address, key)
        upstream = Upstream(self.name, model.name, address, key, context, thinking, _with_tools)
        return RunningEngine(self.name, door_app(upstream), running.clear)


def _with_tools(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"preserved_tokens": list(TOOL_TOKENS)}


def _opens_thinking(address: str, key: str) -> bool:
    """Whether the chat template ends a prompt with `<think>`, so that the model does not write it."""
    import httpx

    asked = {"messages": [{"role": "user", "content": "x"}]}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False) as client:
        prompt = str(client.post("/apply-template", json=asked).json().get("prompt", ""))
    return prompt.rstrip().endswith(OPEN)


def _server(path: Path, name: str, context: int, settings: EngineSettings, key: str) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {name}
    params.n_parallel = settings.slots
    params.n_ctx = context * settings.slots  # of all slots together
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads or num_cpus()
    params.warmup = False
    params.verbosity = -1
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.api_keys = [key]
    params.ui = False
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE  # the door parts it
    params.endpoint_metrics, params.endpoint_slots, params.endpoint_props = True, False, False
    # What a request does not say is as in OpenAI's API and in the other engines: nothing is cut.
    params.sampling.temp, params.sampling.top_k, params.sampling.top_p, params.sampling.min_p = 1.0, 0, 1.0, 0.0
    if settings.speculative:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        draft = params.speculative.draft
        draft.n_max = DRAFTED
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = params.cpuparams.n_threads
    return xllamacpp.Server(params)
