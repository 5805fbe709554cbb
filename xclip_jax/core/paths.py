"""Paths and URLs as people write them in a command or a config, the cache, and files of other projects."""

import importlib.resources
import os
import pathlib
import re

from xclip_jax.core.errors import UserError

_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")  # one letter is a drive


def expand_home(path: str) -> str:
    """Return `path` with "~" at its start expanded, which shells leave in --config.run=~/x.

    Raises:
      UserError: a URL with one slash, which would be a local folder "gs:".
    """
    if match := _ONE_SLASH.match(path):
        scheme, rest = match[0][:-1], path[match.end() :]
        # Named as a URL, which messages show without passwords.
        written = f"'{scheme}//{rest}' is written with one slash after {scheme!r}"
        raise UserError(f"{written}; write two, or begin a local path with './'.")
    return os.path.expanduser(path)


def cache_dir() -> pathlib.Path:
    """Return the folder of downloads and prepared data: $XCLIP_CACHE, else ~/.cache/xclip_jax. It may not exist yet."""
    return pathlib.Path(os.environ.get("XCLIP_CACHE") or "~/.cache/xclip_jax").expanduser()


def third_party(name: str) -> bytes:
    """Return a file of another project that is distributed with this package; see `data/third_party/README.md`."""
    return (importlib.resources.files("xclip_jax.data") / "third_party" / name).read_bytes()
