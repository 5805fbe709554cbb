"""Search a folder of images by text, and label images: a web page on this machine.

    xclip-jax serve RUN --images FOLDER
    xclip-jax serve ViT-B-32.pt --images '/data/photos/**/*.jpg' --port 8080
    xclip-jax serve RUN --images 'parquet:/data/shop/test?image=photo&text=title'

A text finds the best matching images. An image of the folder, or an uploaded one, gets the best labels and the most
similar images. Labels are typed on the page; by default they are the images' captions, or else their folders' names.

Images are embedded once, and again if their file changes; the embeddings are cached in ~/.cache/xclip_jax/search, or in
--cache. Queries and uploads are neither stored nor sent elsewhere. Only this machine can open the page; from another
one use ssh -L 8000:localhost:8000 HOST.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import pathlib
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from xclip_jax import model as inference
from xclip_jax.commands.embed import Progress, embed_images
from xclip_jax.commands.inputs import IMAGES, Images, open_images
from xclip_jax.core import storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample, Parser, UserError, check_count, exit_with_message
from xclip_jax.core.imports import add_trust
from xclip_jax.data import embeddings, images
from xclip_jax.model import TEMPLATES, Model
from xclip_jax.parallel import compiler
from xclip_jax.report.page import environment

MAX_UPLOAD = 20 << 20  # bytes of an image
MOST_NAMES = 10_000  # labels of a request
COUNT = 24  # found images
LABELS = 10  # labels, and similar images, of an answer
SIDE = 280  # of a thumbnail, pixels
_KEPT = 1024  # thumbnails in memory, 10 kB each
_HOSTS = ["localhost", "127.0.0.1"]  # another site may give this machine a name
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
_DEFAULT_NAMES = 100
_PART = 256  # images between two lines of progress
_STORE_SECONDS = 60.0  # between stores, longer if storing is slow


class Match(NamedTuple):
    """An image of the folder with its number, path in the folder, caption, and cosine with the query."""

    image: int
    name: str
    text: str
    score: float


class Embedded(NamedTuple):
    """Embedded images: numbers in the source, captions, and embeddings fp32 (n, e)."""

    numbers: list[int]
    texts: list[str]
    rows: np.ndarray


class Index:
    """A thread-safe model with images and their embeddings; `names` are the default labels."""

    def __init__(self, model: Model, source: Images, embedded: Embedded) -> None:
        self._model = model
        self._source = source
        self._lock = threading.Lock()
        self._numbers, self._texts, self._rows = embedded
        paths = [source.name(i) for i in self._numbers]
        start = os.path.commonprefix(paths).rfind("/") + 1  # noqa: RUF071 commonpath changes gs://
        self._names = [path[start:] for path in paths]
        captions = [text.strip().partition("\n")[0].strip() for text in self._texts]
        folders = {pathlib.PurePath(path).parent.name.replace("_", " ") for path in paths}
        labels = dict.fromkeys(filter(None, captions)) or (sorted(folders) if len(folders) > 1 else [])
        self.names = list(labels)[:_DEFAULT_NAMES]

    def __len__(self) -> int:
        return len(self._numbers)

    def by_text(self, text: str, count: int) -> list[Match]:
        """Return the best matching images of a text, best first."""
        with self._lock:
            (row,) = self._model.encode_text([text])
        return self._nearest(row, count)

    def by_image(
        self, image: int | bytes, names: Sequence[str], count: int
    ) -> tuple[list[tuple[str, float]], list[Match]]:
        """Return the best `count` names (default: `self.names`) with their cosines, and as many similar images.

        `image` is the number of an image in the folder (`IndexError` if unknown), or the content of a file.
        """
        names = list(names or self.names)
        if isinstance(image, int):
            if not 0 <= image < len(self):
                raise IndexError(f"no image {image}")
            row = self._rows[image]
        else:
            prepared = self._model.prepare(image)
            with self._lock:
                row = self._model.encode_prepared([prepared])[0]
        scores = np.empty(0)
        if names:
            with self._lock:
                scores = self._model.encode_text([TEMPLATES[0].replace("{}", name) for name in names]) @ row
        best = [(names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:count]]
        return best, [match for match in self._nearest(row, count + 1) if match.image != image][:count]

    def _nearest(self, row: np.ndarray, count: int) -> list[Match]:
        scores = self._rows @ row
        best = np.argsort(-scores, kind="stable")[:count]
        return [Match(int(i), self._names[i], self._texts[i], float(scores[i])) for i in best]

    def content(self, image: int) -> bytes:
        """Return an image's file; raise `IndexError` for an unknown number, `UserError` for an unreadable file."""
        number = self._numbers[image]
        try:
            return self._source.read(number)[0]
        except (OSError, UserError) as error:  # do not show their messages, which contain the path
            raise UserError(f"The file of image {image}, {self._names[image]!r}, can no longer be read.") from error


