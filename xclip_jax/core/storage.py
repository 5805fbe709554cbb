"""Files on local disks and, through fsspec, in buckets: patterns of names, reads at an offset, JSON files that grow."""

import contextlib
import errno
import functools
import glob
import hashlib
import importlib.resources
import json
import math
import os
import pathlib
import platform
import re
import stat as stat_modes
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from xclip_jax.core import remote
from xclip_jax.core.errors import BadSample, UserError, public
from xclip_jax.core.remote import expand_home

# Open files kept in each process; the soft limit of open files is often 1024.
_OPEN = 256
_TRIES, REWRITE_SECONDS = 3, 60
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MAX_NAMES = 1_000_000
# Remote files whose sizes are cached: about 80 MB at most.
_MAX_REMEMBERED = 1 << 18
_EDGE = 1 << 20
_LASTING = (errno.EINVAL, errno.ETIMEDOUT)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_remote(path: str) -> bool:
    """Whether `path` is a URL such as gs://, s3:// or https:// and not in a file system."""
    return "://" in path


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def strict_json(content: Any, **options: Any) -> str:
    """Return `content` as strict JSON, with `options` of `json.dumps`: floats that are not finite become null."""
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(content), allow_nan=False, **options)


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, whole or not at all, even if the machine stops, or another process writes it too."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(str(path)):
        path.write_bytes(data)  # an object in a bucket appears when it is complete
        return
    temporary = path.parent / f".{path.name}.{platform.node()}.{os.getpid()}.tmp"
    with remote.os_errors(str(path)), temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: epath.Path, content: Any) -> None:
    """Write JSON whole or not at all: readers never see half a file. Floats that are not finite become null.

    Addresses in it are written without passwords and signatures.
    """
    write_whole(path, strict_json(public(content), indent=2, sort_keys=True) + "\n")


class JsonLines:
    """A file of one JSON object a line that a run appends to, and that a resumed run continues.

    Objects in a bucket cannot grow: their lines are kept in memory, and all written again once in a while.

    Attributes:
      kept: the objects of an existing file that stay.
    """

    def __init__(self, path: epath.Path, keep: Callable[[dict[str, Any]], bool], *, writes: bool = True) -> None:
        """Open `path`, without the lines that were written after the point to resume from.

        Args:
          path: the file; it need not exist.
          keep: whether an existing object stays. Lines that are not a JSON object, such as half a line of a process
            that was killed, do not, nor objects that lack a value which `keep` reads, or have another type of it.
          writes: false for all but one process of a run: they only read.
        """
        self.path, self._writes = path, writes
        old = path.read_bytes() if path.exists() else b""
        self.kept = list(filter(None, (_kept_object(line, keep) for line in old.split(b"\n"))))
        lines = [f"{strict_json(content)}\n" for content in self.kept]
        if writes and "".join(lines).encode() != old:
            write_whole(path, "".join(lines))
        self._lines: list[str] | None = lines if is_remote(str(path)) else None
        self._written = 0.0

    def append(self, *contents: Mapping[str, Any]) -> None:
        """Append objects; addresses in them are written without passwords and signatures."""
        lines = [f"{strict_json(public(content))}\n" for content in contents]
        if not (self._writes and lines):
            return
        if self._lines is None:
            with remote.os_errors(str(self.path)), self.path.open("a") as file:
                file.write("".join(lines))
            return
        self._lines += lines
        if time.monotonic() - self._written > REWRITE_SECONDS:
            self.close()

    def close(self) -> None:
        """Write what is left; more may be appended."""
        if self._writes and self._lines:
            self.path.write_text("".join(self._lines))
            self._written = time.monotonic()


