"""A model in training answers its held-out questions: each rank its share, any number the same whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.evaluation.results import ItemResult
from ray_pipeline.records.integrity import unsealed
from ray_pipeline.rollouts import teams
from ray_pipeline.settings.run_folder import HELDOUT_FILE, SAMPLES_FILE
from ray_pipeline.settings.schema import ToolsConfig
from ray_pipeline.training import heldout
from ray_pipeline.training.heldout import HeldOut
from ray_pipeline.training.sampling_model import WholeModel
from tests.evaluation.made_models import TEXT, TINY

QUESTIONS = [
    {"prompt": f"What is {i}+{i}?", "answer": str(2 * i), "category": "ab"[i % 2], "difficulty": 1} for i in range(7)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_trained(train_bpe(TEXT * 20, TINY.vocab_size), folder / "tokenizer")
    (folder / "prompts").mkdir()
    (folder / "prompts" / "heldout.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return folder


def held_out(data: Path, folder: Path, rank: int, world: int, config: ModelConfig = TINY) -> HeldOut:
    settings = SimpleNamespace(questions=300, max_new_tokens=6)
    made: Any = SimpleNamespace(
        data=data, folder=folder, device="cpu", stage="sft", is_main=rank == 0, phase=lambda *_: None,
        mesh=SimpleNamespace(rank=rank, world=world),
        config=SimpleNamespace(evaluation=settings, tools=ToolsConfig()),
        settings=SimpleNamespace(optimizer=SimpleNamespace(lr=0.1)),
    )  # fmt: skip
    state = Transformer(config)
    init_weights(state, config, seed=1)
    return HeldOut(made, WholeModel(made, config).load(state.state_dict()))


def answered(item: ItemResult) -> tuple[str, str, bool]:
    return item.prompt, item.answers[0].completion, item.answers[0].correct


def test_shares_of_the_ranks_make_the_whole(data, tmp_path, monkeypatch):
    monkeypatch.setattr(teams, "all_ranks_gather", lambda mesh, value: [value])
    whole = held_out(data, tmp_path, 0, 1).evaluate()
    assert [item.prompt for item in whole.items] == [q["prompt"] for q in QUESTIONS]
    parts: list[Any] = []
    for rank in range(3):
        # As if all had been gathered: the others' answers are not there yet, and nobody looks.
        monkeypatch.setattr(teams, "all_ranks_gather", lambda mesh, value: parts.append(value) or [value] * 3)
        held_out(data, tmp_path, rank, 3).evaluate()
    monkeypatch.setattr(teams, "all_ranks_gather", lambda mesh, value: parts)
    several = held_out(data, tmp_path, 0, 3).evaluate()
    assert list(map(answered, several.items)) == list(map(answered, whole.items))


def test_figures_are_those_of_the_samples_and_a_baseline_is_measured_once(data, tmp_path, monkeypatch):
    for module in (teams, heldout):
        monkeypatch.setattr(module, "all_ranks_gather", lambda mesh, value: [value])
    made = held_out(data, tmp_path, 0, 1)
    figures = made.figures()
    samples = unsealed((tmp_path / SAMPLES_FILE).read_bytes())["samples"]
    assert [s["prompt"] for s in samples] == [q["prompt"] for q in QUESTIONS]
    assert figures["questions"] == 7 and figures["accuracy"] == sum(s["correct"] for s in samples) / 7
    assert figures["answer_tokens"] == sum(s["tokens"] for s in samples) / 7
    kept = unsealed((tmp_path / HELDOUT_FILE).read_bytes())
    assert [mark for _, mark in kept["marks"]] == [float(s["correct"]) for s in samples]
    assert len({digest for digest, _ in kept["marks"]}) == 7 and set(kept["by_category"]) == {"a", "b"}
    assert made.baseline("input") == figures["accuracy"]
    monkeypatch.setattr(HeldOut, "evaluate", None)
    assert made.baseline("input") == figures["accuracy"]
