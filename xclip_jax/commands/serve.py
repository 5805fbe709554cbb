"""Search a folder of images by text: a web page on this machine.

    xclip-jax serve RUN --images FOLDER
    xclip-jax serve ViT-B-32.pt --images '/data/photos/**/*.jpg' --port 8080
    xclip-jax serve RUN --images 'parquet:/data/shop/test?image=photo&text=title'

A text, or an image of the folder, finds the most similar images.

The images are embedded once, and again if their names or sizes change; the embeddings are kept in $XCLIP_CACHE/search,
by default ~/.cache/xclip_jax/search. Nothing is sent elsewhere. Only this machine can open the page; from another one
use ssh -L 8000:localhost:8000 HOST.
"""

import contextlib
import functools
import hashlib
import io
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute
from PIL import Image

from xclip_jax.commands.embed import MAX_UNREADABLE, MAY_FAIL, embed, ledger_of
from xclip_jax.commands.inputs import IMAGES, Images, open_images
from xclip_jax.core import json_lines, storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import Parser, UserError, check_count, exit_with_message
from xclip_jax.core.imports import add_trust, import_extra
from xclip_jax.data import embeddings, images
from xclip_jax.model import Model, load
from xclip_jax.parallel import compiler
from xclip_jax.report.page import environment

COUNT = 24  # found images
SIDE = 280  # of a thumbnail, pixels
_KEPT = 1024  # thumbnails in memory, 10 kB each
_HOSTS = ["localhost", "127.0.0.1"]  # another site may give this machine a name
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Match(NamedTuple):
    """An image of the folder with its number, path in the folder, caption, and cosine with the query."""

    image: int
    name: str
    text: str
    score: float


class Index:
    """A thread-safe model with images and their embeddings."""

    def __init__(self, model: Model, source: Images, numbers: np.ndarray, columns: Mapping[str, Any]) -> None:
        """Make an index of the images `numbers` of a source, whose names, texts and embeddings are in `columns`."""
        self._model = model
        self._source = source
        self._numbers = numbers
        self._names = columns["id"]
        self._texts = columns["text"]
        self._rows = columns["embedding"]
        self._lock = threading.Lock()
        compute: Any = pyarrow.compute  # its functions are made at import
        ends = compute.min_max(self._names).as_py().values()
        self._root = os.path.commonprefix([*ends]).rfind("/") + 1  # noqa: RUF071 commonpath changes gs://

    def __len__(self) -> int:
        return len(self._numbers)

    def by_text(self, text: str) -> list[Match]:
        """Return the best matching images of a text, best first."""
        with self._lock:
            (row,) = self._model.encode_text([text])
        return self._nearest(row)

    def by_image(self, image: int) -> list[Match]:
        """Return the images most similar to one, itself first; raise `IndexError` for an unknown number."""
        return self._nearest(self._rows[image])

    def _nearest(self, row: np.ndarray) -> list[Match]:
        scores = self._rows @ row
        least = -np.partition(-scores, min(COUNT, len(scores)) - 1)[:COUNT].max()
        near = np.flatnonzero(scores >= least)  # sorting all takes longer than their products
        best = near[np.argsort(-scores[near], kind="stable")][:COUNT].tolist()
        return [Match(i, self._name(i), self._texts[i].as_py(), float(scores[i])) for i in best]

    def _name(self, image: int) -> str:
        return self._names[image].as_py()[self._root :]

    def thumbnail(self, image: int) -> bytes:
        """Return an image as WebP of at most `SIDE` x `SIDE` pixels.

        Raises `IndexError` for an unknown number, and `UserError` for an image that can no longer be read.
        """
        number = int(self._numbers[image])
        try:
            pixels = images.decode(self._source.read(number)[0], scaled_to=SIDE)
        except (OSError, UserError) as error:  # do not show their messages, which contain the path
            raise UserError(f"The file of image {image}, {self._name(image)!r}, can no longer be read.") from error
        small = Image.fromarray(pixels)
        small.thumbnail((SIDE, SIDE))
        content = io.BytesIO()
        small.save(content, "WEBP", quality=85)
        return content.getvalue()


