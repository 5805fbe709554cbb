"""Paths and URLs as people write them, on a command line or in a config."""

import os
import re

from xclip_jax.errors import UserError

_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")  # one letter is a drive


def expand_home(path: str) -> str:
    """Return `path` with "~" at its start expanded, which shells leave in --config.run=~/x.

    Raises:
      UserError: a URL with one slash, which would be a local folder "gs:".
    """
    if match := _ONE_SLASH.match(path):
        scheme, rest = match[0][:-1], path[match.end() :]
        remedy = f"write '{scheme}//{rest}', or './{path}' for a local path."
        raise UserError(f"{path!r} has one slash after {scheme!r}; {remedy}")
    return os.path.expanduser(path)
