"""Index of the samples in tar files: each tar is walked once, header by header, and the result is stored.

A row is one sample or one fault of the tar, so nothing is lost silently. Damaged and truncated tars are indexed, too.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import pathlib
import posixpath
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
from etils import epath

from xclip_jax.core import storage
from xclip_jax.core.errors import redact
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES, open_binary
from xclip_jax.data.records import cores, thread_pool

FAULTS = (
    "", "no caption file", "no image file", "tar cut off", "tar damaged", "tar without samples", "file too large",
)  # fmt: skip
OK, NO_TEXT, NO_IMAGE, CUT_OFF, DAMAGED, EMPTY, TOO_LARGE = range(len(FAULTS))
_VERSION = 3
_FOLDER = ".xclip_index"
_CHUNK = 1 << 20
_BUCKETS = ("gs", "gcs", "s3", "az", "abfs")  # stores that may be writable, to keep an index next to its tar
_LONGEST = 4096  # bytes of a name
_LONGEST_FILE_NAME = 120  # bytes; an index and its temporary file have longer names, of at most 255
_MOST_REFUSED = 100  # headers refused by `tarfile` before reading of a tar ends
_PROGRESS_SECONDS = 10


class _Tar(tarfile.TarFile):
    """A tar reader that continues past damaged headers; `tarfile` stops at one that follows an extended header."""

    refused = 0

    def next(self) -> tarfile.TarInfo | None:
        self.members = []  # millions of headers would take gigabytes
        while self.refused < _MOST_REFUSED:
            start = self.offset
            try:
                return super().next()
            except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError):
                self.refused += 1
                self.offset = max(self.offset, start + tarfile.BLOCKSIZE)
        return None


def members(path: str, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, data offset and size of each file in the tar `path` of `size` bytes, in order.

    A link to an earlier file of the tar is yielded as that file; other links and folders are skipped. Bytes that do not
    belong to a tar are yielded as (b"", offset, size).
    """
    spans: dict[str, tuple[int, int]] = {}
    with storage.os_errors(path), open_binary(path) as file:
        end = 0
        # Without `ignore_zeros`, the first damaged header would silently end the tar.
        with _Tar(fileobj=file, ignore_zeros=True, encoding="utf-8") as tar:  # not the locale's
            for member in iter(tar.next, None):
                if member.size < 0 or tar.offset <= end:  # an extended header that leads back, in an endless loop
                    break
                if _is_damaged(file, end, member.offset):
                    yield b"", end, member.offset - end
                span = None
                if member.isreg():
                    span = member.offset_data, member.size
                elif member.islnk():  # `tar` writes one for a further name of a file
                    span = spans.get(posixpath.normpath(member.linkname))
                elif member.issym():
                    target = posixpath.join(posixpath.dirname(member.name), member.linkname)
                    span = spans.get(posixpath.normpath(target))
                if span is not None:
                    spans[posixpath.normpath(member.name)] = span
                    yield member.name.encode("utf-8", "surrogateescape"), *span
                end = tar.offset
                if end > size:
                    return
        if _is_damaged(file, end, size):
            yield b"", end, size - end


