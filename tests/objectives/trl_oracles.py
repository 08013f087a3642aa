"""TRL's own losses and advantages on tensors of ours: its methods run on a trainer that has what they read, no more."""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

from ray_pipeline.data.rows.batch import IGNORE, Batch


class Accelerator(SimpleNamespace):
    """One process."""

    device = torch.device("cpu")
    process_index, num_processes, is_main_process = 0, 1, True

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


def padded(values: Tensor, batch: Batch) -> Tensor:
    """A row per answer, its labelled places first: [rows, seq] -> [answers, longest], zero behind."""
    found = [
        values[row][(batch.doc_ids[row] == document) & (batch.labels[row] != IGNORE)]
        for row in range(len(batch))
        for document in range(int(batch.doc_ids[row].max()) + 1)
    ]
    return torch.nn.utils.rnn.pad_sequence([answer for answer in found if len(answer)], batch_first=True)


def grpo_loss(
    logprobs: Tensor, batch: Batch, *, micro_batches: int = 1, correction: dict[str, Any] | None = None, **settings: Any
) -> tuple[Tensor, dict]:
    """What GRPOTrainer minimises in a step of `micro_batches` with as many answers each, and what it logs.

    Args:
        logprobs: of the labels, [rows, seq].
        correction: its `vllm_importance_sampling_*` settings, without that beginning; None: answers of its own sampler.
    """
    args = {"use_bias_correction_kl": True} | {k: settings.pop(k) for k in ("use_bias_correction_kl",) if k in settings}
    trainer = SimpleNamespace(
        **{"beta": 0.0, "loss_type": "dapo", "importance_sampling_level": "token", "max_completion_length": 12,
           "off_policy_mask_threshold": None} | settings,
        top_entropy_quantile=1.0, aux_loss_enabled=False, use_vllm=correction is not None,
        vllm_importance_sampling_correction=True, get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        args=SimpleNamespace(delta=None, steps_per_generation=micro_batches, **args),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=micro_batches,
        accelerator=Accelerator(), _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda model, ids, *_, **__: (model, torch.zeros(model.shape), None)
    given = {name: padded(values, batch) for name, values in batch.extras.given().items()}
    trained = torch.ones(batch.labels.shape) if batch.extras.trained is None else batch.extras.trained
    mask, new = padded(trained, batch), padded(logprobs, batch)
    old = given.get("old_logprobs", new.detach())
    size = len(mask) // micro_batches
    assert size * micro_batches == len(mask)
    if correction is not None:
        given["ratio"] = correction_weights(old, given["sampler_logprobs"], mask, **correction)
    total = torch.zeros(())
    for part in (slice(start, start + size) for start in range(0, len(mask), size)):
        inputs = {
            "prompt_ids": mask[part, :0], "prompt_mask": mask[part, :0], "completion_ids": mask[part].long(),
            "completion_mask": mask[part], "advantages": given["advantages"][part, 0],
            "ref_per_token_logps": given["ref_logprobs"][part], "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        if "old_logprobs" in given:
            inputs["old_per_token_logps"] = old[part]
        if correction is not None:
            inputs["importance_sampling_ratio"] = given["ratio"][part]
            inputs["sampling_per_token_logps"] = given["sampler_logprobs"][part]
        total = total + GRPOTrainer._compute_loss(trainer, new[part], inputs)
    return total, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def correction_weights(old: Tensor, sampled: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """What GRPOTrainer weighs each answer's tokens by, of log-probabilities [answers, longest].

    Args:
        settings: mode, clip_min, clip_max.
    """
    answers, longest = mask.shape
    settings = {f"vllm_importance_sampling_{name}": value for name, value in settings.items()}
    trainer = scoring_trainer(answers, 2, use_vllm=True, vllm_importance_sampling_correction=True, **settings)
    ids = [[1] * longest] * answers
    made = ([[1, 2]] * answers, ids, mask.long().tolist(), [""] * answers, sampled.tolist(), {}, None, None)
    trainer._generate = lambda prompts: made
    trainer._calculate_rewards = lambda *_: torch.zeros(answers, 1)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (old, None, None)
    scored = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "?"}] * answers)
    return scored["importance_sampling_ratio"]


