"""What a client may ask of the native engine: OpenAI's requests, the fields that this engine has a meaning for.

Unknown fields are refused; so is a value that would change the answer in a way that nobody here knows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ray_pipeline.settings.section import MOST_SEED
from ray_pipeline.tools.calls import read_json

MOST_CHOICES = 16
MOST_TOKENS = 1 << 27
NoPenalty = Annotated[float, Field(ge=0, le=0, description="0 alone: this engine has `repetition_penalty`.")]


class _Form(BaseModel):
    """`strict`: "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _whole_characters(text: str) -> str:
    """JSON can name half of a character; no tokenizer reads one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]


Stop = Annotated[Text, Field(min_length=1, max_length=1000)]


class TextPart(_Form):
    """A piece of a message; pictures and sound are not read."""

    type: Literal["text"]
    text: Text


class CalledFunction(_Form):
    """Name and arguments, as JSON text."""

    name: Text
    arguments: Text

    @field_validator("arguments")
    @classmethod
    def _object(cls, text: str) -> str:
        if not isinstance(read_json(text), dict):
            raise ValueError("must be the JSON text of an object")
        return text


class ToolCallForm(_Form):
    """A call that the assistant made earlier."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class MessageForm(_Form):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallForm] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="Of an earlier answer; templates omit it.")

    def as_message(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [_as_call(call) for call in self.tool_calls]
        return message


def _as_call(call: ToolCallForm) -> dict[str, Any]:
    arguments = read_json(call.function.arguments)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class ToolFunction(_Form):
    """A function that the model may call."""

    name: Text = Field(min_length=1, max_length=64)
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolForm(_Form):
    """A tool in OpenAI's form."""

    type: Literal["function"]
    function: ToolFunction


class StreamOptions(_Form):
    """What a stream ends with."""

    include_usage: bool = False


class ResponseFormat(_Form):
    """Plain text; grammars are the business of other engines."""

    type: Literal["text"]


class _Common(_Form):
    """Fields of both kinds of request."""

    model: str | None = Field(None, description="The served model's name; it alone is known.")
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="Default: what the context has room for.")
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False, description="0 is greedy; so is below 0.0001.")
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=0, le=1 << 24, description="0 for all.")
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=MOST_SEED - MOST_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    presence_penalty: NoPenalty | None = None
    frequency_penalty: NoPenalty | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(None, description="Empty alone.")
    user: str | None = Field(None, description="Read by nobody.")

    @property
    def stops(self) -> list[str]:
        """As a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatForm(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[MessageForm], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="The newer name of max_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[ToolForm], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    metadata: dict[str, Any] | None = Field(None, description="Read by nobody.")
    store: bool | None = Field(None, description="Nothing is stored, whatever it says.")

    @model_validator(mode="after")
    def _agree(self) -> ChatForm:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that may be called."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are reported; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionForm(_Common):
    """POST /v1/completions: plain text, or token ids, continued."""

    prompt: Text | Annotated[list[Annotated[int, Field(ge=0, le=1 << 31)]], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    suffix: Annotated[str, Field(max_length=0)] | None = Field(None, description="Empty alone.")
    best_of: int | None = Field(None, ge=1, le=1, description="1 alone.")

    @property
    def limit(self) -> int:
        """Most tokens of the answer; OpenAI's default for this kind of request is 16."""
        return 16 if self.max_tokens is None else self.max_tokens
