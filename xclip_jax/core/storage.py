"""Files on local disks and, through fsspec, in buckets and on the web: reads, whole writes, and patterns of names."""

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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from xclip_jax.core.errors import BadSample, UserError, redact

MOST_FILES = 1_000_000  # of one pattern
WEB_SECONDS = 120  # for one answer of a web server
WAITS = (0.1, 1.0)  # seconds before a failed read is tried again
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_EDGE = 1 << 20
_PACKAGES = {
    "http": "aiohttp>=3.12", "https": "aiohttp>=3.12", "gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs",
    "abfs": "adlfs", "hf": "huggingface_hub",
}  # fmt: skip
# errno for errors that carry none, by class or HTTP status.
_NUMBERS = {
    FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, ValueError: errno.EINVAL,
    401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 408: errno.EIO, 429: errno.EIO,
}  # fmt: skip


def is_remote(path: str) -> bool:
    """Whether `path` is a URL such as gs://, s3:// or https:// and not in a file system."""
    return "://" in path


def scheme(path: str) -> str:
    """Return "https" of https://..., in lower case; "" for a path."""
    return path.partition("://")[0].lower() if is_remote(path) else ""


def file_system(path: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises:
      UserError: a sort of URL that does not exist, or whose package is not installed; the message names it.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(scheme(path))
        remedy = f"pip install '{package}'" if package else "check the address, or install its file system's package"
        raise UserError(f"{path!r} cannot be opened ({error}); {remedy}.") from error


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Raise errors of a store's client, which have no common class, as the `OSError` that a disk would have raised."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
            raise
        if getattr(error.__cause__, "status", None):  # fsspec says of any answer that there is no such file
            error = error.__cause__
        status = getattr(error, "status", None) or getattr(error, "code", None)
        if not isinstance(status, int):
            status = 0
        number = getattr(error, "errno", None) or _NUMBERS.get(type(error)) or _NUMBERS.get(status)
        if not number and isinstance(error, TimeoutError) and scheme(path) in ("http", "https"):  # after WEB_SECONDS
            number = errno.ETIMEDOUT
        if not number:
            number = errno.EINVAL if 400 <= status < 500 else errno.EIO
        message = f"{type(error).__name__}{f', status {status}' if status else ''}: {error}"
        message = getattr(error, "strerror", None) or message
        # For a remote file without the first error, whose traceback may have its address with a password.
        raise OSError(number, message, path) from (None if "://" in path else error)


def _read_remote(path: str, offset: int, size: int, *, whole: bool) -> bytes:
    """Return up to `size` bytes from `offset` of the file at a URL; with `whole` the server may send the whole file."""
    system, name = file_system(path)
    options: dict[str, Any] = {}
    if scheme(path) == "hf":
        options = {"cache_type": "none"}  # else it reads megabytes ahead
    if scheme(path) in ("http", "https"):
        headers = getattr(system, "kwargs", {}).get("headers", {}) | {"Accept-Encoding": "identity"}
        options = {"timeout": WEB_SECONDS, "headers": headers}
    with os_errors(path):
        data = system.cat_file(name, start=offset, end=offset + size, **options)
    if len(data) > size and not whole:
        raise OSError(errno.EINVAL, "the server gives whole files only; download the file", path)
    return data[:size]


def check_named(path: str, table: str) -> None:
    """Check that a table which is not on this machine may name the file `path`: at its own address, or in a store.

    Raises:
      PermissionError: a path of this machine, or another sort of URL, such as file://.
    """
    known = scheme(path) in _PACKAGES and "::" not in path  # which chains file systems
    if not known and path.lower().split("/", 3)[:3] != table.lower().split("/", 3)[:3]:
        message = "it is not on the web: a table that is not on this machine may not name it; download the table"
        raise PermissionError(errno.EACCES, message, path)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def strict_json(content: Any, **options: Any) -> str:
    """Return `content` as strict JSON: floats that are not finite become null, addresses lose their secrets.

    Args:
      content: values that `json.dumps` takes.
      **options: options of `json.dumps`.
    """
    return json.dumps(_finite(redact(content)), allow_nan=False, **options)


@contextlib.contextmanager
def whole_file(path: pathlib.Path, writer: str = "") -> Iterator[pathlib.Path]:
    """Yield a path to write to, which becomes `path` once its bytes are on the disk, and is deleted after an error.

    Args:
      path: of the file.
      writer: ends the temporary name; needed if several processes may write at once.

    Raises:
      OSError: with the path, which NumPy's and pyarrow's own errors lack.
    """
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        with os_errors(str(path)):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, whole or not at all, even if the machine stops, or another process writes it too.

    Letters that UTF-8 does not have, such as of another file system's names, become "?".
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    if is_remote(str(path)):
        with os_errors(str(path)):
            path.write_bytes(data)  # an object in a bucket appears when it is complete
        return
    with whole_file(pathlib.Path(path), f".{platform.node()}.{os.getpid()}") as temporary:
        temporary.write_bytes(data)


def write_json(path: epath.Path, content: Any) -> None:
    """Write strict JSON whole or not at all: readers never see half a file."""
    write_whole(path, strict_json(content, indent=2, sort_keys=True) + "\n")


def _braces(pattern: str) -> Iterator[str]:
    """Yield all strings of a pattern with {a,b} and {000..123}, as a shell does."""
    if (match := re.search(r"\{([^{}]*)\}", pattern)) is None:
        yield pattern
        return
    choices: Iterable[str] = match[1].split(",")
    if limits := _RANGE.fullmatch(match[1]):
        first, last = map(int, limits.groups())
        step = 1 if last >= first else -1
        width = max(map(len, limits.groups())) if re.search(r"\b0\d", match[1]) else 0
        choices = (f"{number:0{width}d}" for number in range(first, last + step, step))
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _is_file(path: str) -> bool:
    return not is_remote(path) and os.path.isfile(os.path.expanduser(path))


def _glob(pattern: str) -> list[str]:
    """Return the files that match, without folders; raise `UserError` for none."""
    if is_remote(pattern):
        system, path = file_system(pattern)
        with os_errors(pattern):
            infos = system.glob(path, detail=True)
        # As on a disk a glob passes over hidden names, such as the index of a tar, unless it asks for them.
        files = [name for name, info in infos.items() if info.get("type") != "directory"]
        files = [system.unstrip_protocol(name) for name in files if "/." in path or "/." not in name]
    else:
        files = [path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)]
    if not files:
        raise UserError(f"no file matches {pattern!r}; check the path.")
    return sorted(files)


