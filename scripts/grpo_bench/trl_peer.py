"""TRL's GRPOTrainer on the task, step by step on demand."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.grpo_bench.task import FIRST_STEP, LR, REWARDS, Task, read_prompts
from scripts.model_bench.competitors import build, theirs

BATCH = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
CHUNKS = 4  # micro-batches per update: 64 answers at a time is TRL's fastest here


def run(task: Task, folder: Path, attention: str, experts: str, wait: Callable[[], None],
        report: Callable[[dict[str, float]], None]) -> None:  # fmt: skip
    """Take a step after each `wait()` and give its seconds to `report`; the first one's batch goes to FIRST_STEP."""
    from transformers import TrainerCallback

    seconds: dict[str, float] = {}

    class Turns(TrainerCallback):
        """Lets the bench decide when a step starts."""

        def on_step_begin(self, *given: Any, **more: Any) -> None:
            wait()
            seconds.clear()
            seconds["start"] = time.perf_counter()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            seconds["total"] = time.perf_counter() - seconds.pop("start")

        def on_log(self, *given: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            if "advantages" in first:
                reached = {name: float(logs[name]) for name in ("loss", "grad_norm")}
                torch.save(first | reached, folder / FIRST_STEP)
                first.clear()
            total, rollouts, scoring = seconds["total"], seconds["rollouts"], seconds["scoring"]
            report({"seconds": total, "rollouts": rollouts, "scoring": scoring, "update": total - rollouts - scoring,
                    "tokens": float(logs["completions/mean_length"])})  # fmt: skip

    first: dict[str, Any] = {}
    trainer = _trainer(task, folder, attention, experts, Turns())
    _timed(trainer, "_generate", "rollouts", seconds)
    _timed(trainer, "_calculate_rewards", "scoring", seconds)
    _keep_first(trainer, first)
    trainer.train()


def _trainer(task: Task, folder: Path, attention: str, experts: str, turns: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left")
    peer = theirs(task.model, build(task.model), attention, experts)
    peer.generation_config.eos_token_id = tokenizer.eos_token_id
    peer.generation_config.pad_token_id = tokenizer.pad_token_id
    path = folder / f"peer-{attention}-{experts}"  # a reference model is loaded from a folder
    peer.save_pretrained(path)
    tokenizer.save_pretrained(path)
    questions = read_prompts(folder)
    rows = [{"prompt": [{"role": "user", "content": q["prompt"]}], "answer": str(q["answer"])} for q in questions]
    answers = task.prompts * task.group_size
    settings = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=answers // CHUNKS,
        gradient_accumulation_steps=CHUNKS, max_steps=len(rows) // task.prompts, num_generations=task.group_size,
        max_completion_length=task.max_new_tokens, learning_rate=LR, lr_scheduler_type="constant", beta=task.beta,
        weight_decay=0.0, max_grad_norm=1.0, adam_beta2=0.95, use_cpu=not torch.cuda.is_available(), report_to=[],
        save_strategy="no", logging_steps=1,
        reward_weights=list(REWARDS.values()), bf16=task.precision == "bf16", gradient_checkpointing=False,
        shuffle_dataset=False, disable_dropout=True, optim="adamw_torch_fused", disable_tqdm=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": attention, "experts_implementation": experts},
    )  # fmt: skip
    return GRPOTrainer(
        model=str(path), reward_funcs=[_reward(name) for name in REWARDS], args=settings,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[turns],
    )  # fmt: skip


def _reward(name: str) -> Any:
    """One of our reward functions with TRL's signature."""
    from ray_pipeline.rewards.registry import get_reward

    function = get_reward(name)

    def reward(prompts: list[Any], completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        given = zip(prompts, completions, answer, strict=True)
        return [function(prompt[-1]["content"], text[-1]["content"], a) for prompt, text, a in given]

    reward.__name__ = name
    return reward


def _timed(trainer: Any, method: str, name: str, seconds: dict[str, float]) -> None:
    """Add up the seconds spent in a method of the trainer."""
    function = getattr(trainer, method)

    def timed(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        out = function(*given, **named)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        return out

    setattr(trainer, method, timed)


def _keep_first(trainer: Any, first: dict[str, Any]) -> None:
    """Copy what the first step trains on into `first`."""
    function, done = trainer._generate_and_score_completions, []

    def kept(inputs: Any) -> Any:
        out = function(inputs)
        if not done:
            done.append(True)
            first.update({name: out[name].clone() for name in BATCH})
            first["answers"] = [row["answer"] for row in inputs]
        return out

    trainer._generate_and_score_completions = kept
