"""Which part of a rendered conversation the model is to learn: marks of `control_text` around each trained answer.

An answer is learned from where its generation prompt ends, since that is where a model begins to write. A template says
so itself with `{% generation %}`; any other is rendered up to each answer, without it and with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ray_pipeline.data.chat.chat import TOOLS_WAY_OUT, Chat, ChatTemplate, Message, Tool
from ray_pipeline.data.chat.control_text import BORDER, CLOSE, OPEN, without_marks
from ray_pipeline.data.tasks.question import THINK_CLOSE, THINK_OPEN
from ray_pipeline.errors import UserError

_OPENED = re.compile(f"{re.escape(THINK_OPEN)}(\\s*)\\Z")
_TAGS = re.compile(f"{re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)}")
_BLOCK = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")
# The beginning of a tag at the end of a text; and two tags with nothing thought between them.
_BEGUN_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
_TAG = r"[<\[][^<>\[\]\s]+[>\]]"
_NO_THOUGHT = re.compile(rf"\s*{_TAG}\w*\s*{_TAG}\s*")
_WAY_OUT = "Fix chat_template in the tokenizer's folder, or use --set tokenizer.name=train."


class TurnsRewritten(UserError):
    """Later turns change how an earlier answer is rendered, so that no text shows all of them as they are written."""


def lay_out(template: ChatTemplate, chat: Chat) -> str:
    """The conversation as a marked text.

    Raises:
        TurnsRewritten: see there; `lay_out_each` takes the answers one by one.
        UserError: the template drops something that the assistant says, or answers do not go on from the generation
            prompt.
    """
    messages, tools = chat.messages, chat.tools
    whole = template.marked(messages, tools)
    prompts = _prompts(template, messages, tools)
    if OPEN in whole:
        return _as_template_says(chat, whole, prompts)
    last = len(messages) - 1
    if last in chat.trained:
        whole = prompts[last] + _target(template, messages[last], prompts[last], whole)
    marks = [(len(prompt), BORDER) for prompt in prompts.values() if whole.startswith(prompt)]
    for i in chat.trained:
        if i == last:
            written = whole
        else:
            after = _unblocked(template.marked(messages[: i + 1], tools))
            written = prompts[i] + _target(template, messages[i], prompts[i], after)
        if not whole.startswith(written):
            raise TurnsRewritten(
                f"the chat template rewrites turn {i + 1} of {len(messages)} when later turns follow, so its "
                "tokens cannot be supervised. Use a template that keeps every turn, or one-question conversations."
            )
        marks += [(len(prompts[i]), OPEN), (len(written), CLOSE)]
    return _inserted(whole, marks)


def lay_out_each(template: ChatTemplate, chat: Chat) -> list[str]:
    """The conversation as one marked text, or as one for each trained answer where the template changes earlier turns:
    then each answer is learned after what a model would have seen before it.

    Raises:
        UserError: as `lay_out`.
    """
    try:
        return [lay_out(template, chat)]
    except TurnsRewritten:
        return [lay_out(template, one) for one in each_answer(chat)]


def each_answer(chat: Chat) -> list[Chat]:
    """For each trained answer the conversation up to it, in which it alone is trained."""
    return [Chat(chat.messages[: i + 1], chat.tools, trained_from=i) for i in chat.trained]


def lay_out_prompt(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    """A conversation that waits for an answer, up to its generation prompt, as a marked text."""
    whole = _prompt(template, messages, tools)
    earlier = _prompts(template, messages, tools).values()
    return _inserted(whole, [(len(prompt), BORDER) for prompt in earlier if whole.startswith(prompt)])


def _prompt(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    return _unblocked(template.marked(messages, tools, generation_prompt=True))


def _prompts(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool]) -> dict[int, str]:
    """By the place of each of the assistant's turns, what a model sees before it."""
    answers = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    return {i: _prompt(template, messages[:i], tools) for i in answers}


def _unblocked(marked: str) -> str:
    """Without the marks of `{% generation %}`."""
    return _BLOCK.sub(lambda found: found[1], marked)


def _inserted(text: str, marks: Sequence[tuple[int, str]]) -> str:
    """The text with a mark at each place; of those at one place, the first given comes first."""
    parts, done = [], 0
    for place, mark in sorted(marks, key=lambda pair: pair[0]):
        parts += [text[done:place], mark]
        done = place
    return "".join([*parts, text[done:]])