def expand(pattern: str) -> list[str]:
    """Return the files that `pattern` names: a list with commas of paths, brace ranges and globs, local or remote.

    "a/{00000..00331}.tar,b/*.tar" is 332 files and those that match. Each file is named once, globs are sorted and pass
    over folders. The path of an existing file is taken literally with its commas, brackets and braces, as the whole
    pattern or as one of its parts; in a glob "?" matches such a letter ("a?b/*.tar" for the folder "a,b").

    Raises:
      UserError: nothing matches a glob, or a file does not exist.
    """
    # Commas inside braces, which may have others inside, do not split.
    parts = [pattern] if _is_file(pattern) else re.split(r",(?![^{}]*(?:\{[^{}]*\}[^{}]*)*\})", pattern)
    names: dict[str, None] = {}
    for part in filter(None, map(str.strip, parts)):
        for name in map(os.path.expanduser, [part] if _is_file(part) else _braces(part)):
            if glob.has_magic(redact(name)) and not os.path.isfile(name):  # a query is not a glob
                names |= dict.fromkeys(_glob(name))
            else:
                names[name] = None
            if len(names) > MOST_FILES:
                raise UserError(f"{part!r} names more than {MOST_FILES:,} files; write a shorter range.")
    if not names:
        raise UserError(f"no file matches {pattern!r}; write a path, a range {{00000..00331}} or a glob.")
    if missing := next((name for name in names if not (is_remote(name) or os.path.isfile(name))), None):
        hint = f"it is a folder: write folder:{missing} or a glob" if os.path.isdir(missing) else "check the path"
        raise UserError(f"no file or folder {missing!r}; {hint}.")
    return list(names)


