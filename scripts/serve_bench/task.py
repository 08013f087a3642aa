"""What every server of the benchmark serves, and what it is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch

from model.config import ModelConfig
from model.convert.gguf import save_gguf
from model.convert.hf import save_hf
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.text.builtin_text import KINDS
from scripts.model_bench.competitors import SHAPES, build

TEXT = ["What is the larger of 12 and 34? Solve this and that, then tell which of them was the first to be found."]
LEARNED, STEPS, MOST_LOSS = 160, 150, 0.1  # tokens of the text, steps, nats a token
NAME = "bench"  # of the model's folder, by which the servers of this project call it


@dataclass(frozen=True)
class Task:
    """Requests of `clients` at once, each for a greedy answer of exactly `tokens` tokens.

    Attributes:
        shape: of `model_bench`, with short training. each: requests that a client sends one after another.
        kind: of the built-in text whose beginnings are gone on with, by at most `tokens` tokens, in place of questions.
    """

    shape: str = "tiny"
    clients: tuple[int, ...] = (1, 8, 32)
    tokens: int = 64
    each: int = 1
    rounds: int = 5
    threads: int = 2
    checked: int = 8
    kind: str = ""

    @property
    def model(self) -> ModelConfig:
        """In fp32 for all: llama.cpp has no other precision in common with the rest on a CPU."""
        return replace(SHAPES[self.shape], max_position_embeddings=512)


TEXTS = {kind.__name__: kind for kind, _ in KINDS}


def prompt(task: Task, number: int) -> str:
    """What is asked at place `number`: a question, or the first third of a text of the kind."""
    if not task.kind:
        return question(number)
    text = TEXTS[task.kind](Random(number))
    return text[: len(text) // 3]


def question(number: int) -> str:
    """No two are alike, so that nothing is answered from a cache of prompts."""
    return f"What is the larger of {number * 7919 % 9973} and {number * 104729 % 9967}?"


def prepare(folder: Path, task: Task) -> tuple[Path, Path]:
    """The same weights as a Hugging Face folder and as a GGUF file.

    A random model's next tokens are nearly as likely as each other, and servers that round differently would write
    different texts: it learns one text by heart first. That goes on for longer than any answer here.
    """
    tokenizer_folder, hf, gguf = folder / "tokenizer", folder / NAME, folder / f"{NAME}.gguf"
    config = task.model
    save_trained(train_bpe(TEXT * 20, config.vocab_size), tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    model = build(config)
    _learn(model, tokenizer)
    hf.mkdir()
    save_hf(hf, config, model.state_dict(), tokenizer_folder=tokenizer_folder, model_card="", dtype=torch.float32)
    save_gguf(
        gguf, config, model.state_dict(), kind="f32", tokenizer_folder=tokenizer_folder, name=NAME, licence="unknown",
        end_ids=[tokenizer.eos_id],
    )  # fmt: skip
    return hf, gguf


def _learn(model: Transformer, tokenizer: ChatTokenizer) -> None:
    answer = tokenizer.encode(" ".join(TEXT * LEARNED))[:LEARNED]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for step in range(STEPS):
        prompt = tokenizer.encode_prompt([{"role": "user", "content": question(step)}])
        ids = torch.tensor([prompt + answer])
        logits = model(ids[:, :-1])[0, len(prompt) - 1 :]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if loss.item() > MOST_LOSS:
        raise RuntimeError(f"the model has not learned its text: loss {loss.item():.2f}")
