"""Tasks by name: what files may hold, how they are found, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.graders import AnswerScoring
from ray_pipeline.evaluation.tasks import Item, Request, Task, known_tasks, make_task, make_tasks, task
from ray_pipeline.evaluation.tasks import catalog as registry


def lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_every_task_says_what_it_asks() -> None:
    entries = known_tasks()
    suites = {"arithmetic", "algebra", "word_problems", "equations", "logic", "programming", "science", "reasoning"}
    files = {"gsm8k", "math500", "humaneval", "choices", "heldout", "lm_eval", "reasoning_gym"}
    assert suites | files <= set(entries) and list(entries) == sorted(entries)
    assert all(entry.summary.endswith(".") or "(" in entry.summary for entry in entries.values())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("arithmetics", 'did you mean "arithmetic"'),
        ("arithmetic:3", "takes nothing behind a colon"),
        ("heldout", "the model is not of a run"),
        ("questions", "name the file"),
        ("gsm8k:missing.jsonl", "missing.jsonl: no such file"),
        ("gsm8k:not-a-name", "no such file"),
        ("lm_eval", "name one of its tasks"),
        ("lm_eval:missing.yaml", "no such file"),
        ("reasoning_gym", "name one of its tasks"),
    ],
)
def test_what_cannot_be_asked_is_refused(given: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make_task(given, Request())


def test_tasks_are_named_once_and_at_all() -> None:
    with pytest.raises(UserError, match="logic is named twice"):
        make_tasks(["logic", "logic"], Request(limit=2))
    with pytest.raises(UserError, match="name at least one"):
        make_tasks([], Request())
    assert [made.name for made in make_tasks(["logic", "algebra"], Request(limit=2))] == ["logic", "algebra"]


def test_gsm8k_keeps_the_final_answer_and_counts_steps(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "g.jsonl",
        {"question": "How many?", "answer": "6*2=<<6*2=12>>12\n12+1=13\n#### 13"},
        {"question": "And now?", "answer": "#### 1,200"},
    )
    items = make_task(f"gsm8k:{path}", Request()).items
    assert [(i.id, i.prompt, i.reference, i.difficulty) for i in items] == [
        ("0", "How many?", "13", 2), ("1", "And now?", "1,200", 0)
    ]  # fmt: skip
    assert [i.id for i in make_task(f"gsm8k:{path}", Request(limit=1)).items] == ["0"]
    assert [i.id for i in make_task(f"gsm8k:{path}", Request(difficulties=(1, 2))).items] == ["0"]
    with pytest.raises(UserError, match="are of difficulty 0, 2"):
        make_task(f"gsm8k:{path}", Request(difficulties=(4,)))


def test_math500_reads_its_own_fields(tmp_path: Path) -> None:
    record = {"problem": "What is x?", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 3, "unique_id": "a/1"}
    [item] = make_task(f"math500:{lines(tmp_path / 'm.jsonl', record)}", Request()).items
    assert (item.id, item.reference, item.category, item.difficulty) == ("a/1", "\\frac{1}{2}", "Algebra", 3)
    assert item.prompt.startswith("What is x?") and "\\boxed{}" in item.prompt


@pytest.mark.parametrize("answer", [2, "C", "c", "earth"])
def test_choices_take_an_index_a_letter_or_the_text(answer: object, tmp_path: Path) -> None:
    record = {"question": "Which?", "choices": ["sun", "moon", "earth"], "answer": answer, "subject": "sky"}
    path = lines(tmp_path / "c.jsonl", record)
    [item] = make_task(f"choices:{path}", Request()).items
    assert item.prompt == "Which?\nA. sun\nB. moon\nC. earth\nAnswer with the letter alone."
    assert (item.options, item.reference, item.category) == (("A", "B", "C"), "C", "sky")
    [item] = make_task(f"cloze:{path}", Request()).items
    assert (item.prompt, item.options, item.reference) == ("Which?", ("sun", "moon", "earth"), "earth")
    made = make_task(f"choices_written:{path}", Request())
    assert (made.way, made.items[0].reference) == ("answers", "C")


def test_choices_of_arc_are_read(tmp_path: Path) -> None:
    record = {"question": "Which?", "choices": {"text": ["sun", "moon"], "label": ["1", "2"]}, "answerKey": "2"}
    [item] = make_task(f"choices:{lines(tmp_path / 'c.jsonl', record)}", Request()).items
    assert item.reference == "B"


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        (
            "choices",
            {"question": "a", "choices": ["x", "y"], "answer": 2},
            "t.jsonl:2: the answer 2 is none of the choices",
        ),
        ("choices", {"question": "a", "choices": ["x"], "answer": 0}, "t.jsonl:2: .* has 1 choices"),
        ("choices", {"question": "a", "answer": 0}, 't.jsonl:2: needs a field "choices"'),
        ("choices", {"choices": ["x", "y"], "answer": 0}, 't.jsonl:2: needs a field "question"'),
        ("gsm8k", {"question": "a"}, 't.jsonl:2: needs "question" and "answer"'),
        ("math500", {"problem": "a", "answer": ["1"]}, 't.jsonl:2: field "answer" must be text'),
        ("humaneval", {"prompt": "def f():", "entry_point": "f"}, 't.jsonl:2: needs a field "test"'),
    ],
)
def test_a_record_without_what_is_needed_is_named(name: str, record: dict, expected: str, tmp_path: Path) -> None:
    good = {
        "question": "q", "choices": ["x", "y"], "answer": "x" if name in ("gsm8k", "math500") else 1, "problem": "p",
        "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass",
    }  # fmt: skip
    path = lines(tmp_path / "t.jsonl", good, record)
    with pytest.raises(UserError, match=f"--tasks {name}: .*{expected}"):
        make_task(f"{name}:{path}", Request())


def test_a_damaged_line_and_an_empty_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n{"question": \n')
    with pytest.raises(UserError, match=r"t.jsonl:2: not valid JSON"):
        make_task(f"gsm8k:{path}", Request())
    path.write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        make_task(f"gsm8k:{path}", Request())
    path.write_text("\n\n")
    with pytest.raises(UserError, match="holds no questions"):
        make_task(f"gsm8k:{path}", Request())


def test_questions_without_levels_cannot_be_chosen_by_level(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"question": "a", "answer": "1"})
    with pytest.raises(UserError, match="have no difficulty"):
        make_task(f"questions:{path}", Request(difficulties=(1,)))


def capitals(request: Request) -> Task:
    """Capitals."""
    items = [Item(i, f"What is the capital of {place}?", name) for i, place, name in [("a", "Peru", "Lima")] * 2]
    return Task("capitals", items[: 1 + (request.argument == "twice")], AnswerScoring())


def test_a_task_registers_by_decorator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    task("capitals", takes="TIMES")(capitals)
    assert make_task("capitals", Request()).items[0].reference == "Lima"
    assert known_tasks()["capitals"].summary == "Capitals."
    with pytest.raises(UserError, match='two questions have the id "a"'):
        make_task("capitals:twice", Request())


BRINGS_TASKS = """
from ray_pipeline.evaluation.graders import AnswerScoring
from ray_pipeline.evaluation.tasks import Item, Task, task

