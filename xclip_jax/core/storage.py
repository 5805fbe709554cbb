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
import socket
import stat as stat_modes
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from xclip_jax.core.errors import BadSample, UserError, first_line, redact

MOST_FILES = 1_000_000  # of one pattern
WEB_SECONDS = 120  # for one answer of a web server
WAITS = (0.1, 1.0)  # seconds before a failed read is tried again
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
    """Whether `path` is a URL such as gs://, s3:// or https://."""
    return "://" in path


def scheme(path: str) -> str:
    """Return the scheme of a URL in lower case, such as "https"; "" for a path."""
    name, found, _ = path.partition("://")
    return name.lower() if found else ""


def file_system(path: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it; `UserError` for an unknown or uninstalled system."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(scheme(path) + path[len(scheme(path)) :])  # fsspec knows http and not HTTP
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(scheme(path))
        remedy = f"pip install '{package}'" if package else "check the address, or install its file system's package"
        raise UserError(f"{path!r} cannot be opened ({error}); {remedy}.") from error


def as_path(path: str | os.PathLike) -> epath.Path:
    """Return a path on a disk, ~ expanded, or in a bucket; `UserError` for other and uninstalled file systems."""
    address = os.fspath(path)
    if scheme(address):
        if not address.startswith(("gs://", "s3://", "az://")):
            raise UserError(f"{address!r} is neither local nor in a bucket at gs://, s3:// or az://; name a copy.")
        file_system(address)
    return epath.Path(path).expanduser()


def read_bytes(path: epath.Path) -> bytes | None:
    """Return the content of a file on a disk or in a bucket, None for a missing one; every `OSError` has the path."""
    with os_errors(str(path)):
        return path.read_bytes() if path.exists() else None


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Convert errors of storage clients, which share no class, to the `OSError` that a disk would have raised."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
            raise
        of_web = scheme(path) in ("http", "https")
        cause = error.__cause__  # fsspec reports any answer, and a lack of one, as a missing file
        if getattr(cause, "status", None) or (of_web and isinstance(error, FileNotFoundError) and cause):
            error = cause
        status = getattr(error, "status", None) or getattr(error, "code", None)
        status = status if isinstance(status, int) else 0
        number = getattr(error, "errno", None) or _NUMBERS.get(type(error)) or _NUMBERS.get(status)
        if not number and isinstance(error, TimeoutError) and of_web:  # after WEB_SECONDS
            number = errno.ETIMEDOUT
        number = number or (errno.EINVAL if 400 <= status < 500 else errno.EIO)
        message = f"{type(error).__name__}{f', status {status}' if status else ''}: {error}"
        message = getattr(error, "strerror", None) or message
        # The traceback of a client's error may contain the address with its password.
        raise OSError(number, message, path) from (None if is_remote(path) else error)


@contextlib.contextmanager
def unreadable_as(message: str) -> Iterator[None]:
    """Convert a library's error, of any class, to a `UserError`: "MESSAGE (reason)."."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{message} ({first_line(error)}).") from error


def check_named(path: str, table: str) -> None:
    """Raise `PermissionError` unless `path` is on the server of the remote table that names it, or in a store."""
    known = scheme(path) in _PACKAGES and "::" not in path  # "::" chains file systems
    if not known and path.lower().split("/", 3)[:3] != table.lower().split("/", 3)[:3]:
        message = "it is not on the web, so a remote table may not name it; download the table"
        raise PermissionError(errno.EACCES, message, path)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def strict_json(content: Any, **options: Any) -> str:
    """Serialize to strict JSON with `json.dumps`: infinities and NaN become null, URLs lose their secrets."""
    return json.dumps(_finite(redact(content)), allow_nan=False, **options)


@contextlib.contextmanager
def whole_file(path: pathlib.Path, writer: str = "") -> Iterator[pathlib.Path]:
    """Yield a temporary path, renamed to `path` once its bytes are on the disk, and deleted after an error.

    `writer` makes the temporary name unique if several processes may write. Every `OSError` contains the path.
    """
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        with os_errors(str(path)):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Write a file atomically, even if the machine stops or another process writes it too.

    Text is encoded in UTF-8; surrogates, such as in undecodable file names, become "?".
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    if is_remote(str(path)):
        with os_errors(str(path)):
            path.write_bytes(data)  # an object in a bucket appears when it is complete
        return
    with whole_file(pathlib.Path(path), f".{platform.node()}.{os.getpid()}") as temporary:
        temporary.write_bytes(data)


def write_json(path: epath.Path, content: Any) -> None:
    """Write strict JSON atomically, see `strict_json` and `write_whole`."""
    write_whole(path, strict_json(content, indent=2, sort_keys=True) + "\n")


def _retried(read: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a read, to try it again after transient failures, but not after slow answers."""

    @functools.wraps(read)
    def tries(*arguments: Any) -> Any:
        for wait in WAITS:
            try:
                return read(*arguments)
            except OSError as error:
                if error.errno not in (errno.EIO, socket.EAI_AGAIN) and not isinstance(error, ConnectionError):
                    raise
                time.sleep(wait)
        return read(*arguments)

    return tries


def _braces(pattern: str) -> Iterator[str]:
    """Expand {a,b} and {000..123} like a shell."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    choices: Iterable[str] = match[1].split(",")
    limits = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if limits:
        first, last = map(int, limits.groups())
        width = max(map(len, limits.groups())) if re.search(r"\b0\d", match[1]) else 0
        step = 1 if first <= last else -1
        choices = (f"{number:0{width}d}" for number in range(first, last + step, step))
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


@_retried
def _glob(pattern: str) -> list[str]:
    """Return the matching files, sorted, without folders."""
    if not is_remote(pattern):
        return sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    system, path = file_system(pattern)
    with os_errors(pattern):
        infos = system.glob(path, detail=True)
    # Like a local glob, skip hidden names, such as a tar's index, unless the pattern asks for them.
    files = [name for name, info in infos.items() if info.get("type") != "directory"]
    return sorted(system.unstrip_protocol(name) for name in files if "/." in path or "/." not in name)


def expand(pattern: str) -> list[str]:
    """List the files of a comma-separated pattern of paths, brace ranges and globs, local or remote.

    "a/{00000..00331}.tar,b/*.tar" is 332 files and all matches of the glob. Each file is listed once, globs are sorted
    and skip folders. The path of an existing file is taken literally, and so are commas and braces in a glob that then
    matches local files ("a,b/*.tar" for the folder "a,b"); "?" matches a bracket.
    In the query of a web address a comma splits only before another address, SCHEME://, and before /, ~ and "."
    `UserError` if nothing matches a glob, or a file does not exist.
    """
    whole = os.path.expanduser(pattern)
    if os.path.isfile(whole):
        return [whole]
    if re.search("[,{]", whole) and not is_remote(whole) and (files := _glob(whole)):
        return files
    names: dict[str, None] = {}
    parts = [""]
    # Commas inside braces, even nested ones, do not split.
    for part in re.split(r",(?![^{}]*(?:\{[^{}]*\}[^{}]*)*\})", pattern):
        in_query = re.match(r"\s*https?://[^?]*\?", parts[-1], re.I) and not re.match(r"\s*([/~.]|[\w+.-]+://)", part)
        parts[-1:] = [f"{parts[-1]},{part}"] if in_query else [parts[-1], part]
    for part in filter(None, map(str.strip, parts)):
        for name in map(os.path.expanduser, _braces(part)):
            matches = _glob(name) if glob.has_magic(redact(name)) else [name]  # a query is not a glob
            names |= dict.fromkeys(matches)
            if not matches:
                raise UserError(f"no file matches {name!r}; check the path.")
            if len(names) > MOST_FILES:
                raise UserError(f"{part!r} names more than {MOST_FILES:,} files; write a shorter range.")
    missing = [name for name in names or [pattern] if not (is_remote(name) or os.path.isfile(name))]
    if missing:
        if os.path.isdir(missing[0]):
            raise UserError(f"{missing[0]!r} is a folder; write folder:{missing[0]}, or a glob of its files.")
        raise UserError(f"no file or folder {missing[0]!r}; check the path.")
    return list(names)


def stat(path: str) -> tuple[int, int]:
    """Return the size in bytes, and a number that changes with the content, such as the modification time."""
    if is_remote(path):
        return _remote_stat(path)
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@_retried
def remote_info(path: str) -> dict[str, Any]:
    """Return fsspec's facts about a remote file; `OSError` if the server does not report its "size"."""
    system, name = file_system(path)
    with os_errors(path):
        info = system.info(name)
    if info.get("size") is None:
        raise OSError(errno.EINVAL, "the server does not report the file's size; download the file", path)
    return info


@functools.lru_cache(maxsize=1 << 18)
def _remote_stat(path: str) -> tuple[int, int]:
    """Return `stat` of a URL; cached, since requests for thousands of files take minutes."""
    info = remote_info(path)
    keys = (
        "etag", "ETag", "md5Hash", "Content-MD5", "generation", "xet_hash", "blob_id", "mtime", "LastModified",
        "Last-Modified", "updated", "created",
    )  # fmt: skip
    changed = str(next((info[key] for key in keys if info.get(key)), "")).encode()
    return info["size"], int.from_bytes(hashlib.blake2b(changed, digest_size=8).digest(), "big")


class File:
    """A file with random access from several threads, closed with its last reference; `size` is None if remote."""

    def __init__(self, path: str, *, whole: bool = False) -> None:
        """Open `path`; with `whole` only its beginning will be read, which any web server can send."""
        self.path, self._fd, self._whole, self.size = path, None, whole, None
        if not is_remote(path):
            # Without O_NONBLOCK, opening a named pipe would wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            weakref.finalize(self, os.close, self._fd)
            status = os.fstat(self._fd)
            if not stat_modes.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            self.size = status.st_size

    @_retried
    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`, fewer at the end."""
        try:
            return self._read(offset, size)
        except OSError as error:
            if error.errno != errno.ESTALE or not self._reopen():
                raise
        return self._read(offset, size)

    def _reopen(self) -> bool:
        """Open the path again after a network file system forgot the open file; false if its size has changed."""
        again = File(self.path)
        if self._fd is None or again._fd is None or again.size != self.size:
            return False
        os.dup2(again._fd, self._fd, inheritable=False)  # other threads may be reading
        return True

    def _read(self, offset: int, size: int) -> bytes:
        if self._fd is None:
            return self._read_remote(offset, size)
        data = os.pread(self._fd, size, offset)
        while len(data) < size and (chunk := os.pread(self._fd, size - len(data), offset + len(data))):
            data += chunk
        return data

    def _read_remote(self, offset: int, size: int) -> bytes:
        system, name = file_system(self.path)
        options: dict[str, Any] = {}
        if scheme(self.path) == "hf":
            options = {"cache_type": "none"}  # else it reads megabytes ahead
        if scheme(self.path) in ("http", "https"):
            headers = getattr(system, "kwargs", {}).get("headers", {}) | {"Accept-Encoding": "identity"}
            options = {"timeout": WEB_SECONDS, "headers": headers}
        with os_errors(self.path):
            data = system.cat_file(name, start=offset, end=offset + size, **options)
        if len(data) > size and not self._whole:
            raise OSError(errno.EINVAL, "the server gives whole files only; download the file", self.path)
        return data[:size]


def read(path: str, max_bytes: int, table: str = "") -> bytes:
    """Return the content of a local or remote file of at most `max_bytes`, in one request.

    `table` is the address of an untrusted remote table that names the file, see `check_named`.
    Besides a disk's errors it raises EFBIG for a larger file, EACCES if the table may not name it, EINVAL for pipes and
    the like, and `ValueError` for an invalid path or URL.
    """
    if table:
        check_named(path, table)
    file = File(path, whole=True)
    size = max_bytes + 1 if file.size is None else file.size
    data = file.read(0, size) if file.size is None or size <= max_bytes else b""
    if max(file.size or 0, len(data)) > max_bytes:
        raise OSError(errno.EFBIG, f"file is larger than {max_bytes:,} bytes", path)
    return data


def unreadable(error: Exception, missing: str = "file cannot be read") -> BadSample:
    """Convert an error of `read` to a `BadSample`, with reason `missing` for a missing file."""
    reasons = {errno.EFBIG: "file too large", errno.ENOENT: missing}
    return BadSample(reasons.get(getattr(error, "errno", None), "file cannot be read"), str(error))


def fingerprint(paths: Iterable[str], *, whole: int = 0) -> str:
    """Return a hash of the names (without folders), sizes and contents of files.

    A copy in another folder has the same hash. Of local files larger than `whole` bytes only the first and last MiB
    are hashed; remote files are identified by the store's tag or modification time.
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
    """Open a file, or return it if this process used it recently with the same `version`.

    Callers that stored offsets pass the version to which these belong, since an open file may be replaced.
    """
    return File(path)


def cache_dir() -> pathlib.Path:
    """Return the folder of downloads and prepared data, which may not exist yet: $XCLIP_CACHE or ~/.cache/xclip_jax."""
    return pathlib.Path(os.environ.get("XCLIP_CACHE") or "~/.cache/xclip_jax").expanduser()


def third_party(name: str) -> bytes:
    """Return a bundled file of another project; see `data/third_party/README.md`."""
    return (importlib.resources.files("xclip_jax.data") / "third_party" / name).read_bytes()
