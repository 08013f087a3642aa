"""Answers in several turns: what tools say is read and not trained, what was sampled stays token by token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.generate.decode import Completion, Decoder, ToolUse, generate
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.rows.batch import IGNORE
from ray_pipeline.errors import UserError
from ray_pipeline.rollouts import agent
from ray_pipeline.rollouts.agent import ToolTurns, answer_with_tools
from ray_pipeline.rollouts.packed_rows import pack_completions
from ray_pipeline.settings.schema import ToolsConfig
from ray_pipeline.tools.calls import ToolCall
from ray_pipeline.tools.format import CALLS_END, render_calls
from ray_pipeline.tools.toolbox import ToolBox
from tests.rollouts.samplers import CONFIG, save_tokenizer

LIMIT = 600


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tools"), tools=True))


@pytest.fixture(scope="module")
def toolbox():
    with ToolBox(ToolsConfig(names=["calculator"])) as box:
        yield box


def call(expression: str) -> str:
    return render_calls([("calculator", {"expression": expression})])


@dataclass
class Script:
    """Plays the model: what each answer says in each turn, as text; keeps what it was asked."""

    tokenizer: Any
    turns: dict[int, list[str]]  # by first token of the prompt
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, decoder, prompts, **given):
        self.asked.append({"prompts": [list(p) for p in prompts], **given})
        out = []
        for prompt, limit in zip(prompts, given["max_new_tokens"], strict=True):
            text = self.turns[prompt[0]].pop(0)
            tokens = self.tokenizer.encode(text)
            if tokens[-1] not in given["eos_ids"]:
                tokens.append(self.tokenizer.eos_id)
            tokens, count = tokens[:limit], len(self.asked)
            fed = len(prompt) + len(tokens) - 1
            routing = torch.full((fed, 2), count, dtype=torch.int16)
            out.append(Completion(prompt, tokens, [-1.0 * count] * len(tokens), len(tokens) < limit, routing=routing))
        return out


def play(monkeypatch, tokenizer, toolbox, turns: dict[int, list[str]], **settings):
    """The script's answers to prompts [first token, 7]."""
    script = Script(tokenizer, turns)
    monkeypatch.setattr(agent, "generate", script)
    decoder: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4 * LIMIT))
    prompts = [[first, 7] for first in turns]
    options = {"max_new_tokens": LIMIT, "max_calls": 3, "record_routing": True} | settings
    return answer_with_tools(decoder, tokenizer, prompts, toolbox, **options), script


def test_a_conversation_has_the_tokens_that_sft_trains_on(monkeypatch, tokenizer, toolbox):
    asked, used = "What is 12 * 34?", {"name": "calculator", "arguments": {"expression": "12*34"}}
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": used}]},
        {"role": "tool", "content": "408"},
        {"role": "assistant", "content": "<think>408</think>408"},
    ]
    ids, mask = tokenizer.encode_chat(messages)
    prompt = tokenizer.encode_prompt(asked)
    turns = {prompt[0]: [call("12*34"), "<think>408</think>408"]}
    script = Script(tokenizer, turns)
    monkeypatch.setattr(agent, "generate", script)
    decoder: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=LIMIT))
    (answer,) = answer_with_tools(decoder, tokenizer, [prompt], toolbox, max_new_tokens=150, max_calls=1)
    assert prompt + answer.tokens == ids
    assert answer.finished and answer.tools == ToolUse(1, 1, 0)
    closed = answer.tokens.index(tokenizer.encode(CALLS_END)[0])
    ours = [not forced for forced in answer.forced]
    ours[closed + 1] = True  # the turn ends at the call, so that its end token is written for the model
    assert ours == [bool(m) for m in mask[len(prompt) :]]


def test_each_answer_goes_on_with_what_its_own_tools_said(monkeypatch, tokenizer, toolbox):
    answers, script = play(monkeypatch, tokenizer, toolbox, {2: [call("2+3"), "5"], 3: ["no"], 4: [call("1/0"), "?"]})
    said = [tokenizer.decode([t for t, f in zip(a.tokens, a.forced, strict=True) if f]) for a in answers]
    assert "5" in said[0] and said[1] == "" and "Error" in said[2]
    assert [a.tools for a in answers] == [ToolUse(1, 1, 0), ToolUse(0, 0, 0), ToolUse(1, 1, 1)]
    assert all(a.finished for a in answers)
    first, second = script.asked
    # What is asked in the second turn is what was sampled in the first, and what the tools said: token by token.
    assert [p[0] for p in second["prompts"]] == [2, 4]
    for prompt, answer in zip(second["prompts"], (answers[0], answers[2]), strict=True):
        assert prompt == (prompt[:2] + answer.tokens)[: len(prompt)]
        own = len(prompt) - 2
        assert second["max_new_tokens"][[2, 4].index(prompt[0])] == LIMIT - own
        assert answer.logprobs[:own].count(0.0) == sum(answer.forced) == answer.forced[:own].count(True)
    assert not set(first["seeds"]) & set(second["seeds"])


