"""Files with one JSON object per line, which survive kills and resumes."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from xclip_jax.core.console import log0
from xclip_jax.core.storage import is_remote, os_errors, read_bytes, strict_json, write_whole

_SECONDS = 120  # between writes of a file in a bucket


class JsonLines:
    """A file with one JSON object per line; a run appends to it, and a resumed run continues it.

    Objects in a bucket cannot grow, so all lines stay in memory and are rewritten at intervals.
    `kept` lists the objects of the existing file that stay.
    """

    def __init__(self, path: epath.Path, keep: Callable[[dict[str, Any]], bool], *, writes: bool = True) -> None:
        """Open `path` and drop the lines written after the point to resume from.

        Args:
          path: the file; need not exist.
          keep: whether to keep an existing object. Damaged lines are dropped, such as half a line of a killed process,
            and so are objects for which `keep` raises `KeyError` or `TypeError`.
          writes: false in all processes of a run except one; they neither read nor write.
        """
        self.path, self._writes = path, writes
        old = (read_bytes(path) or b"") if writes else b""
        self.kept = read(path, keep) if writes else []
        lines = [f"{strict_json(content)}\n" for content in self.kept]
        if "".join(lines).encode() != old:
            write_whole(path, "".join(lines))
        self._lines: list[str] | None = lines if is_remote(str(path)) else None
        self._changed = False  # whether some lines are unwritten
        self._next = 0.0  # earliest time of the next write

    def append(self, *contents: Mapping[str, Any]) -> None:
        """Append objects, without the secrets of URLs."""
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
        """Write pending lines; if the store refuses, warn and keep them for a later write."""
        try:
            self.close()
        except OSError as error:
            log0(f"WARNING: {error}; its lines are kept, and written later")

    def close(self) -> None:
        """Write pending lines; more may be appended later. Raises `OSError` if the store refuses."""
        if not (self._lines and self._changed):
            return
        self._next = time.monotonic() + _SECONDS
        with os_errors(str(self.path)):
            self.path.write_text("".join(self._lines))
        self._changed = False


def read(path: epath.Path, keep: Callable[[dict[str, Any]], bool] = lambda _: True) -> list[dict[str, Any]]:
    """Return the objects in a file that `keep` accepts, [] for a missing file; damaged lines are skipped."""
    objects = []
    for line in (read_bytes(path) or b"").split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):  # the last two from `keep`
            content = json.loads(line)
            if isinstance(content, dict) and keep(content):
                objects.append(content)
    return objects