def _kept_object(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
        return content if isinstance(content, dict) and keep(content) else None
    except (ValueError, KeyError, TypeError, RecursionError):  # a RecursionError for brackets without end
        return None


def _split(pattern: str) -> list[str]:
    """Split at the commas that are outside braces."""
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
    """Yield all strings of a pattern with {a,b} and {000..123}, as a shell does."""
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
    choices: Iterable[str]
    if match := _RANGE.fullmatch(inside):
        first, last = int(match[1]), int(match[2])
        step = 1 if last >= first else -1
        padded = any(len(number) > 1 and number[0] == "0" for number in match.groups())
        width = max(map(len, match.groups())) if padded else 0
        choices = (f"{number:0{width}d}" for number in range(first, last + step, step))
    else:
        choices = (choice for part in _split(inside) for choice in _braces(part))
    for choice in choices:
        for rest in _braces(pattern[end + 1 :]):
            yield pattern[:start] + choice + rest


def _names(pattern: str) -> Iterator[str]:
    """Yield the paths and globs of a pattern; the path of an existing file is taken literally."""
    if _is_file(pattern):
        yield pattern
        return
    for part in _split(pattern):
        yield from [part] if _is_file(part) else _braces(part)


def _is_file(path: str) -> bool:
    return not is_remote(path) and os.path.isfile(os.path.expanduser(path))


def _glob(pattern: str) -> list[str]:
    if is_remote(pattern):
        system, path = remote.file_system(pattern)
        with remote.os_errors(pattern):
            return sorted(map(system.unstrip_protocol, system.glob(path)))
    matches = sorted(glob.glob(pattern, recursive=True))
    folders = set(filter(os.path.isdir, matches))
    if folders and "**" not in pattern:
        raise UserError(f"{pattern!r} matches the folder {min(folders)!r}; write a glob that matches only files.")
    return [match for match in matches if match not in folders]


def expand(pattern: str) -> list[str]:
    """Return the files that `pattern` names: a list with commas of paths, brace ranges and globs, local or remote.

    "a/{00000..00331}.tar,b/*.tar" is 332 files and those that match. Each file is named once, globs are sorted. The
    path of an existing file is taken literally with its commas, brackets and braces, as the whole pattern or as
    one of its parts; in a glob "?" matches such a letter ("a?b/*.tar" for the folder "a,b"). "**" passes over
    folders.

    Raises:
      UserError: nothing matches a glob, a file does not exist, braces do not match, too many names.
    """
    names: dict[str, None] = {}
    missing = []
    for i, name in enumerate(_names(pattern)):
        if i == _MAX_NAMES:
            raise UserError(f"pattern {pattern!r} names more than {_MAX_NAMES:,} files; correct its ranges.")
        if is_remote(name):
            # A query is not a glob.
            matches = _glob(name) if glob.has_magic(public(name)) else [name]
        else:
            exists = os.path.isfile(name := expand_home(name))
            matches = [name] if exists or not glob.has_magic(name) else _glob(name)
            if matches == [name] and not exists:
                missing.append(name)
        if not matches:
            raise UserError(f"no file matches {name!r}; check the path, or list the folder.")
        names |= dict.fromkeys(matches)
    if missing:
        raise UserError(_about_missing(pattern, missing, len(names)))
    if not names:
        raise UserError(f"pattern {pattern!r} names no file; write a path, a range {{00000..00331}} or a glob.")
    return list(names)


def _about_missing(pattern: str, missing: list[str], n: int) -> str:
    if os.path.isdir(missing[0]):
        return (
            f"{missing[0]!r} is a folder, not a file; write folder:{missing[0]} for images with .txt files next "
            f"to them, or a glob such as {os.path.join(missing[0], '*.tar')!r} for the files in it."
        )
    if n == 1:
        return f"no file or folder {missing[0]!r}; check the path."
    return (
        f"{len(missing)} of the {n} files that {pattern!r} names do not exist, the first is {missing[0]!r}; correct "
        "the range, or use a glob such as *.tar for the files that exist."
    )


def stat(path: str) -> tuple[int, int]:
    """Return the size in bytes and a number that changes with the content, such as the time of the last change.

    Raises:
      OSError: the file does not exist or is refused, or a server does not report its size.
    """
    if is_remote(path):
        return _remote_stat(path)
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=_MAX_REMEMBERED)
def _remote_stat(path: str) -> tuple[int, int]:
    """Cached: a request for each of thousands of files takes minutes."""
    system, name = remote.file_system(path)
    with remote.os_errors(path):
        info = system.info(name)
    if info.get("size") is None:
        raise OSError(errno.EINVAL, "the server does not report the file's size; download the file", path)
    keys = ("etag", "ETag", "md5Hash", "Content-MD5", "generation", "mtime", "LastModified", "updated", "created")
    changed = str(next((info[key] for key in keys if info.get(key)), "")).encode()
    return info["size"], int.from_bytes(hashlib.blake2b(changed, digest_size=8).digest(), "big")