def make_index(model: Model, pattern: str, *, cache: str = "") -> Index:
    """Return the index of the images of `pattern`, see `xclip_jax.commands.embed`, after embedding uncached ones.

    The folder `cache` stores one file per model and pattern, by default in the user's cache.
    """
    source = open_images(pattern)
    folder = pathlib.Path(cache).expanduser() if cache else storage.cache_dir() / "search"
    place = pattern if storage.is_remote(pattern) else os.path.abspath(os.path.expanduser(pattern))
    key = hashlib.sha256(json.dumps([model.fingerprint(), place]).encode()).hexdigest()[:16]
    return Index(model, source, embed(model, source, folder / f"{key}.parquet"))


def embed(model: Model, source: Images, file: pathlib.Path) -> Embedded:
    """Return the embeddings of images; compute and store those missing in `file`.

    Raises `UserError` if the file is damaged or no image can be read.
    """
    known: dict[str, tuple[str, np.ndarray]] = {}
    if file.exists():
        columns = embeddings.read(file)
        known = dict(zip(columns["id"], zip(columns["text"], columns["embedding"], strict=True), strict=True))
    ids = list(_ids(source))
    missing = [i for i, image in enumerate(ids) if image not in known]
    bad: list[str] = []
    done = 0
    progress = Progress("images", 0, len(missing))

    def store() -> float:
        """Write the whole file; return the time of the next store, later if this one was slow."""
        began = time.monotonic()
        rows = {image: known[image] for image in ids if image in known}
        if missing and rows:
            _write(file, rows)
        ended = time.monotonic()
        return ended + max(_STORE_SECONDS, 20 * (ended - began))

    due = time.monotonic() + _STORE_SECONDS
    try:
        for part in embed_images(model, lambda n: source.read(missing[n]), len(missing), _PART):
            for row, i in enumerate(missing[done : done + len(part.rows)]):
                if row in part.bad:
                    bad.append(f"{source.name(i)}: {part.bad[row]}")
                else:
                    known[ids[i]] = (part.texts[row], part.rows[row])
            done += len(part.rows)
            progress.after(done, len(part.bad))
            if time.monotonic() > due:
                due = store()
    finally:  # also after Ctrl-C
        store()
    if bad:
        log0(f"{len(bad):,} images cannot be read; the first is {bad[0]}")
    good = [i for i, image in enumerate(ids) if image in known]
    if not good:
        raise UserError(f"no image can be read; the first is {bad[0]}.")
    texts = []
    for i in good:
        caption = known[ids[i]][0]
        with contextlib.suppress(BadSample):
            caption = source.caption(i, caption)  # a caption file may have changed since
        texts.append(caption)
    return Embedded(good, texts, np.stack([known[ids[i]][1] for i in good]))


def _ids(source: Images) -> Iterator[str]:
    """Yield a unique id with name, size and time of each image's file."""
    counts: collections.Counter = collections.Counter()
    for i in range(len(source)):
        name = source.name(i)
        counts[name] += 1  # keys of a tar may repeat
        yield f"{name}\t{counts[name]} {source.stamp(i)}"


