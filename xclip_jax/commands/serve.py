"""Search a folder of images by text, and label images: a web page on this machine.

    xclip-jax serve RUN --images FOLDER
    xclip-jax serve ViT-B-32.pt --images '/data/photos/**/*.jpg' --names names.txt --port 8080

A text finds the images that fit it best. An image of the folder, or one uploaded on the page, gets the best of the
labels and the most similar images. Labels can be typed on the page; by default they are the lines of --names, or the
images' captions, or else the names of their folders.

Images are embedded once, and again if their file changes. Their embeddings are kept in --cache, by default
~/.cache/xclip_jax/search, for the eight models and folders that were used last. Questions and uploads are neither
stored nor sent elsewhere. The page answers only this machine; with --host 0.0.0.0 it answers everyone who reaches the
machine, and shows them the images.
"""

import argparse
import contextlib
import errno
import pathlib
import socket
from collections.abc import Sequence

from absl import logging

from xclip_jax import model as inference
from xclip_jax.commands.search_index import MAX_NAMES, MAX_TEXT, make_index
from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample, Parser, UserError, check_count, exit_with_message, public
from xclip_jax.core.imports import add_trust
from xclip_jax.data.text import decode_text
from xclip_jax.train import compilation_cache

_HERE = "127.0.0.1"


def _in_url(host: str) -> str:
    """Return a host as URLs write it, with IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="xclip-jax serve", description=__doc__, hints={"checkpoint": "write RUN without --checkpoint"})
    parser.add_argument("checkpoint", metavar="RUN", help="run directory, or weights")
    parser.add_argument("--images", required=True, help="a folder, or files: globs, ranges {00..12}, lists; or tars")
    parser.add_argument("--names", default="", metavar="FILE", help="file with a label in each line")
    parser.add_argument("--cache", default="", metavar="FOLDER", help="folder for embeddings")
    parser.add_argument("--step", type=int, help="step of a run's checkpoint; the newest by default")
    parser.add_argument("--host", default=_HERE, help=f"address to listen on; {_HERE} by default")
    parser.add_argument("--port", type=int, default=8000, help="8000 by default; 0 for any that is free")
    parser.add_argument("--batch", type=int, default=32, help="images that are encoded at once")
    add_trust(parser)
    return parser.parse_args(argv)


def read_names(path: str) -> list[str]:
    """Return the lines of a file without empty ones; [] without a path. Raises `UserError`."""
    if not path:
        return []
    try:
        names = [line.strip() for line in decode_text(pathlib.Path(path).read_bytes()).splitlines() if line.strip()]
    except (OSError, BadSample) as error:
        raise UserError(f"--names {path!r} cannot be read ({error}); give a file of text, a name a line.") from error
    if not 0 < len(names) <= MAX_NAMES:
        raise UserError(f"--names {path!r} has {len(names)} names; give 1 to {MAX_NAMES}, one a line.")
    if long := [name for name in names if len(name) > MAX_TEXT]:
        raise UserError(
            f"--names {path!r} has a name of {len(long[0]):,} letters, {long[0][:40]!r} ...; give at most {MAX_TEXT:,}."
        )
    return names


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Raises `UserError` where it cannot."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port is {port}; expected 0 to 65535.")
    if not host:
        raise UserError(f"--host is empty; give an address, such as {_HERE}, or 0.0.0.0 for all of this machine's.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        remedy = "set another --port, or 0" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "set another --host"
        raise UserError(f"--host {host} --port {port}: {error.strerror}; {remedy}.") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _arguments(argv)
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        try:
            import uvicorn

            from xclip_jax.commands.search_app import Connection, machine_names, make_app
        except ImportError as error:
            raise UserError("serve needs a web server: pip install 'xclip_jax[serve]'.") from error
        check_count("--batch", flags.batch, 1)
        names = read_names(flags.names)
        with listen(flags.host, flags.port) as listening:  # before the images are embedded, which may take a while
            compilation_cache.enable()
            model = inference.load(flags.checkpoint, step=flags.step, batch=flags.batch, trust=flags.trust)
            index = make_index(model, flags.images, cache=flags.cache, names=names)
            index.by_text("an image", 1)  # compiles
            port = listening.getsockname()[1]
            app = make_app(index, pathlib.Path(public(flags.images)).name, {*machine_names(), flags.host.lower()})
            log0(f"{len(index):,} images: http://{_in_url(flags.host)}:{port}  (Ctrl-C to end)")
            config = uvicorn.Config(app, http=Connection, ws="none", log_level="warning", server_header=False)
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