def stat(path: str) -> tuple[int, int]:
    """Return the size in bytes and a number that changes with the content, such as the time of the last change.

    Raises:
      OSError: the file does not exist or is refused, or a server does not report its size.
    """
    if is_remote(path):
        return _remote_stat(path)
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=1 << 18)
def _remote_stat(path: str) -> tuple[int, int]:
    """Cached: a request for each of thousands of files takes minutes."""
    system, name = file_system(path)
    with os_errors(path):
        info = system.info(name)
    if info.get("size") is None:
        raise OSError(errno.EINVAL, "the server does not report the file's size; download the file", path)
    keys = (
        "etag", "ETag", "md5Hash", "Content-MD5", "generation", "xet_hash", "blob_id", "mtime", "LastModified",
        "Last-Modified", "updated", "created",
    )  # fmt: skip
    changed = str(next((info[key] for key in keys if info.get(key)), "")).encode()
    return info["size"], int.from_bytes(hashlib.blake2b(changed, digest_size=8).digest(), "big")


class File:
    """A file that is read at any offset, from several threads. Closed with its last reference.

    Attributes:
      size: bytes when it was opened, None for remote files.
    """

    def __init__(self, path: str, *, whole: bool = False) -> None:
        """Open `path`; `whole` if no part but its beginning will be read, which any web server can send."""
        self.path, self._fd, self._whole, self.size = path, None, whole, None
        if not is_remote(path):
            # Opening a named pipe would wait for a writer otherwise.
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            weakref.finalize(self, os.close, self._fd)
            status = os.fstat(self._fd)
            if not stat_modes.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            self.size = status.st_size

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`, fewer at the end. Transient failures are retried, slow answers are not."""
        for wait in WAITS:
            try:
                return self._read(offset, size)
            except OSError as error:
                if error.errno == errno.ESTALE:  # a network file system knows the path, and no more the open file
                    again = File(self.path)
                    if self._fd is None or again._fd is None or again.size != self.size:
                        raise
                    os.dup2(again._fd, self._fd, inheritable=False)  # other threads may be reading
                    continue
                if error.errno != errno.EIO:
                    raise
                time.sleep(wait)
        return self._read(offset, size)

    def _read(self, offset: int, size: int) -> bytes:
        if self._fd is None:
            return _read_remote(self.path, offset, size, whole=self._whole)
        data = os.pread(self._fd, size, offset)
        while len(data) < size and (chunk := os.pread(self._fd, size - len(data), offset + len(data))):
            data += chunk
        return data


def read(path: str, max_bytes: int, table: str = "") -> bytes:
    """Return the content of a local or remote file of at most `max_bytes`, in one request.

    `table` is the address of a remote table that names the file and is not trusted, see `check_named`.

    Raises:
      OSError: the file does not exist, is refused, is larger (EFBIG), is not a regular file, or may not be named by the
        table (EACCES).
      UserError: no package for a URL of this sort is installed.
      ValueError: not a path.
    """
    if table:
        check_named(path, table)
    file = File(path, whole=True)
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
        digest.update(f"{os.path.basename(redact(path))}\0{size}\0".encode("utf-8", "surrogateescape"))
        if is_remote(path):
            digest.update(str(changed).encode())
            continue
        file = File(path)
        for offset in range(0, size, _EDGE) if size <= max(whole, 2 * _EDGE) else (0, size - _EDGE):
            digest.update(file.read(offset, _EDGE))
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)  # the soft limit of open files is often 1024
def open_file(path: str, version: object = None) -> File:
    """Open the file `path`, or return it if it is one of the last that this process used, by the same `version`.

    A caller who knows offsets in a file names its version, since another file may take the place of an open one.
    """
    return File(path)


def cache_dir() -> pathlib.Path:
    """Return the folder of downloads and prepared data: $XCLIP_CACHE, else ~/.cache/xclip_jax. It may not exist yet."""
    return pathlib.Path(os.environ.get("XCLIP_CACHE") or "~/.cache/xclip_jax").expanduser()


def third_party(name: str) -> bytes:
    """Return a file of another project that is distributed with this package; see `data/third_party/README.md`."""
    return (importlib.resources.files("xclip_jax.data") / "third_party" / name).read_bytes()
