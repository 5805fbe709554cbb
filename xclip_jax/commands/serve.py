"""Search a folder of images by text, and label images: a web page on this machine.

    xclip-jax serve RUN --images FOLDER
    xclip-jax serve ViT-B-32.pt --images '/data/photos/**/*.jpg' --port 8080

A text finds the images that fit it best. An image of the folder, or one uploaded on the page, gets the best of the
labels and the most similar images. Labels are typed on the page; by default they are the images' captions, or else the
names of their folders.

Images are embedded once, and again if their file changes; the embeddings are kept in ~/.cache/xclip_jax/search, or in
--cache. Questions and uploads are neither stored nor sent elsewhere. The page answers this machine only; from another
one it is reached through ssh -L 8000:localhost:8000 HOST.
"""

import contextlib
import functools
import io
import socket
from collections.abc import Sequence
from typing import Any

from absl import logging
from PIL import Image

from xclip_jax import model as inference
from xclip_jax.commands.search import Index, make_index
from xclip_jax.core.console import log0
from xclip_jax.core.errors import Parser, UserError, check_count, exit_with_message
from xclip_jax.core.imports import add_trust
from xclip_jax.data import images
from xclip_jax.report.page import environment
from xclip_jax.train import checks, compilation_cache

MAX_UPLOAD = 20 << 20  # bytes of an image
COUNT, LABELS = 24, 10  # images and labels of an answer
SIDE = 280  # of a thumbnail, pixels
_KEPT = 1024  # thumbnails in memory, 10 kB each
_HOSTS = ["localhost", "127.0.0.1"]  # a page of another site may give this machine a name of its own
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


def make_app(index: Index) -> Any:
    """Return the web application, of Starlette: a page, and JSON answers to its questions."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = environment().get_template("search.html")

    def show(_: Request) -> Response:
        content = page.render(count=len(index), names=index.names, max_upload=MAX_UPLOAD)
        return HTMLResponse(content, headers=_HEADERS)

    def search(request: Request) -> Response:
        matches = index.by_text(request.query_params.get("text", ""), COUNT)
        return JSONResponse({"matches": [match._asdict() for match in matches]}, headers=_HEADERS)

    def small(request: Request) -> Response:
        return Response(thumbnail(request.path_params["image"]), media_type="image/webp", headers=_HEADERS)

    @functools.lru_cache(_KEPT)
    def thumbnail(number: int) -> bytes:
        return shrink(index.content(number))

    async def label(request: Request) -> Response:
        """Answer a body of labels, one a line, and for an image's file an empty line and the file."""
        if int(request.headers.get("content-length", 0)) > MAX_UPLOAD:
            raise HTTPException(413, f"The image is too large; send at most {MAX_UPLOAD >> 20} MiB.")
        lines, _, content = (await request.body()).partition(b"\n\n")
        image = int(request.query_params["image"]) if "image" in request.query_params else content
        names = lines.decode(errors="replace").split("\n") if lines else []
        best, near = await run_in_threadpool(index.by_image, image, names, LABELS)
        answer = {"names": [{"name": name, "score": score} for name, score in best]}
        return JSONResponse(answer | {"matches": [match._asdict() for match in near]}, headers=_HEADERS)

    def fault(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, headers=_HEADERS)
        return JSONResponse({"error": str(error)}, 404 if isinstance(error, IndexError) else 400, headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", show),
            Route("/search", search),
            Route("/names", label, methods=["POST"]),
            Route("/thumbnail/{image:int}", small),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS)],
        exception_handlers=dict.fromkeys((ValueError, IndexError, HTTPException), fault),
    )


def shrink(content: bytes) -> bytes:
    """Return an image file as WebP of at most `SIDE` x `SIDE` pixels; raise `UserError` if it cannot be read."""
    image = Image.fromarray(images.decode(content, scaled_to=SIDE))
    image.thumbnail((SIDE, SIDE))
    small = io.BytesIO()
    image.save(small, "WEBP", quality=85)
    return small.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(prog="xclip-jax serve", description=__doc__, hints={"checkpoint": "write RUN without --checkpoint"})
    parser.add_argument("checkpoint", metavar="RUN", help="run directory, or weights")
    parser.add_argument("--images", required=True, help="a folder, or files: globs, ranges {00..12}, lists; or tars")
    parser.add_argument("--cache", default="", metavar="FOLDER", help="folder for embeddings")
    parser.add_argument("--step", type=int, help="step of a run's checkpoint; the newest by default")
    parser.add_argument("--port", type=int, default=8000, help="8000 by default; 0 for any that is free")
    parser.add_argument("--batch", type=int, default=32, help="images that are encoded at once")
    add_trust(parser)
    flags = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        try:
            import uvicorn
        except ImportError as error:
            raise UserError("serve needs a web server: pip install 'xclip_jax[serve]'.") from error
        check_count("--batch", flags.batch, 1)
        try:  # before the images are embedded, which may take a while
            listening = socket.create_server(("127.0.0.1", flags.port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {flags.port}: {error}; set another --port, or 0.") from error
        with listening:
            compilation_cache.enable()
            checks.warn_of_idle_accelerator()
            model = inference.load(flags.checkpoint, step=flags.step, batch=flags.batch, trust=flags.trust)
            index = make_index(model, flags.images, cache=flags.cache)
            index.by_text("an image", 1)  # compiles
            log0(f"{len(index):,} images: http://127.0.0.1:{listening.getsockname()[1]}  (Ctrl-C to end)")
            config = uvicorn.Config(make_app(index), ws="none", log_level="warning", server_header=False)
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
