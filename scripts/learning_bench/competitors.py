"""Who takes part: our engine with a recipe's settings, and three peers, all fed the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.core import document_mask, document_positions
from model.layers.loss import IGNORE
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.optimizer import build_optimizer, learning_rate
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import OptimizerConfig
from scripts.learning_bench.nanochat import NanochatGPT, Shape
from scripts.learning_bench.nanochat_optimizer import NanochatOptimizer

PEERS = ("nanochat", "llama", "transformers")
# nanochat's rates fall with the square root of the batch, tuned at 2^19 tokens; at 2,048 its own rule gives rates that
# are far too low. The factor is the best of a scan over 1, 4, 12 and 24 on tinyshakespeare.
NANOCHAT_RATES = 24.0
ADAMW = OptimizerConfig(lr=3e-3, warmup_steps=20, schedule="cosine")


class Competitor(Protocol):
    """A model with its optimizer.

    Attributes:
        num_params: weights that are trained, those of multi-token prediction among them.
    """

    num_params: int

    def train_step(self, batch: Batch, step: int) -> float:
        """Optimizer step `step` (from 0); the loss in nats per token."""
        ...

    def nats(self, batch: Batch) -> float:
        """Sum of -log p over the batch's labels, forward only."""
        ...


class Ours:
    """The engine on one rank, as PRETRAIN of the recipe drives it."""

    def __init__(self, recipe: Path, *, vocab_size: int, seed: int, steps: int):
        given = {"model.vocab_size": vocab_size, "tokenizer.vocab_size": vocab_size, "pretrain.steps": steps}
        config = load_config(recipe, given)
        self.settings, self.steps = config.pretrain, steps
        self.num_params = config.model.num_params()
        options = EngineOptions(
            seed=seed, optimizer=config.pretrain.optimizer, row_length=config.data.seq_len,
            micro_batch=config.layout.micro_batch or config.pretrain.batch_size,
        )  # fmt: skip
        self.engine = Engine(config.model, Mesh(MeshSizes()), options)
        self.objective = CrossEntropy(config.pretrain.mtp_loss_weight)

    def train_step(self, batch: Batch, step: int) -> float:
        self.engine.before_step(step)
        rate = learning_rate(self.settings.optimizer, step, self.steps)
        stats = self.engine.train_step(batch, self.objective, rate)
        return stats.metrics["cross_entropy"] / stats.weight

    def nats(self, batch: Batch) -> float:
        return self.engine.evaluate(batch, CrossEntropy(0.0)).metrics["cross_entropy"]


class Peer:
    """A plain training loop around a model that gives logits.

    Args:
        logits: of a batch. update: moves the weights by their gradients at a step, and takes the gradients away.
    """

    def __init__(self, model: nn.Module, logits: Callable[[Batch], Tensor], update: Callable[[int], None]):
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        self.logits, self.update = logits, update

    def train_step(self, batch: Batch, step: int) -> float:
        loss = self._sum(batch) / int((batch.labels != IGNORE).sum())
        loss.backward()
        self.update(step)
        return float(loss.detach())

    @torch.no_grad()
    def nats(self, batch: Batch) -> float:
        return float(self._sum(batch))

    def _sum(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch).flatten(0, 1), batch.labels.flatten(), reduction="sum")


def nanochat(*, vocab_size: int, seq_len: int, seed: int, steps: int, batch_size: int) -> Peer:
    """karpathy's GPT with its own optimizer."""
    model = NanochatGPT(Shape(vocab_size, seq_len=seq_len), seed)
    tokens = batch_size * seq_len
    optimizer = NanochatOptimizer(model, batch_tokens=tokens, steps=steps, rates=NANOCHAT_RATES)
    return Peer(model, lambda batch: model(batch.tokens, batch.doc_ids), optimizer.step)


def hugging_face(kind: str, *, vocab_size: int, seq_len: int, seed: int, steps: int) -> Peer:
    """transformers' Llama or DeepseekV3, with AdamW, a cosine and the initial scale of our tiny preset."""
    torch.manual_seed(seed)
    model = _llama(vocab_size, seq_len) if kind == "llama" else _deepseek(vocab_size, seq_len)
    model.train()
    optimizer = build_optimizer(dict(model.named_parameters()), ADAMW, Mesh(MeshSizes()))

    def logits(batch: Batch) -> Tensor:
        mask, places = document_mask(batch.doc_ids), document_positions(batch.doc_ids)
        found: Tensor = model(input_ids=batch.tokens, attention_mask=mask, position_ids=places, use_cache=False).logits
        return found

    def update(step: int) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(ADAMW, step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Peer(model, logits, update)


def _llama(vocab_size: int, seq_len: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=340, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=seq_len, tie_word_embeddings=False, initializer_range=0.09,
    )  # fmt: skip
    shape._attn_implementation = "sdpa"
    return LlamaForCausalLM(shape)


def _deepseek(vocab_size: int, seq_len: int) -> Any:
    """The tiny preset's model with one layer more in the place of multi-token prediction, which transformers lacks."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from model.config import ModelConfig
    from model.convert.hf_config import to_hf
    from ray_pipeline.settings.presets import PRESETS

    changed = {"num_hidden_layers": 7, "num_nextn_predict_layers": 0, "initializer_range": 0.09}
    shape = ModelConfig(vocab_size=vocab_size, max_position_embeddings=seq_len, **(PRESETS["tiny"] | changed))
    values = {key: value for key, value in to_hf(shape).items() if key not in ("architectures", "model_type")}
    settings = DeepseekV3Config(**values, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    settings._attn_implementation = "sdpa"
    model = DeepseekV3ForCausalLM(settings)
    model.set_experts_implementation("grouped_mm")
    return model


def build(name: str, *, vocab_size: int, seq_len: int, seed: int, steps: int, batch_size: int) -> Competitor:
    """A competitor by name: one of `PEERS`, or a recipe of ours."""
    if name == "nanochat":
        return nanochat(vocab_size=vocab_size, seq_len=seq_len, seed=seed, steps=steps, batch_size=batch_size)
    if name in PEERS:
        return hugging_face(name, vocab_size=vocab_size, seq_len=seq_len, seed=seed, steps=steps)
    return Ours(Path(name), vocab_size=vocab_size, seed=seed, steps=steps)
