"""Names of many files, reads at an offset, and files that grow, on local disks and (through fsspec) in buckets."""

import functools
import glob
import json
import os
import pathlib
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from xclip_jax.errors import UserError

# Open files kept in each process; the soft limit of open files is often 1024.
_OPEN = 256
_TRIES = 3
REWRITE_SECONDS = 60
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_remote(path: str) -> bool:
    """Whether `path` is a URL such as gs://, s3:// or https:// and not in a file system."""
    return "://" in path


class JsonLines:
    """A file of one JSON object a line that a run makes longer, and that a resumed run takes up where it stood.

    Objects in a bucket cannot grow: there all lines are kept, and written anew once in a while.

    Attributes:
      kept: the objects that were there and stay.
    """

    def __init__(self, path: epath.Path, keep: Callable[[dict[str, Any]], bool], *, writes: bool = True) -> None:
        """Opens `path`, without what was written behind the point to go on from.

        Args:
          path: the file; it need not exist.
          keep: whether an object that is there stays. Half a line, of a process that was killed, does not.
          writes: false for all but one process of a run: they only read.
        """
        self.path, self._writes, self.kept = path, writes, []
        there = path.read_text() if path.exists() else ""
        for line in there.splitlines():
            try:
                content = json.loads(line)
            except json.JSONDecodeError:
                continue
            if keep(content):
                self.kept.append(content)
        lines = [f"{json.dumps(content)}\n" for content in self.kept]
        if writes and "".join(lines) != there:
            path.write_text("".join(lines))
        self._lines: list[str] | None = lines if is_remote(str(path)) else None
        self._written = 0.0

    def append(self, *contents: Mapping[str, Any]) -> None:
        """Adds objects at the end."""
        lines = [f"{json.dumps(content)}\n" for content in contents]
        if not (self._writes and lines):
            return
        if self._lines is None:
            with self.path.open("a") as file:
                file.write("".join(lines))
            return
        self._lines += lines
        if time.monotonic() - self._written > REWRITE_SECONDS:
            self.close()

    def close(self) -> None:
        """Writes what is left; more may be added."""
        if self._writes and self._lines:
            self.path.write_text("".join(self._lines))
            self._written = time.monotonic()


def _split(pattern: str) -> list[str]:
    """Parts between the commas that are outside braces."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(pattern):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append(pattern[start:i])
            start = i + 1
    if depth:
        raise UserError(f"pattern {pattern!r} has braces that do not match; write {{00000..00331}} or {{a,b}}.")
    return [part.strip() for part in (*parts, pattern[start:]) if part.strip()]


def _braces(pattern: str) -> Iterator[str]:
    """All strings that a pattern with {a,b} and {000..123} stands for, as in a shell."""
    start = pattern.find("{")
    if start < 0:
        yield pattern
        return
    depth, end = 0, start
    for end in range(start, len(pattern)):
        depth += (pattern[end] == "{") - (pattern[end] == "}")
        if depth == 0:
            break
    inside = pattern[start + 1 : end]
    if found := _RANGE.fullmatch(inside):
        first, last = int(found[1]), int(found[2])
        step = 1 if last >= first else -1
        padded = any(len(number) > 1 and number[0] == "0" for number in found.groups())
        width = max(map(len, found.groups())) if padded else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        choices = [choice for part in _split(inside) for choice in _braces(part)]
    for choice in choices:
        for rest in _braces(pattern[end + 1 :]):
            yield pattern[:start] + choice + rest


def expand(pattern: str) -> list[str]:
    """The files that `pattern` names: a list with commas of paths, brace ranges and globs, local or remote.

    "a/{00000..00331}.tar,b/*.tar" is 332 files and those that match; each file is named once, globs are sorted.

    Raises:
      UserError: nothing matches a glob, a file does not exist, braces do not match.
    """
    found: dict[str, None] = {}
    missing = []
    for part in (path for item in _split(pattern) for path in _braces(item)):
        if is_remote(part):
            matches = _remote_glob(part) if glob.has_magic(part) else [part]
        else:
            part = os.path.expanduser(part)
            matches = sorted(glob.glob(part, recursive=True)) if glob.has_magic(part) else [part]
            if matches == [part] and not os.path.isfile(part):
                missing.append(part)
        if not matches:
            raise UserError(f"no file matches {part!r}; check the path, or list the folder.")
        found |= dict.fromkeys(matches)
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(found)} files that {pattern!r} names do not exist, the first is "
            f"{missing[0]!r}; correct the range, or use a glob such as *.tar for the files that are there."
        )
    if not found:
        raise UserError(f"pattern {pattern!r} names no file; write a path, a range {{00000..00331}} or a glob.")
    return list(found)


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path!r} cannot be opened ({error}); install the file system's package, as gcsfs.") from error


def _remote_glob(pattern: str) -> list[str]:
    system, path = _remote(pattern)
    return sorted(map(system.unstrip_protocol, system.glob(path)))


def stat(path: str) -> tuple[int, int]:
    """Size in bytes and a number that changes with the content: the time of the last change, where there is one."""
    if is_remote(path):
        return _remote_stat(path)
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


@functools.cache
def _remote_stat(path: str) -> tuple[int, int]:
    """Kept: a request a file takes minutes for thousands of them."""
    system, name = _remote(path)
    info = system.info(name)
    keys = ("etag", "ETag", "md5Hash", "mtime", "LastModified", "created")
    changed = next((info[key] for key in keys if info.get(key)), 0)
    return info["size"], int.from_bytes(str(changed).encode()[-8:], "big")


class File:
    """Bytes of a file at any offset; safe in threads. Closed with its last reference."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = None
        if not is_remote(path):
            self._fd = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end of the file. A passing failure of a network disk is retried."""
        for wait in range(_TRIES):
            try:
                return self._read(offset, size)
            except OSError:
                if wait == _TRIES - 1:
                    raise
                time.sleep(0.1 * 10**wait)
        raise AssertionError

    def _read(self, offset: int, size: int) -> bytes:
        if self._fd is None:
            system, name = _remote(self.path)
            return system.cat_file(name, start=offset, end=offset + size)
        data = os.pread(self._fd, size, offset)
        while len(data) < size and (more := os.pread(self._fd, size - len(data), offset + len(data))):
            data += more
        return data


@functools.lru_cache(maxsize=_OPEN)
def open_file(path: str) -> File:
    """The file `path`, one of the last that this process used or opened anew."""
    return File(path)


def writable(folder: pathlib.Path) -> bool:
    """Whether files can be written into `folder`, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
