"""The web application: a page, and the questions that it asks of an index, as JSON."""

import base64
import binascii
import json
import re
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from xclip_jax.data.text import join_surrogates
from xclip_jax.errors import UserError
from xclip_jax.serve import page
from xclip_jax.serve.index import MAX_TEXT, Index
from xclip_jax.serve.thumbnails import Thumbnails, thumbnail

MAX_UPLOAD = 20 << 20  # bytes of an image
COUNT = 24  # images of an answer
NAMES = 10  # names of an answer

_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def make_app(index: Index, title: str, *, hosts: list[str] | None = None) -> Starlette:
    """Return the application.

    Args:
      index: that is asked.
      title: of the page.
      hosts: names by which it may be called; others are refused, so that no other web page can ask through a name of
        its own that leads here. None for any.
    """

    def show(request: Request) -> Response:
        del request
        content = page.render(title, len(index), index.names, MAX_UPLOAD)
        return HTMLResponse(content, headers=_HEADERS | {"Content-Security-Policy": _POLICY})

    def search(request: Request) -> Response:
        text = _checked_text(request.query_params.get("text", ""))
        return _json({"matches": [match._asdict() for match in index.by_text(text, COUNT)]})

    async def names(request: Request) -> Response:
        question = await _question(request)
        best, near = await run_in_threadpool(index.by_image, _image(question), _names(question), COUNT)
        scored = [{"name": name, "score": score} for name, score in best[:NAMES]]
        return _json({"names": scored, "matches": [match._asdict() for match in near[:NAMES]]})

    thumbnails = Thumbnails(lambda image: thumbnail(index.content(image)))

    async def small(request: Request) -> Response:
        number = request.path_params["image"]
        if not re.fullmatch(r"[0-9]{1,12}", number):
            raise HTTPException(404, f"Picture {number[:12]!r} does not exist.")
        return Response(await thumbnails.get(int(number)), media_type="image/webp", headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", show),
            Route("/search", search),
            Route("/names", names, methods=["POST"]),
            Route("/thumbnail/{image}", small),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)] if hosts else [],
        exception_handlers={
            UserError: lambda _, error: _json({"error": f"{error}"}, 400),
            IndexError: lambda _, error: _json({"error": f"{error}"}, 404),
            HTTPException: lambda _, error: _json({"error": f"{getattr(error, 'detail', error)}"}, error.status_code),
        },
    )


def _json(content: Any, status: int = 200) -> Response:
    return JSONResponse(content, status, headers=_HEADERS)


def _checked_text(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError("The text is empty; type what the pictures should show.")
    if len(text) > MAX_TEXT:
        raise UserError(f"The text has {len(text):,} letters; give at most {MAX_TEXT:,}.")
    return join_surrogates(text.strip())  # of JSON, which may have halves of them


async def _question(request: Request) -> dict[str, Any]:
    """The JSON of a request's body; of one that is too large no more is read than is allowed."""
    limit = MAX_UPLOAD * 4 // 3 + (1 << 20)  # in base64, and the names
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"The picture is too large; send at most {MAX_UPLOAD >> 20} MiB.")
    try:
        question = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise UserError("The question is not JSON.") from error
    if not isinstance(question, dict):
        raise UserError('The question is not a JSON object with "image" and "names".')
    return question


def _image(question: dict[str, Any]) -> int | bytes:
    image = question.get("image")
    if isinstance(image, int) and not isinstance(image, bool):
        return image
    if not isinstance(image, str):
        raise UserError('"image" is neither the number of a picture nor its content in base64.')
    try:
        return base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError('"image" is not base64.') from error


def _names(question: dict[str, Any]) -> list[str]:
    names = question.get("names") or []
    if not isinstance(names, list):
        raise UserError('"names" is not a list.')
    return [_checked_text(name) for name in names]
