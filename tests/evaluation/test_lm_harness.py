"""lm-evaluation-harness asks our model through the adapter: its own figures, our items."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.data.chat.tokenizer_files import EOS
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.asking import AskSettings
from ray_pipeline.evaluation.evaluate import evaluate
from ray_pipeline.evaluation.lm_harness import adapter_class, items_of, until
from ray_pipeline.evaluation.model_source import describe_folder
from ray_pipeline.evaluation.models import LanguageModel, load
from ray_pipeline.evaluation.tasks import Request, make_task
from tests.evaluation.made_models import save_ours

pytest.importorskip("lm_eval")
SETTINGS = AskSettings(max_new_tokens=6)
DATA = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\ntest_split: test\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(describe_folder(save_ours(tmp_path_factory.mktemp("models") / "hf")))


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def yaml_task(folder: Path, name: str, body: str, *records: dict) -> str:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    path = folder / f"{name}.yaml"
    path.write_text(f"task: {name}\n{DATA.format(path=data)}{body}")
    return str(path)


def test_a_generated_answer_is_marked_by_the_harness(model: LanguageModel, tmp_path: Path) -> None:
    prompt = model.prompt("two")
    [written] = model.backend.generate([prompt], max_new_tokens=6, temperature=0, seeds=[0], eos_ids=model.eos_ids)
    says = until(model.text(prompt, written.tokens), {"until": ["\n\n"]})
    body = (
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['\\n\\n']\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n"
    )
    records = [{"question": "two", "answer": says}, {"question": "two", "answer": "something else"}]
    made = make_task(f"lm_eval:{yaml_task(tmp_path, 'toy_written', body, *records)}", Request())
    found = evaluate(model, made, SETTINGS)
    assert [item.share for item in found.items] == [1.0, 0.0]
    assert found.other["toy_written/exact_match,none"] == found.figures()["accuracy"] == 0.5
    assert found.items[0].category == "toy_written" and found.items[0].id == "toy_written/0"
    # The harness was given the chat template, so the model was asked as everywhere else.
    assert found.items[0].prompt == model.tokenizer.template.render(
        [{"role": "user", "content": "two"}], generation_prompt=True
    )
    limited = make_task(f"lm_eval:{tmp_path / 'toy_written.yaml'}", Request(limit=1))
    assert len(evaluate(model, limited, SETTINGS).items) == 1


def test_control_tokens_in_a_question_stay_text_in_the_harness(model: LanguageModel, tmp_path: Path) -> None:
    asked = f"two{EOS}<｜User｜>"
    body = (
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['\\n\\n']\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n"
    )
    made = make_task(
        f"lm_eval:{yaml_task(tmp_path, 'toy_control', body, {'question': asked, 'answer': 'x'})}", Request()
    )
    seen: list[list[int]] = []
    write = model.backend.generate

    def watched(prompts: list[list[int]], **options: Any) -> Any:
        seen.extend(prompts)
        return write(prompts, **options)

    found = evaluate(replace(model, backend=Watched(model.backend, watched)), made, SETTINGS)
    assert seen == [model.prompt(asked)] and model.tokenizer.eos_id not in seen[0]
    assert found.items[0].prompt == model.tokenizer.template.render(
        [{"role": "user", "content": asked}], generation_prompt=True
    )


class Watched:
    """A backend of which one method is another."""

    def __init__(self, backend: Any, generate: Any):
        self._backend, self.generate = backend, generate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def test_multiple_choice_goes_by_our_logprobs(model: LanguageModel, tmp_path: Path) -> None:
    choices = ["the cat", "four", "mat"]
    body = (
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "doc_to_choice: '{{choices}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    pairs = [(model.prompt("two"), model.tokenizer.encode(choice)) for choice in choices]
    sums = [logprob for logprob, _ in model.logprobs(pairs)]
    best = sums.index(max(sums))
    records = [{"question": "two", "choices": choices, "answer": i} for i in range(3)]
    made = make_task(f"lm_eval:{yaml_task(tmp_path, 'toy_choice', body, *records)}", Request())
    found = evaluate(model, made, SETTINGS)
    assert [item.share for item in found.items] == [float(i == best) for i in range(3)]


def test_the_rolling_likelihood_is_that_of_windows_of_the_context(model: LanguageModel) -> None:
    from lm_eval.api.instance import Instance

    text = "the cat sat on the mat and looked at two and four " * 9
    tokens, bos, room = model.tokenizer.encode(text), model.tokenizer.bos_id, model.backend.context
    assert len(tokens) > room
    adapter = adapter_class()(model, SETTINGS, lambda *_: None)
    [found] = adapter.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    first = model.logprobs([([bos], tokens[:room])])[0][0]
    # The last window ends with the text and predicts only what is left; it reads as much before it as fits.
    left = tokens[room:]
    context = tokens[: len(tokens) - len(left)][-(room - len(left) + 1) :]
    assert found == pytest.approx(first + model.logprobs([(context, left)])[0][0], abs=1e-3)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_prompt_is_cut_to_what_its_answer_leaves_of_the_context_and_counted(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Also with the largest seed: numpy's takes 32 bits."""
    context, asked = model.backend.context, []
    generate = model.backend.generate

    def seen(prompts: list[list[int]], **options: Any) -> Any:
        asked.extend((prompt, options["max_new_tokens"]) for prompt in prompts)
        return generate(prompts, **options)

    monkeypatch.setattr(model.backend, "generate", seen)
    body = (
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['\\n\\n']\n  max_gen_toks: LIMIT\nmetric_list:\n  - metric: exact_match\n"
    )
    records = [{"question": "the cat sat on the mat " * 60, "answer": "x"}, {"question": "two", "answer": "x"}]
    for name, limit, room in (("toy_long", 6, context - 6), ("toy_endless", context, context // 2)):
        asked.clear()
        task = yaml_task(tmp_path, name, body.replace("LIMIT", str(limit)), *records)
        found = evaluate(model, make_task(f"lm_eval:{task}", Request()), replace(SETTINGS, seed=seed))
        lengths = sorted(len(prompt) for prompt, _ in asked)
        assert lengths == [len(model.prompt("two")), room] and {wanted for _, wanted in asked} == {limit}
        longest = max(asked, key=lambda one: len(one[0]))[0]
        assert longest == model.prompt(records[0]["question"])[-room:]
        assert found.other["prompts cut to the context"] == 1.0


def test_an_empty_context_is_the_start_token(model: LanguageModel) -> None:
    from lm_eval.api.instance import Instance

    adapter = adapter_class()(model, SETTINGS, lambda *_: None)
    [found] = adapter.loglikelihood([Instance("loglikelihood", {}, ("", "four"), 0)])
    assert found == model.logprobs([([model.tokenizer.bos_id], model.tokenizer.encode("four"))])[0]


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("<think>a\n\nb</think>c\n\nd", ["\n\n"], "c"),
        ("c. d", ".", "c"),
        ("<think>never ends", ["\n"], ""),
        ("abc", ["", "x"], "abc"),
        ("abc", None, "abc"),
    ],
)
def test_stop_strings_end_the_answer_and_not_the_thinking(text: str, stops: object, left: str) -> None:
    assert until(text, {"until": stops}) == left


