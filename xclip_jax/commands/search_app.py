"""The web application of `xclip-jax serve`: a page, and JSON answers to its questions.

Requests are limited in size, time and number, and refused where a page of another site makes them.
"""

import asyncio
import contextlib
import functools
import io
import ipaddress
import re
import socket
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import h11
from anyio import CapacityLimiter, to_thread
from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from xclip_jax.commands.search_index import MAX_NAMES, MAX_TEXT, Index
from xclip_jax.core.errors import UserError
from xclip_jax.data import images
from xclip_jax.data.images import MAX_PIXELS, formats
from xclip_jax.report.page import environment

MAX_UPLOAD = 20 << 20  # bytes of an image
_MAX_NAMES = 4 * MAX_NAMES * (MAX_TEXT + 1)  # bytes of the names, UTF-8
_HELD = 8 * MAX_UPLOAD
_TOO_LARGE = f"The image is too large; send at most {MAX_UPLOAD >> 20} MiB."
_THREADS = 2  # decode uploads and compare them
COUNT = 24  # images of an answer
NAMES = 10  # names of an answer
REQUEST_SECONDS = 10.0  # for a request to arrive, body included
PER_ADDRESS = 64  # connections of one address; a browser opens six
CONNECTIONS = 200  # of all addresses: some systems allow a process 256 open files
SIDE = 280  # of the longer side, pixels
_KEPT = 1024  # in memory, 10 kB each
_SHRINKING = 2  # so that searches find a free core

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
      index: answers the questions.
      title: of the page.
      hosts: names by which it may be called, and not only by address; see `fault_of`.
    """
    uploads, questions = _Uploads(), CapacityLimiter(_THREADS)
    searches = CapacityLimiter(1)  # each uses all cores
    page = environment().get_template("search.html")

    def show(request: Request) -> Response:
        del request
        content = page.render(
            title=title, count=len(index), names=index.names, max_text=MAX_TEXT, max_upload=MAX_UPLOAD
        )
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

    shrinking = CapacityLimiter(_SHRINKING)

    @functools.lru_cache(_KEPT)
    def small_image(image: int) -> bytes:
        return thumbnail(index.content(image))

    async def small(request: Request) -> Response:
        number = _number(request.path_params["image"])
        content = await to_thread.run_sync(small_image, number, limiter=shrinking)
        return Response(content, media_type="image/webp", headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", show),
            Route("/search", search),
            Route("/names", names, methods=["POST"]),
            Route("/thumbnail/{image}", small),
        ],
        middleware=[Middleware(_Guard, hosts=hosts)],
        exception_handlers=_ERRORS,
    )


class _Guard:
    """Refuses requests that pages of other sites have made."""

    def __init__(self, app: ASGIApp, hosts: set[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and (fault := fault_of(Headers(scope=scope), scope["path"], self._hosts)):
            app = _json({"error": fault}, 403)
        await app(scope, receive, send)


def _json(content: Any, status: int = 200) -> Response:
    return JSONResponse(content, status, headers=_HEADERS)


_ERRORS = {
    UserError: lambda _, error: _json({"error": f"{error}"}, 400),
    ClientDisconnect: lambda *_: Response(status_code=400),  # nobody reads it
    IndexError: lambda _, error: _json({"error": f"{error}"}, 404),
    HTTPException: lambda _, error: _json({"error": f"{getattr(error, 'detail', error)}"}, error.status_code),
}


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
    """Reads bodies of requests, at most `_HELD` bytes of all together."""

    def __init__(self) -> None:
        self._held = 0

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """Context of a request's body; reading stops at the limit."""
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
    """Split a body into names, one a line, and after an empty line the image's file, if it has one."""
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


# Requests that are refused because a web page of another origin makes a visitor's browser send them.


def machine_names() -> set[str]:
    """Return the names of this machine."""
    name = socket.gethostname().lower()
    first = name.partition(".")[0]
    return {"localhost", name, first, f"{first}.local", socket.getfqdn().lower()}


def fault_of(headers: Headers, path: str, names: set[str]) -> str:
    """Return why a request is refused, or "".

    Browsers add its origin to the requests of a page of another site. The site may also give this machine a name of its
    own, so the host must be an address or one of `names`.
    """
    host = headers.get("host", "")
    if not _is_address_of(host, names):
        return f"This server is not called {host[:80]!r}; use its address, or a name of its machine."
    site, origin = headers.get("sec-fetch-site", ""), headers.get("origin", "")
    if site:  # from browsers, if the connection is local or encrypted
        foreign = site not in ("same-origin", "none") and path != "/"  # a link to the page is no harm
    else:
        foreign = bool(origin) and origin.partition("://")[2] != host
    return "Requests from pages of other sites are refused." if foreign else ""


def _is_address_of(host: str, names: set[str]) -> bool:
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name.lower().rstrip(".") in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def thumbnail(content: bytes) -> bytes:
    """Return an image as WebP of at most `SIDE` x `SIDE` pixels, rotated by its EXIF tag.

    Raises:
      UserError: content that is not an image, or has more than `MAX_PIXELS`.
    """
    small = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise UserError(f"The image has {pixels:,} pixels, more than {MAX_PIXELS:,}.")
            _shrink(image).save(small, "WEBP", quality=85)
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise errors of any class for damaged files
        raise UserError(f"The image cannot be read ({error}).") from error
    return small.getvalue()


def _shrink(image: Image.Image) -> Image.Image:
    if image.mode in ("1", "P"):  # Pillow resizes these without interpolation
        image = image.convert("RGBA")
    elif image.mode.startswith(("I", "F")):  # 16 bits, floats
        image = images.to_rgb(image, images.WHITE)
    image.thumbnail((SIDE, SIDE))  # decodes a JPEG at a fraction of its size
    return ImageOps.exif_transpose(image)


# Connections.


class Connection(H11Protocol):
    """A connection that is closed if a request does not arrive completely within `REQUEST_SECONDS`.

    With more than `PER_ADDRESS` connections of one address, or more than `CONNECTIONS` in all, the one among them that
    has waited longest for its request is closed.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._watch()
        everyone = [c for c in self.connections if isinstance(c, Connection) and not c.transport.is_closing()]
        same = [c for c in everyone if c.client and self.client and c.client[0] == self.client[0]]
        if len(same) > PER_ADDRESS:
            _close_oldest(same)
        elif len(everyone) > CONNECTIONS:
            _close_oldest(everyone)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request; its first part starts the time limit."""
        if self.timeout_keep_alive_task is not None:  # idle until now
            self._stop_waiting()
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one if it was answered early."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Start the time limit if the client has something to send, or stop it."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            self._stop_waiting()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _close_oldest(connections: list[Connection]) -> None:
    """Close the connection that has waited longest. The newest one waits, so at least one does."""
    waiting = {c: c._deadline.when() for c in connections if c._deadline is not None}
    min(waiting, key=waiting.__getitem__).transport.close()
