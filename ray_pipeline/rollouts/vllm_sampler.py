"""vLLM as a sampler, where it is installed and there is a GPU. Written against vLLM's documented RLHF interface
(`worker_extension_cls`, `LLM.collective_rpc`, `model.load_weights`).

Not run: there was no machine with vLLM and a GPU. What was run is `check_vllm`, and that without vLLM nothing here is
imported. One LLM to a process, on one GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert.hf import save_hf
from model.convert.hf_config import published_family, unpublished_reason
from model.convert.names import to_published
from ray_pipeline.artifacts import weights_digest
from ray_pipeline.data.tokenizer import load_tokenizer
from ray_pipeline.errors import UserError
from ray_pipeline.rollouts.decoder_sampler import SamplingRules
from ray_pipeline.rollouts.rollout import Sampled, SampleRequest

GPU_SHARE = 0.4  # of a GPU's memory; training has the rest


def check_vllm(config: ModelConfig, rules: SamplingRules, device: torch.device) -> None:
    """Raise UserError unless vLLM can sample this model, by these rules, here."""
    name = "grpo.rollout.engine=vllm"
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"{name}: vLLM is not installed. Use `pip install vllm`, or engine=native.")
    if device.type != "cuda":
        raise UserError(f"{name}: it samples on GPUs, and this run is on the CPU. Use engine=native.")
    if published_family(config) is None:
        raise UserError(f"{name}: {unpublished_reason(config)}, so vLLM cannot load it. Use engine=native.")
    others = {
        "replay_routing": rules.record_routing,
        "speculative": rules.speculative,
        "think_budget": rules.think_tokens is not None,
        "tools.names": bool(rules.tools.names),
    }
    for key, wanted in others.items():
        if wanted:
            raise UserError(f"{name}: works without grpo.{key} alone. Turn that off, or use engine=native.")


class WeightUpdates:
    """What vLLM's worker inherits from."""

    model_runner: Any
    model_config: Any
    device: torch.device

    def take_weights(self, config: ModelConfig, state: Mapping[str, Tensor]) -> str:
        """Load whole weights in place; the checksum of what arrived (what vLLM keeps is fused and cast)."""
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        family = published_family(config)
        assert family is not None
        self.model_runner.model.load_weights(weights=to_published(config, state, mtp=family.mtp).items())
        # MLA's absorbed projections are made of the loaded ones.
        process_weights_after_loading(self.model_runner.model, self.model_config, self.device)
        return weights_digest(state)


class VllmSampler:
    """An LLM in this process. It is made at the first `take`, from a Hugging Face folder in `folder`."""

    def __init__(self, config: ModelConfig, tokenizer: Path, rules: SamplingRules, folder: Path):
        self.config, self.tokenizer_folder, self.rules = config, tokenizer, rules
        self.folder = folder / str(os.getpid())
        self.eos_id = load_tokenizer(tokenizer).eos_id
        self._llm: Any = None

    def take(self, state: Mapping[str, Tensor]) -> str:
        if self._llm is None:
            self._llm = self._start(state)
        (held,) = self._llm.collective_rpc("take_weights", args=(self.config, dict(state)))
        self._llm.reset_prefix_cache()
        return str(held)

    def _start(self, state: Mapping[str, Tensor]) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker is this process: weights need no pickling
        from vllm import LLM

        self.folder.mkdir(parents=True, exist_ok=True)
        save_hf(self.folder, self.config, state, tokenizer_folder=self.tokenizer_folder, model_card="")
        return LLM(
            model=str(self.folder),
            worker_extension_cls=f"{__name__}.{WeightUpdates.__name__}",
            dtype="bfloat16",
            gpu_memory_utilization=GPU_SHARE,
            max_model_len=self.config.max_position_embeddings,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
        )

    def close(self) -> None:
        self._llm = None

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=self.rules.temperature, max_tokens=self.rules.max_new_tokens, seed=request.seed,
                logprobs=0, stop_token_ids=[self.eos_id], detokenize=False,
            )
            for request in requests
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        out = []
        for result in self._llm.generate(prompts, parameters, use_tqdm=False):
            (answer,) = result.outputs
            tokens = list(answer.token_ids)
            logprobs = [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]
            out.append(Sampled(tokens, logprobs, answer.finish_reason == "stop"))
        return out
