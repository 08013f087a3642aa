"""A small model with random weights, saved as EXPORT saves one, and servers of it on free ports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import uvicorn

from model.convert.gguf import save_gguf
from model.convert.hf import save_hf
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.cli.served_model import find_served
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.serving.engines import EngineSettings, RunningEngine, known_engines
from ray_pipeline.serving.guard import GuardRules
from ray_pipeline.serving.http_server import bind, server_config
from ray_pipeline.tools.format import render_calls
from tests.evaluation.made_models import EXPORTABLE

UP_SECONDS = 240  # Ray and two processes that import torch, on a machine with other work
THINKS_OFTEN = 4.0  # factor of the marks' rows in the output matrix


def save_model(folder: Path) -> Path:
    """A Hugging Face folder whose answers differ from prompt to prompt and hold marks of thinking."""
    tokenizer = folder.parent / "tokenizer"
    save_trained(train_bpe(["What is the larger of 12 and 34? Solve this and that."] * 20, 320), tokenizer)
    model = Transformer(EXPORTABLE)
    init_weights(model, EXPORTABLE, seed=4)
    with torch.no_grad():
        model.lm_head.weight[:7] *= 0.1
        model.lm_head.weight[318:] *= THINKS_OFTEN
    folder.mkdir()
    save_hf(folder, EXPORTABLE, model.state_dict(), tokenizer_folder=tokenizer, model_card="# t\n")
    return folder


def save_drafting(root: Path, modules: int) -> Path:
    """A random model with so many MTP modules, in F32: llama.cpp rounds drafts and single tokens differently."""
    save_trained(train_bpe(["What is the larger of 12 and 34? Solve this and that."] * 20, 320), root / "tokenizer")
    config = replace(EXPORTABLE, num_nextn_predict_layers=modules, max_position_embeddings=512)
    model = Transformer(config)
    init_weights(model, config, seed=4)
    save_gguf(
        root / "m.gguf", config, model.state_dict(), kind="f32", tokenizer_folder=root / "tokenizer", name="m",
        licence="unknown", end_ids=[],
    )  # fmt: skip
    return root / "m.gguf"


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
ADD_QUESTION = [{"role": "user", "content": "What is 4 + 3?"}]
ADD_CALL = render_calls([("add", {"a": 4, "b": 3})])


def save_caller(folder: Path) -> Path:
    """A model that knows one call of a tool by heart: `ADD_CALL`, asked `ADD_QUESTION` with `ADD` on offer."""
    tokenizer_folder = folder.parent / "tokenizer"
    texts = [json.dumps(ADD), "What is the larger of 12 and 34? 4 + 3"] * 20
    save_trained(train_bpe(texts, 340, tools=True), tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    config = replace(EXPORTABLE, vocab_size=340, max_position_embeddings=512)
    model = Transformer(config)
    init_weights(model, config, seed=0)
    prompt = tokenizer.encode_prompt(ADD_QUESTION, [ADD])
    answer = [*tokenizer.encode(ADD_CALL), tokenizer.eos_id]
    ids = torch.tensor([prompt + answer])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for _ in range(80):
        logits = model(ids[:, :-1])[0, len(prompt) - 1 :]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    folder.mkdir()
    save_hf(folder, config, model.state_dict(), tokenizer_folder=tokenizer_folder, model_card="# t\n")
    return folder


def start(folder: Path, engine: str, *, slots: int = 4) -> RunningEngine:
    """An engine with the model loaded."""
    return known_engines()[engine].start(find_served(str(folder), folder.parent / "runs"), EngineSettings(slots))


@contextmanager
def serving(running: RunningEngine, *, api_key: str | None = None) -> Iterator[str]:
    """Its address while it is served."""
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(server_config(running.app, GuardRules(api_key)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        running.stop()


@contextmanager
def verb_serving(folder: Path, *words: str, environment: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Address and process id of `serve FOLDER WORDS` in a process of its own."""
    log = folder.parent / "serve.log"
    command = [sys.executable, "-m", "ray_pipeline.cli", "serve", str(folder), *words, "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    clock = threading.Timer(UP_SECONDS, process.kill)
    clock.start()
    assert process.stdout is not None
    found = next((m for line in process.stdout if (m := re.search(r"chat page +(\S+)/", line))), None)
    clock.cancel()
    assert found is not None, log.read_text()[-3000:]
    try:
        yield found[1], process.pid
    finally:
        process.kill()
        process.wait()
