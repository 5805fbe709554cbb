"""Paths and URLs as people write them, on a command line or in a config."""

import os
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
