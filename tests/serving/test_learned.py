"""A model that learned something, used as its owner would: held-out questions asked through the API score what `eval`
scores, clients get streamed answers with thinking apart, and `chat` and `generate` answer.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import anthropic
import openai
import pytest

from ray_pipeline.cli import main
from ray_pipeline.data.tasks.mixes import make_question
from ray_pipeline.evaluation.marking import are_right

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).with_name("sums.yaml")
CONVERSATIONS, ASKED = 8500, 2000  # of the latter DATA_PREP holds out a fifth
LIMIT = 40  # tokens of an answer
ENGINES = ("llamacpp", "native")


def write_questions(folder: Path) -> None:
    """Sums of two numbers, all different: text and conversations with their working, and others without an answer."""
    rng, made = Random(0), {}
    while len(made) < CONVERSATIONS + ASKED:
        question = make_question("addition", 1, rng)
        made.setdefault(question.prompt, question)
    questions = list(made.values())
    asked, shown = questions[:ASKED], questions[ASKED:]
    (folder / "sums.txt").write_text("\n\n".join(f"{q.prompt} {q.steps} {q.answer}" for q in shown))
    chats = [[{"role": "user", "content": q.prompt}, {"role": "assistant", "content": q.completion}] for q in shown]
    (folder / "sums.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    lines = [json.dumps({"question": q.prompt, "answer": q.answer}) for q in asked]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folder of the run `sums`, which takes some minutes on two cores."""
    folder = tmp_path_factory.mktemp("learned")
    write_questions(folder)
    words = ["run", "--config", str(RECIPE), "--run-name", "sums", "--no-wandb", "--output-dir", str(folder)]
    for flag, name in (("--data", "sums.txt"), ("--sft-data", "sums.jsonl"), ("--prompt-data", "questions.jsonl")):
        words += [flag, str(folder / name)]
    done = subprocess.run([sys.executable, "-m", "ray_pipeline.cli", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def scored(runs, tmp_path_factory) -> float:
    """What `eval` says of the held-out questions."""
    report = tmp_path_factory.mktemp("eval") / "report.json"
    asked = ["eval", "sums", "--tasks", "heldout", "--output-dir", str(runs), "--json", str(report)]
    assert main([*asked, "--max-new-tokens", str(LIMIT)]) == 0
    [task] = json.loads(report.read_text())["tasks"]
    return float(task["figures"]["accuracy"])


@pytest.fixture(scope="module", params=ENGINES)
def engine(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def address(engine, runs) -> Iterator[str]:
    """Of the API of `serve RUN`, as it is typed."""
    words = ["-m", "ray_pipeline.cli", "serve", "sums", "--engine", engine, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, *words, "--output-dir", str(runs)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(runs / "cache")},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield next(line.split()[1] for line in process.stdout if line.strip().startswith("API"))
    finally:
        process.terminate()
        process.wait(60)


def questions_of(runs: Path) -> list[dict[str, str]]:
    (path,) = runs.glob("sums/data_prep-*/prompts/heldout.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_recipe_learns(scored):
    assert scored > 0.6


def test_held_out_questions_through_the_api_score_what_eval_scores(address, runs, scored):
    client = openai.OpenAI(base_url=address, api_key="none", timeout=600)
    [model] = client.models.list().data
    questions = questions_of(runs)
    assert len(questions) == 400

    def ask(question: dict[str, str]) -> tuple[str, str, str]:
        asked = [{"role": "user", "content": question["prompt"]}]
        made = client.chat.completions.create(model=model.id, messages=asked, max_tokens=LIMIT, temperature=0)
        return question["prompt"], made.choices[0].message.content or "", question["answer"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, questions))
    assert abs(sum(are_right(answers)) / len(answers) - scored) <= 0.01


def test_clients_get_streamed_answers_with_thinking_apart(engine, address, runs):
    question = questions_of(runs)[0]
    asked = [{"role": "user", "content": question["prompt"]}]
    client = openai.OpenAI(base_url=address, api_key="none", timeout=600)
    [model] = client.models.list().data
    thinking = answer = ""
    pieces = 0
    settings = {"model": model.id, "messages": asked, "max_tokens": LIMIT}
    for chunk in client.chat.completions.create(**settings, temperature=0, stream=True):
        for choice in chunk.choices:
            thinking += getattr(choice.delta, "reasoning_content", None) or ""
            answer += choice.delta.content or ""
            pieces += 1
    assert pieces > 3 and thinking and answer.strip().isdigit() and "think>" not in thinking + answer
    whole = client.chat.completions.create(**settings, temperature=0).choices[0].message
    assert (whole.reasoning_content, whole.content) == (thinking, answer)
    if engine == "native":  # it speaks OpenAI's language alone
        return
    theirs = anthropic.Anthropic(base_url=address.removesuffix("/v1"), api_key="none", timeout=600)
    with theirs.messages.stream(**settings, extra_body={"temperature": 0}) as stream:
        blocks = {block.type: getattr(block, block.type) for block in stream.get_final_message().content}
    assert blocks == {"thinking": thinking, "text": answer}


def test_generate_and_chat_answer(runs, capsys, monkeypatch):
    question = questions_of(runs)[0]["prompt"]
    assert main(["generate", "sums", "--output-dir", str(runs), "--chat", question]) == 0
    generated = capsys.readouterr().out
    assert "<think>" in generated and generated.strip()[-1].isdigit()
    monkeypatch.setattr(sys, "stdin", io.StringIO(question))
    assert main(["chat", "sums", "--output-dir", str(runs), "--max-new-tokens", str(LIMIT)]) == 0
    assert capsys.readouterr().out.strip()[-1].isdigit()