def dpo_loss(logprobs: Tensor, batch: Batch, **settings: Any) -> tuple[Tensor, dict]:
    """DPOTrainer's mean over pairs, and what it logs.

    Args:
        logprobs: of the labels, [rows, seq].
    """
    pairs = int(batch.extras.pair.max()) + 1

    def joined(values: Tensor) -> Tensor:
        """A row per answer: the chosen of every pair, then the rejected."""
        labelled = batch.labels != IGNORE
        found = [
            values[labelled & (batch.extras.pair == pair) & (batch.extras.chosen == chosen)]
            for chosen in (1.0, 0.0)
            for pair in range(pairs)
        ]
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)

    mask = joined(torch.ones(batch.labels.shape))
    # The first token of a row is predicted by none.
    full_mask, zeros = torch.nn.functional.pad(mask, (1, 0)), torch.zeros(mask.shape)
    outputs = SimpleNamespace(
        log_probs=joined(logprobs), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
    )
    trainer = SimpleNamespace(
        **{"beta": 0.1, "label_smoothing": 0.0} | settings, loss_weights=[1.0], ld_alpha=None, aux_loss_enabled=False,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, _tp_size=1,
        _total_train_tokens=0, model=SimpleNamespace(training=True), accelerator=Accelerator(),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    reference = joined(batch.extras.ref_logprobs).sum(1)
    inputs = {
        "input_ids": full_mask.long(), "attention_mask": full_mask, "completion_mask": full_mask,
        "ref_chosen_logps": reference[:pairs], "ref_rejected_logps": reference[pairs:],
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def generalized_jsd(
    student: Tensor, teacher: Tensor, labels: Tensor, *, beta: float, temperature: float = 1.0
) -> Tensor:
    """GKDTrainer's mean over labelled tokens, of logits [rows, seq, vocab]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL calls all of it experimental
        from trl.experimental.gkd import GKDTrainer
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)


def scoring_trainer(answers: int, group_size: int, **settings: Any) -> SimpleNamespace:
    """What `_generate_and_score_completions` reads of a trainer."""
    trainer = SimpleNamespace(
        **{"scale_rewards": "group", "beta": 0.0, "use_vllm": False} | settings,
        accelerator=Accelerator(), model=SimpleNamespace(training=True), environment_factories=None, tools=None,
        environments=None, _tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None,
        mask_truncated_completions=False, num_generations=group_size, reward_clip_range=None,
        multi_objective_aggregation="sum_then_normalize", reward_weights=torch.ones(1), reward_func_names=["r"],
        reward_funcs=[None], normalize_advantages=False, _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list)), _pending_extra_logs={}, _pending_metrics={},
        log_multimodal=False, num_iterations=1,
        args=SimpleNamespace(
            per_device_train_batch_size=answers, gradient_accumulation_steps=1, steps_per_generation=1,
            gradient_checkpointing_kwargs=None,
        ),
    )  # fmt: skip
    trainer.model.is_gradient_checkpointing = False
    return trainer


def advantages(rewards: Tensor, group_size: int, *, rloo: bool = False, **settings: Any) -> Tensor:
    """What GRPOTrainer or RLOOTrainer makes of rewards [prompts * group_size]; NaN where there is none."""
    answers = len(rewards)
    ids = [[1, 2]] * answers
    trainer = scoring_trainer(answers, group_size, **settings)
    trainer._calculate_rewards = lambda *_: rewards.unsqueeze(1)
    made = (ids, ids, [""] * answers) if rloo else (ids, ids, None, [""] * answers, None, {}, None, None)
    trainer._generate = lambda prompts: made
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (torch.zeros(answers, 2), None, None)
    kind = RLOOTrainer if rloo else GRPOTrainer
    return kind._generate_and_score_completions(trainer, [{"prompt": "?"}] * answers)["advantages"]