def _is_damaged(file: IO[bytes], start: int, end: int) -> bool:
    """Whether the bytes between two members are neither zeros nor a global header."""
    file.seek(start)
    for offset in range(start, end, _CHUNK):
        chunk = file.read(min(_CHUNK, end - offset))
        if chunk.count(0) != len(chunk):
            header = (len(chunk) - len(chunk.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            return chunk[header + 156 : header + 157] != b"g"
    return False


def dtype(key_size: int) -> np.dtype:
    """Return the type of a row: offsets and sizes (0 for none) of image, .txt and .json, the fault, the UTF-8 key."""
    offsets = [(part, "<u8") for part in MAX_BYTES]
    sizes = [(f"{part}_size", "<u4") for part in MAX_BYTES]
    return np.dtype([*offsets, *sizes, ("fault", "u1"), ("key", f"S{max(key_size, 1)}")])


def split_name(name: bytes) -> tuple[bytes, str]:
    """Split b"./a/b.c.JPG" into the key b"a/b.c", with folders and dots, and ".jpg". Hidden files have no suffix."""
    while name.startswith((b"./", b"/")):
        name = name[name.index(b"/") + 1 :]
    stem, dot, suffix = name.rpartition(b".")
    base = name.rpartition(b"/")[2]
    if not dot or b"/" in suffix or base.startswith(b"."):
        return name, ""
    return stem, f".{suffix.decode('ascii', 'replace').lower()}"


def index(path: str) -> np.ndarray:
    """Return the rows (see `dtype`) of a tar, ordered by the first file of each key.

    Files with the same key form one sample, wherever they are in the tar; a repeated name begins another sample.
    """
    size, _ = storage.stat(path)
    rows: list[dict[str, Any]] = []
    latest: dict[bytes, dict[str, Any]] = {}
    for name, offset, length in members(path, size):
        if not name or len(name) > _LONGEST:  # rows are as wide as the longest key
            rows.append({"fault": DAMAGED, "image": offset, "key": b"byte %d" % offset})
            continue
        key, suffix = split_name(name)
        part = "image" if suffix in IMAGE_SUFFIXES else {".txt": "text", ".json": "json"}.get(suffix)
        if part is None:
            continue
        cut_off = offset + length > size
        row: dict[str, Any] | None = latest.get(key)
        if row is None or row.get(f"{part}_suffix") == suffix:
            row = latest[key] = {"key": key, "fault": OK}
            rows.append(row)
        elif part in row:
            continue  # the first image counts, such as a.jpg before a.png
        too_large = length > MAX_BYTES[part]
        if part == "json" and (cut_off or too_large):
            continue  # most runs do not use it
        row |= {part: offset, f"{part}_size": min(length, MAX_BYTES[part] + 1), f"{part}_suffix": suffix}
        if cut_off:
            row["fault"] = CUT_OFF
        elif too_large:
            row["fault"] = TOO_LARGE
    if not rows:
        rows.append({"fault": EMPTY, "key": b""})
    for row in rows:
        if row["fault"] == OK and "image" not in row:
            row["fault"] = NO_IMAGE
        elif row["fault"] == OK and not row.keys() & {"text", "json"}:
            row["fault"] = NO_TEXT
    table = np.zeros(len(rows), dtype(max(len(row["key"]) for row in rows)))
    for field in table.dtype.names or ():
        table[field] = [row.get(field, 0) for row in rows]
    return table


def index_files(path: str) -> list[pathlib.Path]:
    """Return possible paths of a tar's index, the preferred first; they change with its size and modification time."""
    size, changed = storage.stat(path)
    # The signature of an address does not identify the tar.
    address = redact(path) if storage.is_remote(path) else os.path.abspath(path)
    folder, _, name = address.rpartition("/")
    if len(os.fsencode(name)) > _LONGEST_FILE_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    file = f"{name}-{size:x}-{changed:x}-v{_VERSION}.npy"
    cached = storage.cache_dir() / "tar_index" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16] / file
    return [cached] if storage.is_remote(path) else [pathlib.Path(folder or "/") / _FOLDER / file, cached]


def read(index_path: pathlib.Path) -> np.ndarray | None:
    """Return the memory-mapped rows of a stored index; None if it does not exist or is damaged."""
    try:
        rows = np.load(index_path, mmap_mode="r").view(np.ndarray)
        return rows if len(rows) and rows.dtype == dtype(rows.dtype["key"].itemsize) else None
    except Exception:  # a damaged header raises errors of any class
        return None


def _unreadable(path: str) -> contextlib.AbstractContextManager[None]:
    return storage.unreadable_as(f"{path!r} cannot be indexed; check the tar, and set XCLIP_CACHE to a writable folder")


def _cached(path: str) -> pathlib.Path | None:
    """Return the path of a tar's stored index, which may be copied from the tar's bucket; None if there is none."""
    with _unreadable(path):
        index_paths = index_files(path)
    shared = _shared(path, index_paths[-1].name)
    if shared and read(index_paths[-1]) is None:
        with contextlib.suppress(OSError), storage.os_errors(shared):
            system, name = storage.file_system(shared)
            _store(index_paths[-1], system.cat_file(name))
    return next((index_path for index_path in index_paths if read(index_path) is not None), None)


def _shared(path: str, name: str) -> str:
    """Return the address of the index next to a tar in a bucket; "" for other tars."""
    return f"{redact(path).rpartition('/')[0]}/{_FOLDER}/{name}" if storage.scheme(path) in _BUCKETS else ""


def _store(index_path: pathlib.Path, content: bytes) -> None:
    index_path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_whole(epath.Path(index_path), content)


def build(path: str) -> pathlib.Path:
    """Index a tar unless another process did so; return the path of the index, also stored in a writable bucket.

    `UserError` if the tar is unreadable, or neither its folder nor the cache is writable.
    """
    with _unreadable(path):
        cached = _cached(path)
        if cached is not None:
            return cached
        index_paths = index_files(path)
        content = io.BytesIO()  # a tar that grows meanwhile has another path and is indexed again
        np.save(content, index(path))
        shared = _shared(path, index_paths[-1].name)
        with contextlib.suppress(OSError), storage.os_errors(shared):
            if shared:
                system, name = storage.file_system(shared)
                system.pipe_file(name, content.getvalue())
        for index_path in index_paths[:-1]:
            with contextlib.suppress(OSError):  # full or read-only disk
                _store(index_path, content.getvalue())
                return index_path
        _store(index_paths[-1], content.getvalue())
        return index_paths[-1]


def _build_apart(tars: Sequence[str], processes: int) -> None:
    """Index tars in processes, since walking headers holds the interpreter's lock; those that fail are left out.

    Each worker reads a tar's path from its standard input, and ends with this process. `multiprocessing` would run the
    caller's script again, and needs shared memory.
    """
    code = f"import sys; sys.path = {sys.path}; from {__name__} import _serve; _serve()"
    rest = iter(tars)
    done = []

    def work(_: int) -> None:
        pipe, command = subprocess.PIPE, [sys.executable, "-c", code]
        worker = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True, bufsize=0
        )
        with worker, worker.stdin as questions, worker.stdout as answers:  # ty: ignore[invalid-context-manager] pipes
            for path in rest:
                questions.write(json.dumps(path).encode() + b"\n")
                if not answers.readline():
                    return
                done.append(path)

    with thread_pool(processes) as threads:
        working = threads.map_async(work, range(processes), chunksize=1)
        try:
            while not working.ready():
                working.wait(_PROGRESS_SECONDS)
                if not working.ready():
                    print(f"indexed {len(done):,} of {len(tars):,} tars", flush=True)
        finally:
            list(rest)  # after Ctrl-C the workers end with their present tar