def plain(request):
    return Task("plain", [Item("0", "What is 1+1?", "2")], AnswerScoring())

@task("brought", takes="X")
def brought(request):
    return Task("brought", [Item("0", "What is 1+1?", request.argument)], AnswerScoring())
"""


def test_a_task_registers_by_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    (tmp_path / "brings_tasks.py").write_text(BRINGS_TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("plain", "brought")
    entries = [importlib.metadata.EntryPoint(name, f"brings_tasks:{name}", registry.ENTRY_POINTS) for name in names]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    registry._load.cache_clear()
    assert make_task("plain", Request()).items[0].reference == "2"
    assert make_task("brought:7", Request()).items[0].reference == "7"
    entries.append(importlib.metadata.EntryPoint("broken", "no_such_module", registry.ENTRY_POINTS))
    registry._load.cache_clear()
    with pytest.raises(UserError, match=r'entry point "broken" .* cannot be loaded'):
        known_tasks()
    monkeypatch.undo()
    registry._load.cache_clear()


def test_reasoning_gym_is_generated_from_the_seed() -> None:
    pytest.importorskip("reasoning_gym")
    first, again = (make_task("reasoning_gym:chain_sum", Request(seed=3, limit=4)).items for _ in range(2))
    assert first == again and len(first) == 4
    assert json.loads(first[0].data["reference"])["answer"] == first[0].reference and first[0].category == "chain_sum"
    with pytest.raises(UserError, match='did you mean "countdown"'):
        make_task("reasoning_gym:countdow", Request())
