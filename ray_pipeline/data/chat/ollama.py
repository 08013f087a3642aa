"""A Modelfile for Ollama beside a GGUF file: its chat template in Go's language, stop tokens and parameters.

Ollama does not run the Jinja template that the file holds. The pieces around each role are read off what our template
renders; where putting them together again gives another text, the template does more than Go's could say here, and the
Modelfile says so instead of being wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ray_pipeline.data.chat.chat import ChatTemplate
from ray_pipeline.errors import UserError

_SYSTEM, _USER, _ANSWER, _AGAIN = "\ue001", "\ue002", "\ue003", "\ue004"  # of no template
_USED_BEFORE = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]


class _Pieces(NamedTuple):
    """What stands around each role's text, and at the beginning and the end of the prompt."""

    begin: str
    system: tuple[str, str]
    user: str
    assistant: tuple[str, str]
    prompt: str

    def joined(self, messages: Sequence[dict[str, str]]) -> str:
        """What the Go template makes of a conversation that waits for an answer."""
        around = {"system": self.system, "user": (self.user, ""), "assistant": self.assistant}
        texts = [around[m["role"]][0] + m["content"] + around[m["role"]][1] for m in messages]
        return self.begin + "".join(texts) + self.prompt

    def go(self, *, begins: bool) -> str:
        """In Go's template language. begins: the file's tokenizer writes what stands at the beginning."""
        (before, after), (opened, closed) = self.system, self.assistant
        parts = [
            "{{ range .Messages }}",
            f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}',
            f'{{{{ else if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}',
            f'{{{{ else if eq .Role "assistant" }}}}{opened}{{{{ .Content }}}}{closed}',
            "{{ end }}{{ end }}",
        ]
        return ("" if begins else self.begin) + "".join(parts) + self.prompt


def modelfile(
    gguf: str, template: ChatTemplate, *, begins: bool, stop: Sequence[str], parameters: dict[str, Any]
) -> str:
    """The text of a Modelfile.

    Args:
        gguf: name of the file beside it. begins: its tokenizer puts the template's start token before a text by itself.
        stop: texts of the tokens that end an answer. parameters: Ollama's names, such as num_ctx.
    """
    lines = [f"# ollama create NAME -f {gguf.removesuffix('.gguf')}.Modelfile", f"FROM ./{gguf}"]
    pieces = _pieces(template)
    if pieces is None:
        lines.append(
            "# No TEMPLATE: the model's chat template does more than Ollama's language says. Write one by hand."
        )
    else:
        lines.append(f'TEMPLATE """{pieces.go(begins=begins)}"""')
    lines += [f'PARAMETER stop "{text}"' for text in stop]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"


def _pieces(template: ChatTemplate) -> _Pieces | None:
    """What the template writes around each role; None where that depends on more than the role."""
    asked, again = [{"role": "user", "content": _USER}], {"role": "user", "content": _AGAIN}
    told = [{"role": "system", "content": _SYSTEM}, *asked]
    try:
        first = template.render(asked, generation_prompt=True)
        whole = template.render([*_USED_BEFORE, again], generation_prompt=True)
        system = template.render(told, generation_prompt=True)
        start, prompt = first.split(_USER)
        _, rest = whole.split(_USER)
        opened, rest = rest.split(_ANSWER)
        between, _ = rest.split(_AGAIN)
        before, rest = system.split(_SYSTEM)
        after, _ = rest.split(_USER)
    except (UserError, ValueError):  # refused, or a text that is written twice or not at all
        return None
    # Of all three: the start tokens of some tokenizers end as their end tokens do.
    user = _common_end(_common_end(start, between), after)
    begin = start.removesuffix(user)
    if not before.startswith(begin):
        return None
    pieces = _Pieces(
        begin,
        (before.removeprefix(begin), after.removesuffix(user)),
        user,
        (opened, between.removesuffix(user)),
        prompt,
    )
    chats = [asked, told, [*_USED_BEFORE, again], [*told, _USED_BEFORE[1], again, _USED_BEFORE[1], again]]
    same = all(pieces.joined(chat) == template.render(chat, generation_prompt=True) for chat in chats)
    plain = not any(mark in str(pieces) for mark in ("{{", "}}", '"""'))
    return pieces if same and plain else None


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
