"""The model of a stage as it answers questions: a whole copy on every rank, or the shards that its ranks train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from model.build import part_over
from model.config import ModelConfig
from model.generate.decode import Decoder
from model.generate.sharded import ShardedDecoder
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.engine.engine import Engine
from ray_pipeline.evaluation.models import DecoderBackend, LanguageModel
from ray_pipeline.rollouts.teams import Teams, each_alone, replicas
from ray_pipeline.settings.run_folder import TOKENIZER
from ray_pipeline.training.rank import Rank


class SamplingModel(Protocol):
    """What answers.

    Attributes:
        teams: which ranks answer together.
    """

    rank: Rank
    tokenizer: ChatTokenizer
    teams: Teams

    @property
    def decoder(self) -> Decoder: ...

    def sync(self) -> None:
        """Answer with the weights that the engine has now, from the next call on."""
        ...


class WholeModel:
    """A copy of the sharded model on every rank; each answers alone.

    Args:
        engine: whose weights `sync` gathers; None for a model that `load` gave its weights once.
    """

    def __init__(self, rank: Rank, config: ModelConfig, engine: Engine | None = None):
        self.rank, self.engine, self.teams = rank, engine, each_alone(rank.mesh)
        self.model = Transformer(config).to(rank.device).eval().requires_grad_(False)
        self.decoder = Decoder(self.model)
        self.tokenizer = load_tokenizer(rank.data / TOKENIZER)

    def load(self, state: Mapping[str, Tensor]) -> WholeModel:
        """Take these weights."""
        self.model.load_state_dict(dict(state))
        self.decoder.refresh()
        return self

    def sync(self) -> None:
        if self.engine is not None:
            self.load(self.engine.full_state())


class ShardedModel:
    """The engine's own weights, read where they are by all ranks of a replica together."""

    def __init__(self, rank: Rank, engine: Engine):
        self.rank, self.engine, self.teams = rank, engine, replicas(rank.mesh)
        parts = [part_over(part, rank.mesh) for part in engine.parts]
        self.decoder = ShardedDecoder(parts, engine.shards, rank.mesh, engine.options.schedule)
        self.tokenizer = load_tokenizer(rank.data / TOKENIZER)

    def sync(self) -> None:
        """It reads the engine's weights each time that it begins to answer."""


def sampling_model(rank: Rank, engine: Engine) -> SamplingModel:
    """What `layout.sampling` says of the model in training."""
    if rank.config.layout.sampling == "sharded":
        return ShardedModel(rank, engine)
    return WholeModel(rank, engine.config, engine)


def frozen_model(rank: Rank, config: ModelConfig, state: Mapping[str, Tensor]) -> SamplingModel:
    """The same for a model that is not trained."""
    if rank.config.layout.sampling == "sharded":
        return ShardedModel(rank, rank.engine(config, initial=state))
    return WholeModel(rank, config).load(state)


def described(model: SamplingModel) -> tuple[str, str]:
    """What a message calls it, and what to do when its logits are no numbers."""
    stage = model.rank.stage
    advice = f"Lower {stage}.optimizer.lr ({model.rank.settings.optimizer.lr}), or train the stage before it again."
    return f"the model of stage {stage}", advice


def language_model(model: SamplingModel) -> LanguageModel:
    """It as evaluation asks it."""
    backend = DecoderBackend(model.decoder)
    return LanguageModel("the model in training", model.tokenizer, frozenset({model.tokenizer.eos_id}), backend)
