"""A model with tools is asked with their descriptions, and answers as it would in training."""

from __future__ import annotations

import pytest

from model.generate.decode import Completion, ToolUse
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.evaluation import asking
from ray_pipeline.evaluation.asking import AskSettings, ask
from ray_pipeline.evaluation.evaluate import evaluate
from ray_pipeline.evaluation.graders import AnswerScoring
from ray_pipeline.evaluation.model_source import ModelSource
from ray_pipeline.evaluation.models import LanguageModel, load
from ray_pipeline.evaluation.tasks import Item, Task
from ray_pipeline.records.artifacts import save_model
from ray_pipeline.settings.post_training import ToolsConfig
from ray_pipeline.tools.toolbox import listed_tools
from tests.evaluation.made_models import TINY

CALCULATOR = ToolsConfig(names=["calculator"])
ITEMS = [Item("0", "What is 12+34?", "46"), Item("1", "two", "2")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("tools")
    config = replace(TINY, vocab_size=400, max_position_embeddings=1024)
    weights = Transformer(config)
    init_weights(weights, config, seed=1)
    save_model(folder / "model", config, weights.state_dict())
    save_trained(train_bpe(["What is 12+34? two"] * 20, 400, tools=True), folder / "tokenizer")
    return load(ModelSource("toy", folder / "model", folder / "tokenizer", "stage"))


def test_a_model_that_calls_nothing_answers_as_it_does_to_the_described_prompt(model: LanguageModel) -> None:
    answers = ask(model, ITEMS, AskSettings(max_new_tokens=8, tools=CALCULATOR))
    prompts = [model.prompt(item.prompt, listed_tools(CALCULATOR)) for item in ITEMS]
    assert all("calculator" in model.tokenizer.decode(prompt) for prompt in prompts)
    written = model.backend.generate(prompts, max_new_tokens=8, temperature=0, seeds=[0, 0], eos_ids=model.eos_ids)
    texts = [model.text(prompt, answer.tokens) for prompt, answer in zip(prompts, written, strict=True)]
    assert [answer.completion for [answer] in answers] == texts
    assert [(answer.tool_calls, answer.valid_tool_calls) for [answer] in answers] == [(0, 0), (0, 0)]


def test_calls_are_counted(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(decoder: object, tokenizer: object, prompts: list, *args: object, **options: object) -> list[Completion]:
        tokens = model.tokenizer.encode("46")
        return [
            Completion(prompt, tokens, [0.0] * len(tokens), True, tools=ToolUse(calls=2, valid=1)) for prompt in prompts
        ]

    monkeypatch.setattr(asking, "answer_with_tools", called)
    found = evaluate(model, Task("sums", ITEMS, AnswerScoring()), AskSettings(tools=CALCULATOR))
    figures = found.figures()
    assert (figures["tool_calls"], figures["valid_tool_call_rate"], figures["accuracy"]) == (4, 0.5, 0.5)
