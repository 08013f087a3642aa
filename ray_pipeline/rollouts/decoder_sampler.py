"""Our own sampler: a decoder of a whole Transformer or of shards, in a training rank or in an actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.generate.decode import Completion, Decoder, generate
from model.transformer import Transformer
from ray_pipeline.data.chat.completion_text import finite_logits, think_budget
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.records.artifacts import weights_digest
from ray_pipeline.rollouts.agent import answer_with_tools
from ray_pipeline.rollouts.rollout import SampleRequest
from ray_pipeline.settings.schema import ToolsConfig
from ray_pipeline.tools.toolbox import ToolBox


@dataclass(frozen=True)
class SamplingRules:
    """What holds for every answer of a stage; picklable.

    Attributes:
        max_new_tokens: of an answer, what tools say included. think_tokens: of thinking, after which its end is forced.
        speculative: draft with the MTP modules. record_routing: note the experts of each token.
        tools: what the model may call, if anything.
    """

    max_new_tokens: int
    temperature: float = 1.0
    think_tokens: int | None = None
    speculative: bool = False
    record_routing: bool = False
    tools: ToolsConfig = field(default_factory=ToolsConfig)


class DecoderSampler:
    """Answers with what `decoder` decodes."""

    def __init__(self, decoder: Decoder, tokenizer: ChatTokenizer, rules: SamplingRules):
        self.decoder, self.tokenizer, self.rules = decoder, tokenizer, rules
        self.toolbox = ToolBox(rules.tools) if rules.tools.names else None

    @classmethod
    def build(cls, config: ModelConfig, tokenizer: Path, rules: SamplingRules, device: torch.device) -> DecoderSampler:
        """One with a model of its own, which has no weights before `take`."""
        model = Transformer(config).to(device).eval().requires_grad_(False)
        return cls(Decoder(model), load_tokenizer(tokenizer), rules)

    def take(self, state: Mapping[str, Tensor]) -> str:
        model = self.decoder.model
        model.load_state_dict(state)
        self.decoder.refresh()
        return weights_digest(model.state_dict())

    def idle(self) -> None:
        self.decoder.idle()

    def close(self) -> None:
        if self.toolbox is not None:
            self.toolbox.close()

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        with finite_logits("the policy of stage grpo", "Lower grpo.optimizer.lr, or train the stage before it again."):
            return self._sample(requests)

    def _sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        rules, prompts, seeds = self.rules, [r.prompt for r in requests], [r.seed for r in requests]
        options: dict[str, Any] = {
            "max_new_tokens": rules.max_new_tokens,
            "temperature": rules.temperature,
            "speculative": rules.speculative,
            "record_routing": rules.record_routing,
            "seeds": seeds,
            "max_batch": max(1, len(requests)),
        }
        if self.toolbox is not None:
            return answer_with_tools(
                self.decoder, self.tokenizer, prompts, self.toolbox, max_calls=rules.tools.max_calls,
                think_tokens=rules.think_tokens, **options,
            )  # fmt: skip
        think = think_budget(self.tokenizer, rules.think_tokens)
        return generate(self.decoder, prompts, eos_ids={self.tokenizer.eos_id}, think=think, **options)
