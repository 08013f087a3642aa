"""Groups of sampled answers with their rewards: a pure function of (weights, seed, step, questions)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model.generate.decode import Decoder, generate
from ray_pipeline.evaluation.chat import PromptTokenizer, completion_text, think_budget
from ray_pipeline.rewards.registry import get_reward
from ray_pipeline.rollouts.advantages import group_advantages
from ray_pipeline.rollouts.packing import pack_rollouts
from ray_pipeline.rollouts.rollout import Rollout, request_seed

__all__ = ["Rollout", "group_advantages", "pack_rollouts", "request_seed", "sample_groups"]


def sample_groups(
    decoder: Decoder,
    tokenizer: PromptTokenizer,
    questions: Sequence[dict[str, Any]],
    group_size: int,
    seed: int,
    step: int,
    *,
    indices: Sequence[int] | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    think_tokens: int | None = None,
    speculative: bool = False,
    weights: Mapping[str, float] | None = None,
    max_batch: int = 256,
) -> list[Rollout]:
    """Sample `group_size` answers to each question and mark them, in this process: for answers outside GRPO.

    Args:
        questions: {"prompt", "answer"}; this rank's slice of the step's questions.
        indices: their places among all questions of the step, so that a slice draws what the whole would; default:
            0, 1, 2, ...
        think_tokens: tokens of thinking after which its end is forced. speculative: draft with the MTP modules.
        weights: reward name to weight; default: answer 1.0, format 0.1.
    Returns:
        Question by question, `group_size` rollouts each.
    Raises:
        ValueError: for a prompt that fills the context.
    """
    weights = {"answer": 1.0, "format": 0.1} if weights is None else weights
    indices = range(len(questions)) if indices is None else indices
    rewards = {name: get_reward(name) for name in weights}
    prompts = [tokenizer.encode_prompt(q["prompt"]) for q in questions]
    which = [(i, sample) for i in range(len(questions)) for sample in range(group_size)]
    completions = generate(
        decoder, [prompts[i] for i, _ in which], max_new_tokens=max_new_tokens, eos_ids={tokenizer.eos_id},
        temperature=temperature, think=think_budget(tokenizer, think_tokens), speculative=speculative,
        seeds=[request_seed(seed, step, indices[i], s) for i, s in which], max_batch=max_batch,
    )  # fmt: skip
    out = []
    for (i, _), completion in zip(which, completions, strict=True):
        text = completion_text(tokenizer, completion.tokens)
        parts = {name: f(questions[i]["prompt"], text, str(questions[i]["answer"])) for name, f in rewards.items()}
        out.append(
            Rollout(
                prompt_ids=prompts[i],
                completion_ids=completion.tokens,
                logprobs=completion.logprobs,
                reward=sum(weights[name] * value for name, value in parts.items()),
                parts=parts,
                question_index=indices[i],
                finished=completion.finished,
                forced=completion.forced,
            )
        )
    return out
