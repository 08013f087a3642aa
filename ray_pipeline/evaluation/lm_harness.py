"""lm-evaluation-harness asks our model: an adapter of its LM class, and its results as ours. Imported lazily."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_pipeline.data.chat.chat_layout import lay_out_prompt
from ray_pipeline.data.chat.control_text import without_marks
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.asking import AskSettings, Watch
from ray_pipeline.evaluation.models import LanguageModel
from ray_pipeline.evaluation.results import ItemResult, Sample, TaskResult
from ray_pipeline.reasoning import parse
from ray_pipeline.rollouts.rollout import request_seed


@functools.cache
def adapter_class() -> Any:
    """Subclass of `lm_eval.api.model.LM` over a `LanguageModel`."""
    base: Any = importlib.import_module("lm_eval.api.model").LM
    utils: Any = importlib.import_module("lm_eval.utils")

    class HarnessModel(base):  # type: ignore[misc]  # known at run time
        """Contexts come with the chat template written out: its control tokens are read as such, those that a question
        spells are marked as text (`data.control_text`)."""

        def __init__(self, model: LanguageModel, settings: AskSettings, watch: Watch):
            super().__init__()
            self.model, self.settings, self.watch = model, settings, watch
            self.cut = 0  # prompts that were too long, and lost their beginning
            self._device = model.backend.device

        @property
        def tokenizer_name(self) -> str:
            return self.model.name

        def chat_template(self, chat_template: bool | str = False) -> str:
            return self.model.tokenizer.template.source if chat_template else ""

        def apply_chat_template(
            self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            template = self.model.tokenizer.template
            if add_generation_prompt:
                return lay_out_prompt(template, chat_history, ())
            return template.marked(chat_history, ())

        def _context(self, text: str) -> list[int]:
            return self.model.tokenizer.encode_marked(text) or [self.model.tokenizer.bos_id]

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            more = self.model.tokenizer.encode_more
            pairs = [(self._context(context), more(text)) for context, text in (r.args for r in requests)]
            self.cut += sum(len(prompt) + len(text) > self.model.backend.context + 1 for prompt, text in pairs)
            return self.model.logprobs(pairs)

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            sums = []
            for (text,) in (r.args for r in requests):
                windows = utils.get_rolling_token_windows(
                    token_list=self.model.tokenizer.encode(text), prefix_token=self.model.tokenizer.bos_id,
                    max_seq_len=self.model.backend.context, context_len=1,
                )  # fmt: skip
                pairs = [utils.make_disjoint_window(window) for window in windows]
                sums.append(sum(logprob for logprob, _ in self.model.logprobs(pairs)))
            return sums

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            # Shortest first, in batches; requests with other settings are batches of their own.
            prompts = [self._context(r.args[0]) for r in requests]
            groups: dict[tuple[int, float], list[int]] = {}
            for i in sorted(range(len(requests)), key=lambda i: len(prompts[i])):
                groups.setdefault(self._limits(requests[i].args[1]), []).append(i)
            out: dict[int, str] = {}
            for (limit, temperature), indices in groups.items():
                size = self.settings.max_batch
                for batch in (indices[at : at + size] for at in range(0, len(indices), size)):
                    out |= self._write(batch, prompts, requests, limit, temperature)
            return [out[i] for i in range(len(requests))]

        def _limits(self, options: dict[str, Any]) -> tuple[int, float]:
            limit = int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.settings.max_new_tokens)
            drawn = options.get("do_sample", bool(options.get("temperature")))
            return limit, float(options.get("temperature") or 1.0) if drawn else 0.0

        def _write(
            self, indices: list[int], prompts: list[list[int]], requests: Sequence[Any], limit: int, temperature: float
        ) -> dict[int, str]:
            # The whole answer must fit behind its prompt; where it alone would not, the prompt keeps half.
            context = self.model.backend.context
            room = context - limit if limit < context else max(1, context // 2)
            self.cut += sum(len(prompts[i]) > room for i in indices)
            cut = [prompts[i][-room:] for i in indices]
            written = self.model.backend.generate(
                cut, max_new_tokens=limit, temperature=temperature, eos_ids=self.model.eos_ids,
                seeds=[request_seed(self.settings.seed, "harness", i) for i in indices],
            )  # fmt: skip
            self.watch(len(indices), sum(len(w.tokens) for w in written))
            texts = [self.model.text(p, w.tokens) for p, w in zip(cut, written, strict=True)]
            return {i: until(text, requests[i].args[1]) for i, text in zip(indices, texts, strict=True)}

    return HarnessModel


def until(text: str, options: dict[str, Any]) -> str:
    """The answer up to the first stop string; what was thought is left out and cannot end it."""
    answer = parse(text).answer or ""
    stops = options.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        answer = answer.partition(stop)[0] if stop else answer
    return answer


@dataclass(frozen=True)
class HarnessTask:
    """A task (or group) of the harness, loaded with its data.

    Attributes:
        tasks: the harness's own task objects by name.
    """

    name: str
    manager: Any
    tasks: dict[str, Any]
    limit: int | None

    def run(self, model: LanguageModel, settings: AskSettings, watch: Watch) -> TaskResult:
        """Let the harness evaluate the model.

        Raises:
            UserError: what the harness refuses.
        """
        evaluator = importlib.import_module("lm_eval.evaluator")
        started, adapter = time.perf_counter(), adapter_class()(model, settings, watch)
        try:
            found = evaluator.simple_evaluate(
                model=adapter, tasks=list(self.tasks.values()),
                task_manager=self.manager, limit=self.limit, bootstrap_iters=0, apply_chat_template=True,
                random_seed=settings.seed, numpy_random_seed=settings.seed % 2**32, torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"--tasks lm_eval:{self.name}: lm-eval refuses it ({error}).") from None
        items = [item for task, samples in found["samples"].items() for item in items_of(task, samples)]
        other = figures_of(found["results"]) | (
            {"prompts cut to the context": float(adapter.cut)} if adapter.cut else {}
        )
        return TaskResult(f"lm_eval:{self.name}", "harness", items, time.perf_counter() - started, other=other)


def items_of(task: str, samples: Sequence[dict[str, Any]]) -> list[ItemResult]:
    """One item per document, right or wrong by the task's first metric that is always 0 or 1; none without such.

    Of several filters the first one's results are taken.
    """
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    for metric in first[0]["metrics"] if first else []:
        values = [sample.get(metric) for sample in first]
        if all(isinstance(v, int | float) and v in (0, 1) for v in values):
            return [_item(task, sample, float(v)) for sample, v in zip(first, values, strict=True)]  # type: ignore[arg-type]
    return []


def _item(task: str, sample: dict[str, Any], value: float) -> ItemResult:
    prompt = sample["arguments"][0][0]
    answer = Sample(str(sample["filtered_resps"][0]), value == 1, value)
    return ItemResult(
        f"{task}/{sample['doc_id']}", without_marks(str(prompt)), str(sample["target"]), task, 0, [answer]
    )


def figures_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`{"task/metric,filter": value}` of everything that is a number."""
    return {
        f"{task}/{metric}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