def test_experts_of_earlier_turns_stay_as_they_were_sampled_with(monkeypatch, tokenizer, toolbox):
    (answer,), _ = play(monkeypatch, tokenizer, toolbox, {2: [call("2+3"), "5"]})
    first = 2 + len(tokenizer.encode(call("2+3"))) - 1
    assert len(answer.routing) == 2 + len(answer.tokens) - 1
    assert answer.routing[:first].unique().tolist() == [1] and answer.routing[first:].unique().tolist() == [2]


def test_tools_are_called_as_often_as_allowed_and_two_calls_of_a_turn_are_two(monkeypatch, tokenizer, toolbox):
    two = render_calls([("calculator", {"expression": "1+1"}), ("calculator", {"expression": "2+2"})])
    answers, _ = play(monkeypatch, tokenizer, toolbox, {2: [two, call("3+3"), call("4+4"), "never"], 3: [two, "2, 4"]})
    assert [a.tools for a in answers] == [ToolUse(4, 4, 0), ToolUse(2, 2, 0)]
    assert [a.finished for a in answers] == [False, True]
    assert answers[0].tokens[-1] == tokenizer.encode(CALLS_END)[0]


def test_a_call_that_cannot_be_read_is_told_to_the_model(monkeypatch, tokenizer, toolbox):
    broken, unknown = call("1").replace("{", "("), call("1").replace("calculator", "oracle")
    answers, _ = play(monkeypatch, tokenizer, toolbox, {2: [broken, "oh"], 3: [unknown, "oh"]})
    assert [a.tools for a in answers] == [ToolUse(1, 0, 1), ToolUse(1, 0, 1)]
    assert all("Error" in tokenizer.decode(a.tokens) and a.finished for a in answers)


def test_an_output_that_does_not_fit_ends_the_answer(monkeypatch, tokenizer, toolbox):
    limit = len(tokenizer.encode(call("2+3"))) + 5
    (answer,), script = play(monkeypatch, tokenizer, toolbox, {2: [call("2+3"), "x"]}, max_new_tokens=limit)
    assert len(script.asked) == 1 and not answer.finished and not any(answer.forced)


def test_only_the_models_own_tokens_are_trained(monkeypatch, tokenizer, toolbox):
    (answer,), _ = play(monkeypatch, tokenizer, toolbox, {2: [call("2+3"), "5"]})
    batch = pack_completions([answer], torch.ones(1), 256, tokenizer.pad_id)
    labels = batch.labels[0][batch.labels[0] != IGNORE].tolist()
    assert labels == [t for t, forced in zip(answer.tokens, answer.forced, strict=True) if not forced]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    model = Transformer(CONFIG)
    init_weights(model, CONFIG, seed=3)
    return Decoder(model.eval())


def test_without_a_call_answers_are_those_of_plain_sampling(decoder, tokenizer, toolbox):
    prompts, seeds = [[4, 5, 6 + i] for i in range(8)], list(range(50, 58))
    options: dict[str, Any] = {"max_new_tokens": 12, "seeds": seeds, "record_routing": True}
    ends = {tokenizer.eos_id, ToolTurns(tokenizer).calls_end}
    plain = generate(decoder, prompts, eos_ids=ends, **options)
    agents = answer_with_tools(decoder, tokenizer, prompts, toolbox, max_calls=1, **options)
    for one, other in zip(plain, agents, strict=True):
        assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
        assert torch.equal(one.routing, other.routing)


def test_log_probabilities_of_every_turn_are_of_the_sampling_policy(monkeypatch, decoder, tokenizer, toolbox):
    """A random model calls no tool, so a token that it likes is taken for the end of a call."""
    prompts, options = [[4, 5, 6 + i] for i in range(8)], {"temperature": 0.5, "max_new_tokens": 60}
    plain = generate(decoder, prompts, eos_ids={tokenizer.eos_id}, **options)  # type: ignore[arg-type]
    liked, _ = Counter(token for c in plain for token in c.tokens).most_common(1)[0]

    class Eager(ToolTurns):
        def __init__(self, tokenizer):
            super().__init__(tokenizer)
            self.calls_end = liked

    monkeypatch.setattr(agent, "ToolTurns", Eager)
    monkeypatch.setattr(agent, "parse_calls", lambda text: [ToolCall("calculator", {"expression": "1+1"})])
    answers = answer_with_tools(decoder, tokenizer, prompts, toolbox, max_calls=9, **options)  # type: ignore[arg-type]
    assert sum(any(a.forced) and not a.forced[-1] for a in answers) > 1, [a.tools for a in answers]
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = decoder.model(torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1 : -1] / 0.5
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        free = ~torch.tensor(answer.forced)
        torch.testing.assert_close(torch.tensor(answer.logprobs)[free], wanted[free], rtol=0, atol=1e-5)


def test_a_tokenizer_without_tokens_for_calls_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no token of this tokenizer"):
        ToolTurns(load_tokenizer(save_tokenizer(tmp_path)))