def _serve() -> None:
    for line in sys.stdin:
        with contextlib.suppress(Exception):
            build(json.loads(line))
        print(flush=True)


def load(tars: Sequence[str]) -> list[pathlib.Path]:
    """Return the path of each tar's index; new or changed tars are indexed first, in parallel.

    Errors are as for `build`.
    """
    with thread_pool(16) as threads:  # a store takes long to answer
        index_paths = dict(zip(tars, threads.map(_cached, tars), strict=True))
    todo = [path for path, index_path in index_paths.items() if index_path is None]
    if todo:
        began = time.monotonic()
        print(f"indexing {len(todo):,} tars, once ...", flush=True)
        random.shuffle(todo)  # in different orders, hosts that begin together share the work
        processes = min(cores(), 16, len(todo) // 4)
        if processes > 1:
            _build_apart(todo, processes)
        reported = time.monotonic()
        for done, tar in enumerate(todo, 1):
            index_paths[tar] = build(tar)  # at once if a worker did so; else its error is raised here
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                print(f"indexed {done:,} of {len(todo):,} tars", flush=True)
        print(f"indexed {len(todo):,} tars in {time.monotonic() - began:.1f} s", flush=True)
    return [index_path for index_path in map(index_paths.get, tars) if index_path is not None]


def find(pattern: str) -> list[str]:
    """Return the tars in a local folder with any name, or the files of a pattern, see `storage.expand`."""
    folder = os.path.expanduser(pattern)
    tars = [os.path.join(folder, name) for name in sorted(glob.glob("*.tar", root_dir=folder))]
    return tars or storage.expand(pattern)
