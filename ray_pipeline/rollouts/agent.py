"""Answers in several turns: the model calls tools, reads what they say and goes on (ReAct, arXiv:2210.03629).

Tokens in, tokens out: what was sampled is never tokenised again, only what a tool said is. A turn ends at the token
that closes the model's calls; the tools' outputs follow as forced tokens, in the form in which the chat template of
the model's training writes them. Used by rollouts and by evaluation alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.generate.decode import Completion, Decoder, ToolUse, generate
from ray_pipeline.data.chat.completion_text import think_budget
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.errors import UserError
from ray_pipeline.rollouts.rollout import request_seed
from ray_pipeline.tools.calls import BadCall, ToolCall, parse_calls
from ray_pipeline.tools.format import CALLS_END, OUTPUTS_BEGIN, OUTPUTS_END, render_output, without_tool_tokens
from ray_pipeline.tools.tool_schema import argument_error
from ray_pipeline.tools.toolbox import ERROR, ToolBox


def answer_with_tools(
    decoder: Decoder,
    tokenizer: ChatTokenizer,
    prompts: Sequence[list[int]],
    toolbox: ToolBox,
    *,
    max_new_tokens: int,
    max_calls: int,
    temperature: float = 1.0,
    think_tokens: int | None = None,
    speculative: bool = False,
    record_routing: bool = False,
    seeds: Sequence[int] | None = None,
    max_batch: int = 256,
) -> list[Completion]:
    """Answer each prompt, with tools as often as the model calls them.

    Args:
        max_new_tokens: tokens of an answer, what tools say included. An output that does not fit ends it.
        max_calls: calls of an answer; the one after ends it.
        think_tokens: of thinking in each turn. seeds: one per prompt; default: its index.
    Returns:
        One completion per prompt, `tools` set; the tokens of outputs are `forced`, with a log-probability of 0.
    Raises:
        UserError: the tokenizer or its template does not know tool calls.
    """
    turns = ToolTurns(tokenizer)
    seeds = range(len(prompts)) if seeds is None else seeds
    room = decoder.config.max_position_embeddings
    answers = [_Answer(p, min(max_new_tokens, room - len(p))) for p in prompts]
    going, turn = list(range(len(answers))), 0
    while going:
        completions = generate(
            decoder,
            [answers[i].so_far for i in going],
            max_new_tokens=[answers[i].room for i in going],
            eos_ids={tokenizer.eos_id, turns.calls_end},
            temperature=temperature,
            think=think_budget(tokenizer, think_tokens),
            speculative=speculative,
            record_routing=record_routing,
            seeds=[seeds[i] if turn == 0 else request_seed(seeds[i], turn, 0, 0) for i in going],
            max_batch=max_batch,
        )
        for i, completion in zip(going, completions, strict=True):
            answers[i].add(completion)
        going = _use_tools(
            answers, [i for i in going if answers[i].turn[-1] == turns.calls_end], turns, toolbox, max_calls
        )
        turn += 1
    return [answer.completed(tokenizer.eos_id) for answer in answers]


class _Answer:
    """An answer so far, of at most `limit` tokens. Its last turn begins at `turn_start`."""

    def __init__(self, prompt: list[int], limit: int):
        self.whole = Completion(prompt, [], [], finished=False, tools=ToolUse())
        self.limit, self.turn_start = limit, 0

    @property
    def so_far(self) -> list[int]:
        """The prompt and all that follows it."""
        return self.whole.prompt + self.whole.tokens

    @property
    def room(self) -> int:
        """Tokens that it may still get."""
        return self.limit - len(self.whole.tokens)

    @property
    def turn(self) -> list[int]:
        """What the model wrote last."""
        return self.whole.tokens[self.turn_start :]

    @property
    def use(self) -> ToolUse:
        """What it did with tools."""
        assert self.whole.tools is not None
        return self.whole.tools

    def add(self, turn: Completion) -> None:
        """Take what the model wrote."""
        whole, self.turn_start = self.whole, len(self.whole.tokens)
        whole.tokens += turn.tokens
        whole.logprobs += turn.logprobs
        whole.forced += turn.forced or [False] * len(turn.tokens)
        if turn.routing is not None:
            # What earlier turns were sampled with stays: reading their tokens again may round to another expert.
            earlier = [] if whole.routing is None else [whole.routing]
            whole.routing = torch.cat([*earlier, turn.routing[sum(map(len, earlier)) :]])

    def force(self, tokens: list[int]) -> None:
        """Take what was written for the model."""
        self.whole.tokens += tokens
        self.whole.logprobs += [0.0] * len(tokens)
        self.whole.forced += [True] * len(tokens)

    def completed(self, eos_id: int) -> Completion:
        """All of it, when nothing follows."""
        self.whole.finished = self.whole.tokens[-1:] == [eos_id]
        return self.whole


def _use_tools(
    answers: Sequence[_Answer], called: Sequence[int], turns: ToolTurns, toolbox: ToolBox, max_calls: int
) -> list[int]:
    """Carry out the calls that the answers `called` end with; which of them go on."""
    made: dict[int, list[ToolCall | BadCall]] = {}
    for i in called:
        calls = parse_calls(turns.text(answers[i].turn))
        answers[i].use.calls += len(calls)
        answers[i].use.valid += sum(_is_valid(call, toolbox) for call in calls)
        if calls and answers[i].use.calls <= max_calls:
            made[i] = calls
    said = iter(toolbox.call_many([call for calls in made.values() for call in calls]))
    going = []
    for i, calls in made.items():
        outputs = [next(said) for _ in calls]
        answers[i].use.errors += sum(text.startswith(ERROR) for text in outputs)
        tokens = turns.outputs(outputs)
        if len(tokens) < answers[i].room:  # else the model could not say anything to it
            answers[i].force(tokens)
            going.append(i)
    return going


def _is_valid(call: ToolCall | BadCall, toolbox: ToolBox) -> bool:
    """Whether it can be read, and there is such a tool that takes such arguments."""
    if isinstance(call, BadCall) or call.name not in toolbox.tools:
        return False
    return argument_error(toolbox.tools[call.name].parameters, call.arguments) is None


class ToolTurns:
    """How a chat template goes on after calls, as token ids.

    Attributes:
        calls_end: the token that ends a turn with calls.
    Raises:
        UserError: the tokenizer has no tokens for calls, or its template writes no outputs.
    """

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer = tokenizer
        self.calls_end, begin, end = (self._token(text) for text in (CALLS_END, OUTPUTS_BEGIN, OUTPUTS_END))
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        ids = tokenizer.encode_prompt([{"role": "user", "content": ""}, called, {"role": "tool", "content": ""}])
        if self.calls_end not in ids or begin not in ids or end not in ids:
            raise UserError(
                "tools: the tokenizer's chat template does not write tool calls and outputs the way DeepSeek-V3 does. "
                "Use a trained tokenizer (--set tokenizer.name=train --set tokenizer.tools=true), or leave tools out."
            )
        after = ids[len(ids) - ids[::-1].index(self.calls_end) :]
        self.before, self.behind = after[: after.index(begin)], after[after.index(end) + 1 :]

    def _token(self, text: str) -> int:
        ids = self.tokenizer.encode(text)
        if len(ids) != 1:
            raise UserError(
                f"tools: {text} is no token of this tokenizer. Train one with --set tokenizer.tools=true, or name a "
                "tokenizer that has DeepSeek-V3's tokens for tool calls."
            )
        return ids[0]

    def text(self, tokens: list[int]) -> str:
        """What the model wrote in a turn, tokens of calls included."""
        return self.tokenizer.decode(tokens, keep_special=True)

    def outputs(self, texts: Sequence[str]) -> list[int]:
        """What follows the calls when tools have said this, up to where the model goes on."""
        # What a tool says must not become a control token; tokens of calls are left out of it altogether.
        said = [self.tokenizer.template.controls.mark(without_tool_tokens(text)) for text in texts]
        return [*self.before, *self.tokenizer.encode_marked(render_output(said)), *self.behind]
