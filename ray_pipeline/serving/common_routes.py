"""What every application here has: the chat page, and errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from ray_pipeline.errors import did_you_mean
from ray_pipeline.serving.guard import error_body

PAGE = Path(__file__).parent / "page.html"
# The page brings all it needs, and may talk to this server alone.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@cache
def _page() -> str:
    return PAGE.read_text(encoding="utf-8")


def add_common_routes(app: FastAPI) -> None:
    """The page at `/`, and handlers of errors."""

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_page(), headers=PAGE_HEADERS)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = explain(error.errors(), _fields(request))
        return JSONResponse(error_body(400, message, param=param), 400)

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"{request.url.path[:200]}: there is nothing here"
        return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)


def _fields(request: Request) -> Sequence[str]:
    """Names of the fields that the asked route knows."""
    body = getattr(request.scope.get("route"), "body_field", None)
    form = getattr(getattr(body, "field_info", None), "annotation", None)
    return tuple(getattr(form, "model_fields", ()))


def explain(errors: Sequence[Any], known: Sequence[str] = ()) -> tuple[str, str | None]:
    """The first error of a request as a sentence, and the field it is about."""
    first = errors[0]
    path = [part for part in first["loc"] if part != "body"]
    field = ".".join(map(str, path))[:200]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown field{did_you_mean(str(path[-1]), known)}", field
    value = repr(first.get("input"))
    shown = f" (given: {value[:100]}{'...' if len(value) > 100 else ''})" if first["type"] != "missing" else ""
    return f"{field or 'the body'}: {first['msg']}{shown}", field or None
