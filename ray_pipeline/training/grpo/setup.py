"""What GRPO's rollouts are made of in one run: questions, rewards, the engine that samples, all from the settings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.tasks.question import prepared_questions
from ray_pipeline.engine.engine import Engine
from ray_pipeline.errors import UserError
from ray_pipeline.hardware import num_cpus
from ray_pipeline.objectives.grpo import Grpo
from ray_pipeline.objectives.sampler_gap import Correction, SamplerGap
from ray_pipeline.rewards.scoring import Scorer, Scores
from ray_pipeline.rewards.self_test import check_rewards
from ray_pipeline.rollouts.collector import Collector, Question, Score
from ray_pipeline.rollouts.decoder_sampler import DecoderSampler, SamplingRules
from ray_pipeline.rollouts.ray_engine import RayEngine
from ray_pipeline.rollouts.samplers import InRankEngine, RolloutEngine, Sampler, from_main, share_rows
from ray_pipeline.settings.run_folder import TOKENIZER, TRAIN_QUESTIONS
from ray_pipeline.settings.schema import GrpoConfig, ToolsConfig
from ray_pipeline.tools.toolbox import listed_tools
from ray_pipeline.training.grpo.reference import Reference
from ray_pipeline.training.grpo.rollout_batch import BatchBuilder
from ray_pipeline.training.grpo.rollout_source import RolloutSource
from ray_pipeline.training.rank import Rank
from ray_pipeline.training.sampling_model import SamplingModel


@contextmanager
def rollout_source(
    rank: Rank, policy: Engine, model: SamplingModel, initial: Mapping[str, Tensor], gap: SamplerGap
) -> Iterator[RolloutSource]:
    """The source of a GRPO stage; actors and scoring processes end with the block.

    Args:
        policy: what is trained. model: it as it answers, for sampling in the ranks. initial: the reference's weights.
    Raises:
        UserError: a setting that cannot work, no prompt that fits, or rewards that mark reference answers wrong.
    """
    settings, tokenizer = rank.config.grpo, model.tokenizer
    asked = prepared_questions(rank.data / TRAIN_QUESTIONS)
    questions = fitting_questions(asked, tokenizer, settings, rank.config.data.seq_len, listed_tools(rank.config.tools))
    left_out = len(asked) - len(questions)
    with ExitStack() as stack:
        score = _rewards(rank, asked, tokenizer, stack)
        sampling = rollout_engine(rank, model, policy.config)
        stack.callback(sampling.close)
        collector = Collector(settings, rank.config.seed, questions, sampling, score, tokenizer, rank.phase)
        reference = _reference(rank, policy.config, initial) if settings.beta else None
        builder = BatchBuilder(
            settings, policy, reference, rank.config.data.seq_len, tokenizer.pad_id, rank.config.seed
        )
        yield RolloutSource(rank, policy, model, sampling, collector, builder, gap, left_out=left_out)


def _rewards(rank: Rank, asked: list[dict[str, Any]], tokenizer: ChatTokenizer, stack: ExitStack) -> Score:
    """The rewards, tried on reference answers. Rank 0 alone calls them, and tells the others.

    Raises:
        UserError: a right answer does not score full, or a wrong one not 0.
    """
    settings = rank.config.grpo
    scorer = stack.enter_context(Scorer(settings.rewards, settings.scoring)) if rank.is_main else None
    from_main(rank.mesh, lambda: check_rewards(settings.rewards, asked, tokenizer, settings.scoring))

    def score(items: Sequence[tuple[str, str, str]]) -> Scores:
        def mark() -> Scores:
            assert scorer is not None
            return scorer.score(items)

        return from_main(rank.mesh, mark)

    return score


def fitting_questions(
    asked: list[dict[str, Any]],
    tokenizer: ChatTokenizer,
    settings: GrpoConfig,
    seq_len: int,
    listed: Sequence[dict[str, Any]] = (),
) -> list[Question]:
    """Questions whose longest possible answer fits into a row with them; the others are left out.

    Args:
        listed: tools that every prompt describes.
    Raises:
        UserError: none fits.
    """
    prompts = [tokenizer.encode_prompt(question["prompt"], listed) for question in asked]
    room = seq_len + 1 - settings.max_new_tokens  # a rollout's last token takes no place
    if not any(len(prompt) <= room for prompt in prompts):
        shortest = min(map(len, prompts), default=0)
        raise UserError(
            f"grpo.max_new_tokens={settings.max_new_tokens}: none of {len(asked)} prompts (the shortest has {shortest} "
            f"tokens) fits with such an answer into data.seq_len={seq_len}. Use shorter answers, or longer rows with "
            "--seq-len."
        )
    return [
        Question(question["prompt"], str(question["answer"]), prompt)
        for question, prompt in zip(asked, prompts, strict=True)
        if len(prompt) <= room
    ]


def rollout_engine(rank: Rank, model: SamplingModel, config: ModelConfig) -> RolloutEngine:
    """The engine that `grpo.rollout` asks for.

    Raises:
        UserError: it cannot be had here.
    """
    settings, mesh, device = rank.config.grpo, rank.mesh, rank.device
    assert settings.rollout.engine == "native", "settings.checks refuses the others"
    rules = sampling_rules(settings, rank.config.tools)
    tokenizer, rollout = rank.data / TOKENIZER, settings.rollout
    if rollout.max_staleness and not rollout.workers:
        raise UserError(
            "grpo.rollout.max_staleness=1: the training ranks cannot sample while they train. Use --set "
            "grpo.rollout.workers=1 or more, or max_staleness=0."
        )
    build = functools.partial(DecoderSampler.build, config, tokenizer, rules, device)
    rows = share_rows(settings.prompts_per_step * settings.group_size, rollout.workers or len(model.teams.leaders))
    if rollout.workers:
        threads = torch.get_num_threads()  # as a rank has: with another number matrix products round otherwise
        if rollout.max_staleness:  # no rank samples the same, and they work beside the ranks
            threads = max(1, num_cpus() // (rollout.workers + mesh.world))
        return RayEngine(
            mesh, build, workers=rollout.workers, share_rows=rows, threads=threads,
            gpus=int(device.type == "cuda"),
        )  # fmt: skip
    own: Sampler = DecoderSampler(model.decoder, model.tokenizer, rules)
    return InRankEngine(model.teams, own, rows)


def objective_of(settings: GrpoConfig, gap: SamplerGap) -> Grpo:
    """What the settings say is minimised; `gap` is told of every step."""
    return Grpo(
        beta=settings.beta,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        temperature=settings.temperature,
        loss_type=settings.loss_type,
        importance_sampling_level=settings.importance_sampling_level,
        max_new_tokens=settings.max_new_tokens,
        correction=Correction(settings.sampler_correction, settings.correction_min, settings.correction_max),
        off_policy_threshold=settings.off_policy_threshold,
        unbiased_kl=settings.unbiased_kl,
        gap=gap,
    )


def sampling_rules(settings: GrpoConfig, tools: ToolsConfig) -> SamplingRules:
    """What the settings say of each answer."""
    return SamplingRules(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        think_tokens=settings.think_budget,
        speculative=settings.speculative,
        record_routing=settings.replay_routing,
        tools=tools,
    )


def _reference(rank: Rank, config: ModelConfig, initial: Mapping[str, Tensor]) -> Reference:
    settings = rank.config.grpo
    return Reference(
        rank, config, initial, every=settings.refresh_reference_every, updates=settings.steps_per_rollout,
        temperature=settings.temperature,
    )  # fmt: skip