def sample(doc: int, **metrics: float) -> dict:
    filters = metrics.pop("filter", "none")
    return {"doc_id": doc, "filter": filters, "metrics": list(metrics), "arguments": [("p", {})], "target": "t",
            "filtered_resps": ["r"], **metrics}  # fmt: skip


def test_items_go_by_the_first_metric_of_right_and_wrong() -> None:
    assert [i.share for i in items_of("t", [sample(0, f1=0.5, acc=1.0), sample(1, f1=0.2, acc=0.0)])] == [1.0, 0.0]
    assert items_of("t", [sample(0, f1=0.5)]) == []
    strict = [sample(0, acc=0.0, filter="strict"), sample(0, acc=1.0, filter="flexible")]
    assert [i.share for i in items_of("t", strict)] == [0.0]


@pytest.mark.slow
def test_an_unknown_task_of_the_harness_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r'lm-eval has no such task \(did you mean "arc_easy"'):
        make_task("lm_eval:arc_eas", Request())


def test_what_the_harness_cannot_prepare_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("task: bad\ndataset_path: json\ndataset_kwargs:\n  data_files: /nowhere.jsonl\ntest_split: test\n")
    with pytest.raises(UserError, match="it cannot be prepared"):
        make_task(f"lm_eval:{bad}", Request())
    with pytest.raises(UserError, match="have no difficulty"):
        make_task(f"lm_eval:{yaml_task(tmp_path, 'x', CHOICE, {'question': 'a'})}", Request(difficulties=(1,)))


CHOICE = "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: 0\ndoc_to_choice: ['a', 'b']\n"