def _write(path: pathlib.Path, rows: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """Write {id: (text, embedding)} completely or, with a warning, not at all."""
    texts, embedded = zip(*rows.values(), strict=True)
    columns = {"kind": ["image"] * len(rows), "id": list(rows), "text": texts, "embedding": np.stack(embedded)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.whole_file(path, f".{os.getpid()}") as temporary:
            embeddings.write(temporary, columns)
    except OSError as error:
        log0(f"WARNING: {error.filename}: {error.strerror}; the next start embeds the images again")


def make_app(index: Index) -> Any:
    """Return the Starlette application: a page, and JSON answers to its requests."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = environment().get_template("search.html")
    thumbnail = functools.lru_cache(_KEPT)(lambda number: shrink(index.content(number)))
    answer = functools.partial(JSONResponse, headers=_HEADERS)

    def show(_: Request) -> Response:
        content = page.render(count=len(index), names=index.names, max_upload=MAX_UPLOAD)
        return HTMLResponse(content, headers=_HEADERS)

    def search(request: Request) -> Response:
        matches = index.by_text(request.query_params.get("text", ""), COUNT)
        return answer({"matches": [match._asdict() for match in matches]})

    def small(request: Request) -> Response:
        return Response(thumbnail(request.path_params["image"]), media_type="image/webp", headers=_HEADERS)

    async def label(request: Request) -> Response:
        """Answer a body of labels, one per line; an uploaded image follows after an empty line."""
        origin = request.headers.get("origin")
        if origin is not None and urllib.parse.urlsplit(origin).netloc != request.headers["host"]:
            raise HTTPException(403, "Requests by other sites' pages are not answered.")
        length = int(request.headers.get("content-length", MAX_UPLOAD + 1))
        if length > MAX_UPLOAD or "transfer-encoding" in request.headers:  # chunks have no total length
            raise HTTPException(413, f"The image is too large; send at most {MAX_UPLOAD >> 20} MiB.")
        lines, _, content = (await request.body()).partition(b"\n\n")
        image = int(request.query_params["image"]) if "image" in request.query_params else content
        names = lines.decode(errors="replace").split("\n") if lines else []
        if len(names) > MOST_NAMES:
            raise HTTPException(413, f"{len(names):,} labels are too many; send at most {MOST_NAMES:,}.")
        best, near = await run_in_threadpool(index.by_image, image, names, LABELS)
        named = [{"name": name, "score": score} for name, score in best]
        return answer({"names": named, "matches": [match._asdict() for match in near]})

    def fault(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return answer({"error": error.detail}, error.status_code)
        return answer({"error": str(error)}, 404 if isinstance(error, IndexError) else 400)

    return Starlette(
        routes=[
            Route("/", show),
            Route("/search", search),
            Route("/names", label, methods=["POST"]),
            Route("/thumbnail/{image:int}", small),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS)],
        exception_handlers=dict.fromkeys((ValueError, IndexError, HTTPException, ClientDisconnect), fault),
    )


def shrink(content: bytes) -> bytes:
    """Return an image file as WebP of at most `SIDE` x `SIDE` pixels; raise `UserError` if unreadable."""
    image = Image.fromarray(images.decode(content, scaled_to=SIDE))
    image.thumbnail((SIDE, SIDE))
    small = io.BytesIO()
    image.save(small, "WEBP", quality=85)
    return small.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(prog="xclip-jax serve", description=__doc__)
    parser.add_argument("checkpoint", metavar="RUN", help="run directory, or weights")
    parser.add_argument("--images", required=True, help=IMAGES)
    parser.add_argument("--cache", default="", metavar="FOLDER", help="folder for embeddings")
    parser.add_argument("--step", type=int, help="step of a run's checkpoint; the newest by default")
    parser.add_argument("--port", type=int, default=8000, help="8000 by default; 0 for any free port")
    parser.add_argument("--batch", type=int, default=32, help="images encoded at once")
    add_trust(parser)
    flags = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        try:
            import uvicorn
        except ImportError as error:
            raise UserError("serve needs a web server: pip install 'xclip_jax[serve]'.") from error
        check_count("--batch", flags.batch, 1)
        try:  # before embedding, which may take long
            listening = socket.create_server(("127.0.0.1", flags.port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {flags.port}: {error}; set another --port, or 0.") from error
        with listening:
            compiler.enable_cache()
            model = inference.load(flags.checkpoint, step=flags.step, batch=flags.batch, trust=flags.trust)
            index = make_index(model, flags.images, cache=flags.cache)
            index.by_text("an image", 1)  # compiles
            log0(f"{len(index):,} images: http://127.0.0.1:{listening.getsockname()[1]}  (Ctrl-C to end)")
            config = uvicorn.Config(make_app(index), ws="none", log_level="warning", server_header=False)
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
