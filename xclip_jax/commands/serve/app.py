"""The web application: a page, and the questions that it asks of an index, as JSON."""

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from xclip_jax.commands.serve import origin, page
from xclip_jax.commands.serve.index import MAX_NAMES, MAX_TEXT, Index
from xclip_jax.commands.serve.thumbnails import Thumbnails, thumbnail
from xclip_jax.core.errors import UserError

MAX_UPLOAD = 20 << 20  # bytes of an image
_MAX_NAMES = 4 * MAX_NAMES * (MAX_TEXT + 1)  # bytes of the names, UTF-8
_HELD = 8 * MAX_UPLOAD
_TOO_LARGE = f"The image is too large; send at most {MAX_UPLOAD >> 20} MiB."
_THREADS = 2  # that decode and compare what is sent
COUNT = 24  # images of an answer
NAMES = 10  # names of an answer

_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def make_app(index: Index, title: str, hosts: set[str]) -> Starlette:
    """Return the application.

    Args:
      index: that is asked.
      title: of the page.
      hosts: names by which it may be called, beside addresses; see `origin.fault`.
    """

    uploads, questions = _Uploads(), CapacityLimiter(_THREADS)
    searches = CapacityLimiter(1)  # each uses all cores

    def show(request: Request) -> Response:
        del request
        content = page.render(title, len(index), index.names, MAX_UPLOAD)
        return HTMLResponse(content, headers=_HEADERS | {"Content-Security-Policy": _POLICY})

    async def search(request: Request) -> Response:
        text = _checked_text(request.query_params.get("text", ""))
        matches = await to_thread.run_sync(index.by_text, text, COUNT, limiter=searches)
        return _json({"matches": [match._asdict() for match in matches]})

    async def names(request: Request) -> Response:
        number = request.query_params.get("image")

        def answer(body: bytearray) -> Any:  # in a thread: the event loop answers others meanwhile
            texts, content = _parts(body, number is None)
            return index.by_image(content if number is None else _number(number), texts, COUNT)

        async with uploads.body(request) as body:
            best, near = await to_thread.run_sync(answer, body, limiter=questions)
        scored = [{"name": name, "score": score} for name, score in best[:NAMES]]
        return _json({"names": scored, "matches": [match._asdict() for match in near[:NAMES]]})

    thumbnails = Thumbnails(lambda image: thumbnail(index.content(image)))

    async def small(request: Request) -> Response:
        content = await thumbnails.get(_number(request.path_params["image"]))
        return Response(content, media_type="image/webp", headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", show),
            Route("/search", search),
            Route("/names", names, methods=["POST"]),
            Route("/thumbnail/{image}", small),
        ],
        middleware=[Middleware(_Guard, hosts=hosts)],
        exception_handlers={
            UserError: lambda _, error: _json({"error": f"{error}"}, 400),
            ClientDisconnect: lambda *_: Response(status_code=400),  # nobody reads it
            IndexError: lambda _, error: _json({"error": f"{error}"}, 404),
            HTTPException: lambda _, error: _json({"error": f"{getattr(error, 'detail', error)}"}, error.status_code),
        },
    )


class _Guard:
    """Refuses requests that pages of other sites have made."""

    def __init__(self, app: ASGIApp, hosts: set[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and (fault := origin.fault(Headers(scope=scope), scope["path"], self._hosts)):
            app = _json({"error": fault}, 403)
        await app(scope, receive, send)


def _json(content: Any, status: int = 200) -> Response:
    return JSONResponse(content, status, headers=_HEADERS)


def _checked_text(text: str) -> str:
    if not text.strip():
        raise UserError("The text is empty; type what the images should show.")
    if len(text) > MAX_TEXT:
        raise UserError(f"The text has {len(text):,} letters; give at most {MAX_TEXT:,}.")
    return text.strip()


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise HTTPException(404, f"Image {text[:12]!r} does not exist.")
    return int(text)


class _Uploads:
    """Bodies of requests, which have `_HELD` bytes at most together."""

    def __init__(self) -> None:
        self._held = 0

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """Context of a request's body. Of one that is too large no more is read than is allowed."""
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                self._held += len(chunk)
                if len(body) > MAX_UPLOAD + _MAX_NAMES:
                    raise HTTPException(413, _TOO_LARGE)
                if self._held > _HELD:
                    raise HTTPException(503, "Too many images are being sent; try again later.")
            yield body
        finally:
            self._held -= len(body)


def _parts(body: bytearray, has_image: bool) -> tuple[list[str], bytes]:
    """Names and image of a body: names, one a line, and after an empty line the image's file, if there is one."""
    lines, gap, image = body.partition(b"\n\n") if has_image else (body, b"", b"")
    if has_image and not gap:
        raise UserError("The request has no image; send names, one a line, an empty line, and the image's file.")
    if (count := lines.count(b"\n") + 1) > MAX_NAMES:
        raise UserError(f"{count:,} names are too many; give at most {MAX_NAMES}.")
    if len(lines) > _MAX_NAMES or len(image) > MAX_UPLOAD:
        raise HTTPException(413, _TOO_LARGE)
    try:
        names = lines.decode().split("\n") if lines else []
    except UnicodeDecodeError as error:
        raise UserError("The names are not UTF-8.") from error
    return [_checked_text(name) for name in names], bytes(image)