def _as_template_says(chat: Chat, whole: str, prompts: dict[int, str]) -> str:
    """The text with the template's own marks: those of the answers that are trained.

    Raises:
        UserError: they cannot be told from those that are not.
    """
    blocks = list(_BLOCK.finditer(whole))
    text = _unblocked(whole)
    # Two marks stand for each block before this one, and one for itself.
    spans = [(block.start() - 2 * n, block.end() - 2 * n - 2) for n, block in enumerate(blocks)]
    if set(chat.trained) != set(prompts):
        if len(blocks) != len(prompts):
            raise UserError(
                f"the chat template has {len(blocks)} {{% generation %}} blocks for {len(prompts)} answers, of which "
                f"{len(chat.trained)} are trained: which is which cannot be told. Put one block around each answer."
            )
        spans = [span for span, i in zip(spans, prompts, strict=True) if i in chat.trained]
    else:
        for i in chat.trained:
            _check_kept(chat.messages[i], text)
    marks = [(len(prompt), BORDER) for prompt in prompts.values() if text.startswith(prompt)]
    for start, stop in spans:
        marks += [(start, BORDER), (start, OPEN), (stop, CLOSE)]
    return _inserted(text, marks)


def _target(template: ChatTemplate, message: Message, prompt: str, rendered: str) -> str:
    """What a model has to write after `prompt` for this turn; `rendered` ends with the turn.

    Raises:
        UserError: the template drops part of it, or it does not go on from the prompt.
    """
    opened = _OPENED.search(prompt)
    same = _alike(prompt, rendered)
    if same == len(prompt):
        target = rendered[same:]
    elif opened is not None and rendered.startswith(prompt[: opened.start()]):
        marked = template.marked_message(message)
        target = _after_opening(marked, rendered[opened.start() :], opened[1])
    elif _NO_THOUGHT.fullmatch(prompt[same:]) and THINK_CLOSE not in message["content"]:
        # A prompt that asks for no thinking has an empty thought, which such templates leave out of answered turns.
        target = rendered[same:].removeprefix(THINK_CLOSE)
    else:
        raise UserError(
            f"the chat template's generation prompt ends with {_shown(prompt[same:])}, but an answered conversation "
            f"goes on with {_shown(rendered[same:])} there, so a model would be asked in a form it was not trained on. "
            f"{_WAY_OUT}"
        )
    _check_kept(message, target)
    return target


def _alike(prompt: str, rendered: str) -> int:
    """Length of the common beginning of two texts; what looks like a tag is not cut in two."""
    pairs = enumerate(zip(prompt, rendered, strict=False))
    same = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(prompt), len(rendered)))
    begun = _BEGUN_TAG.search(prompt[:same])
    return same if begun is None or same == len(prompt) else begun.start()


def _after_opening(message: Message, rendered: str, space: str) -> str:
    """The rest of a turn whose prompt has already opened the thinking, as templates for reasoning models do.

    Such templates often cut what was thought from turns that they render (DeepSeek-R1's does), though the model has to
    write it; an answer without thinking closes it at once, as Qwen3's template writes it.

    Args:
        message: marked, as `rendered` is, the turn as the template writes it. space: behind the tag in the prompt.
    """
    begun = rendered.lstrip()
    if begun.startswith(THINK_OPEN):
        return begun.removeprefix(THINK_OPEN).removeprefix(space)
    thought, closed, _ = str(message["content"]).rpartition(THINK_CLOSE)
    if not closed:
        return f"\n{THINK_CLOSE}\n\n{rendered}" if space else f"{THINK_CLOSE}{rendered}"
    thought = thought.lstrip().removeprefix(THINK_OPEN)
    return f"{thought.removeprefix(space)}{THINK_CLOSE}{rendered}"


def _shown(marked: str) -> str:
    text = without_marks(marked)
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _check_kept(message: Message, rendered: str) -> None:
    """Raise UserError where the template drops what an assistant's turn says or calls."""
    text = without_marks(rendered)
    thought, closed, said = str(message["content"]).rpartition(THINK_CLOSE)
    # White space around what is said is a template's to choose, and so are the tags around a thought.
    kept = all(part.strip() in text for part in _TAGS.split(thought)) and (
        not closed or closed in text or _TAGS.sub("", thought).strip()
    )
    if not kept or said.strip() not in text:
        lost = "words of answers" if kept else f"{THINK_OPEN}...{THINK_CLOSE} from answers"
        raise UserError(
            f"the chat template drops {lost} (it renders {text[:200]!r}), so a model could never learn them. Edit "
            "chat_template to keep the whole content of assistant messages, name another one with --set "
            "tokenizer.chat_template=..., or use --set tokenizer.name=train."
        )
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in text:
            raise UserError(
                f"the chat template drops tool calls (it renders {text[:200]!r} for a call of "
                f"{call['function']['name']}). {TOOLS_WAY_OUT}"
            )