def make_index(model: Model, pattern: str, max_unreadable: float = MAX_UNREADABLE) -> Index:
    """Return the index of the images of `pattern`, see `xclip_jax.commands.embed`, after embedding them if necessary.

    Raises `UserError` if no image can be read.
    """
    source = open_images(pattern)
    # Other folders may have files of the same names and sizes.
    parts = f"{model.fingerprint()} {source.digest} {source.places()}"
    key = hashlib.sha256(os.fsencode(parts)).hexdigest()[:16]
    file = storage.cache_dir() / "search" / f"{key}.parquet"
    embed(model, {"image": source}, str(file), max_unreadable=max_unreadable)
    bad = [entry["index"] for entry in json_lines.read(storage.as_path(ledger_of(file)))]
    return Index(model, source, np.delete(np.arange(len(source)), bad), embeddings.read_arrow(file))


def make_app(index: Index) -> Any:
    """Return the Starlette application: a page, and JSON answers to its requests."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = environment().get_template("search.html").render(count=len(index))
    thumbnail = functools.lru_cache(_KEPT)(index.thumbnail)
    answer = functools.partial(JSONResponse, headers=_HEADERS)

    def show(_: Request) -> Response:
        return HTMLResponse(page, headers=_HEADERS)

    def number(request: Request) -> int:
        text = request.path_params["image"]
        if len(text) > 18 or not (text.isascii() and text.isdigit()):  # Python refuses to convert thousands of digits
            raise HTTPException(404)
        return int(text)

    def matches(found: list[Match]) -> Response:
        return answer({"matches": [match._asdict() for match in found]})

    def search(request: Request) -> Response:
        return matches(index.by_text(request.query_params.get("text", "")))

    def similar(request: Request) -> Response:
        return matches(index.by_image(number(request)))

    def small(request: Request) -> Response:
        return Response(thumbnail(number(request)), media_type="image/webp", headers=_HEADERS)

    def fault(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return answer({"error": error.detail}, error.status_code)
        return answer({"error": str(error)}, 404 if isinstance(error, IndexError) else 400)

    return Starlette(
        routes=[
            Route("/", show),
            Route("/search", search),
            Route("/similar/{image}", similar),
            Route("/thumbnail/{image}", small),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS)],
        exception_handlers=dict.fromkeys((UserError, IndexError, HTTPException), fault),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(prog="xclip-jax serve", description=__doc__)
    parser.add_argument("checkpoint", metavar="RUN", help="run directory, or weights")
    parser.add_argument("--images", required=True, help=IMAGES)
    parser.add_argument("--step", type=int, help="step of a run's checkpoint; the newest by default")
    parser.add_argument("--port", type=int, default=8000, help="8000 by default; 0 for any free port")
    parser.add_argument("--batch", type=int, default=32, help="images encoded at once")
    parser.add_argument("--max_unreadable", type=float, default=MAX_UNREADABLE, help=MAY_FAIL)
    add_trust(parser)
    flags = parser.parse_args(argv)
    with exit_with_message():
        uvicorn = import_extra("uvicorn", "serve", "serve")
        check_count("--batch", flags.batch, 1)
        try:  # before embedding, which may take long
            listening = socket.create_server(("127.0.0.1", flags.port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {flags.port}: {error}; set another --port, or 0.") from error
        with listening:
            compiler.enable_cache()
            model = load(flags.checkpoint, step=flags.step, batch=flags.batch, trust=flags.trust)
            index = make_index(model, flags.images, flags.max_unreadable)
            index.by_text("an image")  # compiles
            log0(f"{len(index):,} images: http://127.0.0.1:{listening.getsockname()[1]}  (Ctrl-C to end)")
            config = uvicorn.Config(make_app(index), ws="none", log_level="warning", server_header=False)
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
