"""Files of one JSON object per line, which a run appends to, and a resumed run continues."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from xclip_jax.core.console import log0
from xclip_jax.core.storage import is_remote, os_errors, strict_json, write_whole

# Seconds between two writes of a file in a bucket: 50 times as long as a write took, within limits.
_REST, _LEAST_SECONDS, _MOST_SECONDS = 50, 60, 600


class JsonLines:
    """A file of one JSON object per line that a run appends to, and that a resumed run continues.

    Objects in a bucket cannot grow: their lines are kept in memory, and all written again once in a while, more rarely
    the longer that takes.

    Attributes:
      kept: the objects of an existing file that stay, if this process writes; they may be many.
    """

    def __init__(self, path: epath.Path, keep: Callable[[dict[str, Any]], bool], *, writes: bool = True) -> None:
        """Open `path`, without the lines that were written after the point to resume from.

        Args:
          path: the file; it need not exist.
          keep: whether an existing object stays. Lines that are not a JSON object, such as half a line of a process
            that was killed, do not, nor objects that lack a value which `keep` reads, or have another type of it.
          writes: false for all but one process of a run, which read and write nothing.
        """
        self.path, self._writes = path, writes
        old = path.read_bytes() if writes and path.exists() else b""
        self.kept = read(path, keep) if writes else []
        lines = [f"{strict_json(content)}\n" for content in self.kept]
        if writes and "".join(lines).encode() != old:
            write_whole(path, "".join(lines))
        self._lines: list[str] | None = lines if is_remote(str(path)) else None
        self._changed, self._next = False, 0.0  # whether lines are unwritten, and the earliest time to write them

    def append(self, *contents: Mapping[str, Any]) -> None:
        """Append objects; addresses in them are written without passwords and signatures."""
        lines = [f"{strict_json(content)}\n" for content in contents]
        if not (self._writes and lines):
            return
        if self._lines is None:
            with os_errors(str(self.path)), self.path.open("a") as file:
                file.write("".join(lines))
            return
        self._lines += lines
        self._changed = True
        if time.monotonic() > self._next:
            self.flush()

    def flush(self) -> None:
        """Write what is left; lines that a store refuses are kept, with a warning, and written later."""
        try:
            self.close()
        except OSError as error:
            log0(f"WARNING: {error}; its lines are kept, and written later")

    def close(self) -> None:
        """Write what is left; more may be appended. Raises `OSError` if a store refuses it."""
        if not (self._lines and self._changed):
            return
        began = time.monotonic()
        self._next = began + _LEAST_SECONDS
        with os_errors(str(self.path)):
            self.path.write_text("".join(self._lines))
        self._changed = False
        ended = time.monotonic()
        self._next = ended + min(max(_REST * (ended - began), _LEAST_SECONDS), _MOST_SECONDS)


def read(path: epath.Path, keep: Callable[[dict[str, Any]], bool] = lambda _: True) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines that `keep` accepts, none without it; damaged lines are left out."""
    objects = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):  # brackets without end; `keep`
            if isinstance(content := json.loads(line), dict) and keep(content):
                objects.append(content)
    return objects
