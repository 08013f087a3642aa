"""The HTTP interface of the native engine: OpenAI's chat completions, completions and models, and health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse

from ray_pipeline.errors import UserError
from ray_pipeline.serving.answer_parts import AnswerParts
from ray_pipeline.serving.common_routes import add_common_routes
from ray_pipeline.serving.guard import error_body
from ray_pipeline.serving.native_answers import AnswerFailed, Choice, Exchange, until_left
from ray_pipeline.serving.native_model import NativeModel, RequestRefused
from ray_pipeline.serving.replies import Reply
from ray_pipeline.serving.request_forms import ChatForm, CompletionForm
from ray_pipeline.serving.writer import Busy, Wanted

SEND_SECONDS = 60.0  # a client that reads nothing for so long is let go
PING_SECONDS = 15
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "the answer, or its stream", "content": {"application/json": {}, "text/event-stream": {}}}
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "the request makes no sense, or its prompt does not fit the context",
        403: "the server is called by a name that is not its own",
        401: "the key is missing or wrong",
        404: "another model is asked for",
        408: "the body came too slowly",
        413: "the body is too large",
        415: "the body is not called JSON",
        429: "too many requests wait",
        500: "the model failed",
    }.items()
}


def native_app(native: NativeModel) -> FastAPI:
    """The application; it owns `native` and stops its writer at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(native.writer.stop)

    app = FastAPI(title="ray-pipeline, native engine", docs_url=None, redoc_url=None, lifespan=lifespan)
    created = int(time.time())
    add_common_routes(app)

    @app.get("/health", responses={503: {"description": "nothing is written any more"}})
    async def health() -> JSONResponse:
        writing, waiting = native.writer.load
        alive = native.writer.is_alive
        body = {"status": "ok" if alive else "stopped", "writing": writing, "waiting": waiting}
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def models() -> dict[str, Any]:
        context = native.model.backend.context
        entry = {"id": native.name, "object": "model", "created": created, "owned_by": "ray-pipeline"}
        return {"object": "list", "data": [entry | {"max_model_len": context}]}

    @app.post("/v1/chat/completions", responses=ANSWER | REFUSALS, response_model=None)
    async def chat(form: ChatForm, request: Request) -> Response:
        def begin() -> tuple[list[Wanted], Callable[[], AnswerParts | None], str]:
            wanted, thinking = native.chat(form)
            return wanted, lambda: AnswerParts(thinking=thinking, tools=bool(form.offered)), ""

        return await _answer(native, form, request, "chat.completion", begin)

    @app.post("/v1/completions", responses=ANSWER | REFUSALS, response_model=None)
    async def completions(form: CompletionForm, request: Request) -> Response:
        def begin() -> tuple[list[Wanted], Callable[[], AnswerParts | None], str]:
            wanted = native.completion(form)
            echo = form.prompt if isinstance(form.prompt, str) else native.model.tokenizer.decode(form.prompt)
            return wanted, lambda: None, echo if form.echo else ""

        return await _answer(native, form, request, "text_completion", begin)

    return app


async def _answer(
    native: NativeModel,
    form: ChatForm | CompletionForm,
    request: Request,
    kind: str,
    begin: Callable[[], tuple[list[Wanted], Callable[[], AnswerParts | None], str]],
) -> Response:
    if form.model is not None and form.model != native.name:
        message = f"model {form.model[:200]!r} is not served here: {native.name} is"
        return JSONResponse(error_body(404, message, param="model", code="model_not_found"), 404)
    try:
        # Tokenising a long text takes a while, in which others are answered.
        wanted, parts, echo = await asyncio.to_thread(begin)
        answers = native.writer.submit(wanted)
    except RequestRefused as error:
        code = "context_length_exceeded" if "context" in str(error) else None
        return JSONResponse(error_body(400, str(error), param=error.param, code=code), 400)
    except UserError as error:
        return JSONResponse(error_body(400, str(error), param="messages"), 400)
    except Busy as error:
        return JSONResponse(error_body(429, f"{error}: try again later"), 429, {"Retry-After": "5"})
    usage = form.stream and form.stream_options is not None and form.stream_options.include_usage
    choices = [Choice(i, answer, parts()) for i, answer in enumerate(answers)]
    exchange = Exchange(Reply(kind, native.name, native.model.tokenizer), choices, usage, echo)
    if form.stream:
        return EventSourceResponse(exchange.events(), ping=PING_SECONDS, send_timeout=SEND_SECONDS, sep="\n")
    try:
        whole = await until_left(exchange.whole, request)
    except AnswerFailed as error:
        return JSONResponse(error_body(500, str(error)), 500)
    finally:
        exchange.cancel()
    return Response(status_code=499) if whole is None else JSONResponse(whole)