class File:
    """A file that is read at any offset, from several threads. Closed with its last reference.

    Attributes:
      size: bytes when it was opened, None for remote files.
    """

    def __init__(self, path: str, table: str = "", *, whole: bool = False) -> None:
        """Open `path`; `table` and `whole` as for `remote.read`."""
        self.path, self._fd, self.size = path, None, None
        self._read_remote = functools.partial(remote.read, path, table=table, whole=whole)
        if table:
            remote.check_named(path, table)
        if not is_remote(path):
            # Opening a named pipe would wait for a writer otherwise.
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            weakref.finalize(self, os.close, self._fd)
            status = os.fstat(self._fd)
            if not stat_modes.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            self.size = status.st_size

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`, fewer at the end of the file. Transient failures are retried."""
        for wait in range(_TRIES):
            try:
                return self._read(offset, size)
            except OSError as error:
                if wait == _TRIES - 1 or isinstance(error, _PERMANENT) or error.errno in _LASTING:
                    raise
                time.sleep(0.1 * 10**wait)
        raise AssertionError

    def _read(self, offset: int, size: int) -> bytes:
        if self._fd is None:
            return self._read_remote(offset, size)
        data = os.pread(self._fd, size, offset)
        while len(data) < size and (chunk := os.pread(self._fd, size - len(data), offset + len(data))):
            data += chunk
        return data


def read(path: str, max_bytes: int, table: str = "") -> bytes:
    """Return the content of a local or remote file, in one request.

    Args:
      path: of the file.
      max_bytes: most that it may have; no more is received.
      table: address of a remote table that names the file and is not trusted; "" for none.

    Raises:
      OSError: the file does not exist, is refused, is larger than `max_bytes` (EFBIG), is not a regular file, or may
        not be named by the table (EACCES).
      UserError: no package for a URL of this sort is installed.
      ValueError: not a path.
    """
    file = File(path, table, whole=True)
    size = max_bytes + 1 if file.size is None else file.size
    data = file.read(0, size) if file.size is None or size <= max_bytes else b""
    if max(file.size or 0, len(data)) > max_bytes:
        raise OSError(errno.EFBIG, f"file is larger than {max_bytes:,} bytes", path)
    return data


def unreadable(error: Exception) -> BadSample:
    """Return an error of `read` as the bad sample of the row or pair that names the file."""
    too_large = isinstance(error, OSError) and error.errno == errno.EFBIG
    return BadSample("file too large" if too_large else "file cannot be read", str(error))


def fingerprint(paths: Iterable[str], *, whole: int = 0) -> str:
    """Return a hash of files: their names without folders, their sizes and (a part of) their content.

    A copy in another folder has the same hash. Local files are hashed by content, those above `whole` bytes by their
    first and last MiB; remote ones by the store's tag or time of the last change.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size, changed = stat(path)
        digest.update(f"{os.path.basename(public(path))}\0{size}\0".encode("utf-8", "surrogateescape"))
        if is_remote(path):
            digest.update(str(changed).encode())
            continue
        file = File(path)
        for offset in range(0, size, _EDGE) if size <= max(whole, 2 * _EDGE) else (0, size - _EDGE):
            digest.update(file.read(offset, _EDGE))
    return digest.hexdigest()


@functools.lru_cache(maxsize=_OPEN)
def open_file(path: str) -> File:
    """Open the file `path`, or return it if it is one of the last that this process used."""
    return File(path)


def writable(folder: pathlib.Path) -> bool:
    """Whether files can be written into `folder`, which is made if it does not exist."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    return False


def cache_dir() -> pathlib.Path:
    """Return the folder of downloads and prepared data: $XCLIP_CACHE, else ~/.cache/xclip_jax. It may not exist yet."""
    return pathlib.Path(os.environ.get("XCLIP_CACHE") or "~/.cache/xclip_jax").expanduser()


def third_party(name: str) -> bytes:
    """Return a file of another project that is distributed with this package; see `data/third_party/README.md`."""
    return (importlib.resources.files("xclip_jax.data") / "third_party" / name).read_bytes()
