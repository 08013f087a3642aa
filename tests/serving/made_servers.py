"""A small model with random weights, saved as EXPORT saves one, and servers of it on free ports."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn

from model.convert.hf import save_hf
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.cli.served_model import find_served
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.serving.engines import EngineSettings, RunningEngine, known_engines
from ray_pipeline.serving.guard import Guard, GuardRules
from ray_pipeline.serving.http_server import bind
from tests.evaluation.made_models import EXPORTABLE

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


def start(folder: Path, engine: str, *, slots: int = 4) -> RunningEngine:
    """An engine with the model loaded."""
    return known_engines()[engine].start(find_served(str(folder), folder.parent / "runs"), EngineSettings(slots))


@contextmanager
def serving(running: RunningEngine, *, api_key: str | None = None) -> Iterator[str]:
    """Its address while it is served."""
    listening = bind("127.0.0.1", 0)
    config = uvicorn.Config(Guard(running.app, GuardRules(api_key)), log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
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
