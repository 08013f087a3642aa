"""What the stand-in of Modal's service knows."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpclib import GRPCError
from modal_proto import api_pb2 as pb

BLOCK = 8 << 20  # bytes of a volume's file that one address gives


@dataclass
class Call:
    """One function call with its one input."""

    id: str
    function: str
    item: pb.FunctionInput
    output: pb.FunctionGetOutputsItem | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    deliveries: int = 0
    retries: int = 0


@dataclass
class World:
    """All that the service knows. `root` holds volumes as folders."""

    root: Path
    address: str = ""
    blobs_address: str = ""
    functions: dict[str, pb.Function | pb.FunctionData] = field(default_factory=dict)
    function_app: dict[str, str] = field(default_factory=dict)
    apps: dict[str, pb.AppCreateRequest] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    calls: dict[str, Call] = field(default_factory=dict)
    dicts: dict[str, dict[bytes, bytes]] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    secret_names: dict[str, str] = field(default_factory=dict)
    images: dict[str, pb.Image] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    logs: list[tuple[str, str, str]] = field(default_factory=list)  # (app, call, text)
    seen: list[Any] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    errors: dict[str, GRPCError] = field(default_factory=dict)  # by name of the method
    delay: float = 0.0
    building: Callable[[], None] | None = None  # called when somebody waits for an image, which is never ready then
    start: Callable[[World, Call], None] | None = None
    end: Callable[[World, Call, bool], None] | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    loop: asyncio.AbstractEventLoop | None = None

    def new(self, kind: str) -> str:
        self.numbers[kind] = self.numbers.get(kind, 0) + 1
        return f"{kind}-{self.numbers[kind]}"

    def volume(self, name: str) -> Path:
        return self.root / "volumes" / name

    def requests(self, kind: type) -> list[Any]:
        return [request for request in self.seen if isinstance(request, kind)]

    def created(self) -> dict[str, Any]:
        """The newest specification of each function, by name."""
        return {request.function.function_name or request.function_data.function_name: request
                for request in self.requests(pb.FunctionCreateRequest)}  # fmt: skip

    def calls_of(self, name: str) -> list[Call]:
        return [call for call in self.calls.values() if self.functions[call.function].function_name == name]

    def finish(self, call: Call, result: pb.GenericResult, data_format: int = 0) -> None:
        """Enter how a call ended, once."""
        if call.output is not None:
            return
        call.output = pb.FunctionGetOutputsItem(result=result, idx=0, data_format=data_format)  # type: ignore[arg-type]
        assert self.loop is not None
        self.loop.call_soon_threadsafe(call.done.set)

    def text_of(self, call: str | None = None) -> str:
        return "".join(text for _, of, text in self.logs if call in (None, of))


def succeeded(value: Any) -> tuple[pb.GenericResult, int]:
    """What a call that returned `value` gives."""
    result = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS, data=pickle.dumps(value))
    return result, pb.DATA_FORMAT_PICKLE


def raised(error: BaseException) -> tuple[pb.GenericResult, int]:
    """What a call that raised gives."""
    status = pb.GenericResult.GENERIC_STATUS_FAILURE
    result = pb.GenericResult(status=status, data=pickle.dumps(error), exception=repr(error))
    return result, pb.DATA_FORMAT_PICKLE
