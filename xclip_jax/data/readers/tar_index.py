"""Index of the samples in tar files: each tar is walked once, header by header, and the result is stored.

    xclip-jax index PATTERN

indexes ahead of a run; otherwise a run does it. A row is one sample or one fault of the tar, so that nothing is lost
silently: a row with a fault cannot be read, and names the reason. Damaged tars and tars that are cut off are indexed,
too.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import glob
import hashlib
import io
import multiprocessing
import os
import pathlib
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xclip_jax.core import storage
from xclip_jax.core.errors import Parser, UserError, exit_with_message, public
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES
from xclip_jax.data.records import init_worker

# Faults of a row, by number.
FAULTS = (
    "",
    "no caption file",
    "no image file",
    "tar cut off",
    "tar damaged",
    "tar without samples",
    "file too large",
)
OK, NO_TEXT, NO_IMAGE, CUT_OFF, DAMAGED, EMPTY, TOO_LARGE = range(len(FAULTS))
_VERSION = 1
_DIGEST = 16  # bytes
_FOLDER = ".xclip_index"
_CHUNK = 1 << 20
_PROGRESS_SECONDS = 10
_BLOCK = 512
_REGULAR = b"0\0007"  # types with data of their own: "0", NUL and "7"
_FIELDS = ("image", "image_size", "text", "text_size", "json", "json_size", "fault")


def _number(field: bytes) -> int | None:
    """Return a number in a tar header: octal digits, or base 256 above 8 GiB; None for others and negative ones."""
    if field[0] & 0x80:
        return None if field[0] & 0x40 else int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.strip(b" \0")
    # int() would accept signs and underscores too, and a walk by a negative size never ends.
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _header_size(block: bytes) -> int | None:
    """Return the number of bytes of data after a header, or None if `block` is not a header."""
    if len(block) < _BLOCK:
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    # The sum over 512 bytes would take half of the time; the magic word and a valid number are as good.
    return size if block[257:262] == b"ustar" or (any(block) and _sum_is_right(block)) else None


def _sum_is_right(block: bytes) -> bool:
    return sum(block) - sum(block[148:156]) + 8 * 32 == _number(block[148:156])


class _Blocks:
    """Reads a file at growing offsets: single blocks from a disk, large pieces from a bucket."""

    def __init__(self, path: str) -> None:
        self._file, self._remote = storage.File(path), storage.is_remote(path)
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        if not self._remote:
            return self._file.read(offset, size)
        if not self._start <= offset <= offset + size <= self._start + len(self._data):
            self._start, self._data = offset, self._file.read(offset, max(size, 8 * _CHUNK))
        return self._data[offset - self._start : offset - self._start + size]


def _next_header(reader: _Blocks, offset: int, end: int) -> tuple[int, bool]:
    """Return the offset of the next header from `offset` on, or `end`, and whether bytes before it are not zero."""
    damaged = False
    while offset < end:
        chunk = reader.read(offset, _CHUNK)
        if not chunk:
            break
        if chunk.count(0) != len(chunk):
            for i in range(0, len(chunk), _BLOCK):
                block = chunk[i : i + _BLOCK]
                if _header_size(block) is not None:
                    return offset + i, damaged
                damaged = damaged or any(block)
        offset += len(chunk)
    return end, damaged


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Return the records "<length> <key>=<value>\\n" of an extended header, up to a malformed one."""
    records, offset = {}, 0
    while offset < len(data):
        length, space, _ = data[offset : offset + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length):
            break
        key, _, value = data[offset + len(length) + 1 : offset + int(length) - 1].partition(b"=")
        records[key] = value
        offset += int(length)
    return records


def members(path: str, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, offset of the data and size of each file in the tar `path` of `size` bytes, in order.

    Bytes that are no part of a tar are yielded as (b"", their offset, their number). Long names (GNU and pax), sizes
    above 8 GiB and concatenated tars are understood; links and folders are skipped.
    """
    reader = _Blocks(path)
    offset, name, real_size = 0, b"", None
    while offset < size:
        block = reader.read(offset, _BLOCK)
        length = _header_size(block)
        if length is None or (offset + _BLOCK + length > size and not _sum_is_right(block)):
            after, damaged = _next_header(reader, offset + _BLOCK * (length is not None), size)
            if damaged or length is not None:
                yield b"", offset, after - offset
            offset, name, real_size = after, b"", None
            continue
        member_type, data = block[156:157], offset + _BLOCK
        if member_type in (b"L", b"x", b"X", b"g", b"K"):
            content = reader.read(data, min(length, _CHUNK))
            if member_type == b"L":
                name = content.rstrip(b"\0")
            elif member_type in (b"x", b"X"):
                records = _pax(content)
                name = records.get(b"path", name)
                digits = records.get(b"size", b"")
                real_size = int(digits) if digits.isdigit() and len(digits) < 20 else None
        else:
            length = length if real_size is None else real_size
            if member_type in b"123456":
                length = 0
            elif member_type in _REGULAR:
                short = block[:100].split(b"\0", 1)[0]
                prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
                yield name or (prefix + b"/" + short if prefix else short), data, length
            name, real_size = b"", None
        offset = data + -(-length // _BLOCK) * _BLOCK


def dtype(key_size: int) -> np.dtype:
    """Return the type of a row: offsets and sizes (0 for none) of image, .txt and .json, the fault, the UTF-8 key."""
    return np.dtype(
        [
            ("image", "<u8"),
            ("text", "<u8"),
            ("json", "<u8"),
            ("image_size", "<u4"),
            ("text_size", "<u4"),
            ("json_size", "<u4"),
            ("fault", "u1"),
            ("key", f"S{max(key_size, 1)}"),
        ]
    )


def split_name(name: bytes) -> tuple[bytes, str]:
    """Split b"./a/b.c.JPG" into b"a/b.c" and ".jpg": the key has dots and folders. Hidden files have no suffix."""
    while name.startswith((b"./", b"/")):
        name = name[name.index(b"/") + 1 :]
    stem, dot, suffix = name.rpartition(b".")
    base = name.rpartition(b"/")[2]
    if not dot or b"/" in suffix or base.startswith(b"."):
        return name, ""
    return stem, f".{suffix.decode('ascii', 'replace').lower()}"


def index(path: str) -> np.ndarray:
    """Return the rows (see `dtype`) of the tar at `path`, in the order of the first files of their keys.

    Files of one key are one sample, wherever they are in the tar; a repeated name begins another sample.
    """
    size, _ = storage.stat(path)
    rows: list[dict[str, Any]] = []
    latest: dict[bytes, dict[str, Any]] = {}
    for name, offset, length in members(path, size):
        if not name:
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
            continue  # another image of the same sample, as a.png after a.jpg: the first one counts
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
        if row["fault"] == OK:
            row["fault"] = NO_IMAGE if "image" not in row else OK if row.keys() & {"text", "json"} else NO_TEXT
    table = np.zeros(len(rows), dtype(max(len(row["key"]) for row in rows)))
    for field in _FIELDS:
        table[field] = [row.get(field, 0) for row in rows]
    table["key"] = [row["key"] for row in rows]
    return table


def index_files(path: str) -> list[pathlib.Path]:
    """Return the paths where the index of `path` may be stored, the preferred one first.

    They change with the tar's size and time of modification.
    """
    size, changed = storage.stat(path)
    address = public(path)  # a new signature is no new tar
    name = address.rpartition("/")[2] if storage.is_remote(path) else os.path.basename(path)
    file = f"{name}-{size:x}-{changed:x}-v{_VERSION}.npy"
    folder = address.rpartition("/")[0] if storage.is_remote(path) else os.path.dirname(os.path.abspath(path))
    cached = storage.cache_dir() / "tar_index" / hashlib.sha256(folder.encode()).hexdigest()[:16] / file
    return [cached] if storage.is_remote(path) else [pathlib.Path(folder) / _FOLDER / file, cached]


def read(index_path: pathlib.Path) -> np.ndarray | None:
    """Return the rows of a stored index, mapped into memory; None if it does not exist or has changed.

    A digest follows the rows: if the file was cut, emptied or changed, or has values that `index` does not write, the
    tar is indexed again.
    """
    try:
        with index_path.open("rb") as file:
            remaining = os.fstat(file.fileno()).st_size - _DIGEST
            digest = hashlib.blake2b(digest_size=_DIGEST)
            while remaining > 0 and (chunk := file.read(min(remaining, _CHUNK))):
                digest.update(chunk)
                remaining -= len(chunk)
            if file.read() != digest.digest():
                return None
        rows = np.load(index_path, mmap_mode="r").view(np.ndarray)
        return rows if _is_sound(rows) else None
    except Exception:  # a damaged header raises errors of any class
        return None


def _is_sound(rows: np.ndarray) -> bool:
    key = (rows.dtype.fields or {}).get("key")
    if rows.ndim != 1 or not len(rows) or not key or rows.dtype != dtype(key[0].itemsize):
        return False
    sizes = all(rows[f"{part}_size"].max() <= limit + 1 for part, limit in MAX_BYTES.items())
    return sizes and rows["fault"].max() < len(FAULTS) and all(rows[part].max() < 1 << 62 for part in MAX_BYTES)


def _cached(path: str) -> pathlib.Path | None:
    return next((index_path for index_path in index_files(path) if read(index_path) is not None), None)


def build(path: str) -> pathlib.Path:
    """Index the tar, store the rows, and return the path of the index; safe in concurrent processes.

    Raises:
      UserError: neither the tar's folder nor the cache can be written.
    """
    rows = index(path)
    for index_path in index_files(path):
        with contextlib.suppress(OSError):
            index_path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(index_path.parent, os.W_OK):
            continue
        temporary = index_path.with_name(f".{index_path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            content = io.BytesIO()
            np.save(content, rows)
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.write(hashlib.blake2b(content.getbuffer(), digest_size=_DIGEST).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, index_path)
        except OSError:  # a disk that is full, or read-only after all
            temporary.unlink(missing_ok=True)
            continue
        return index_path
    raise UserError(f"the index of {path!r} cannot be stored: set XCLIP_CACHE to a folder that can be written.")


def _build_missing(path: str) -> None:
    """Index a tar unless another process has indexed it meanwhile.

    Raises:
      UserError: it cannot be read, or its index cannot be stored.
    """
    try:
        if _cached(path) is None:
            build(path)
    except OSError as error:
        raise UserError(f"{path!r} cannot be read ({error}).") from error


def load(tars: Sequence[str], *, processes: int | None = None) -> list[pathlib.Path]:
    """Return the path of each tar's stored index; tars that are new or have changed are indexed first, in parallel.

    Args:
      tars: paths of tars.
      processes: number of indexing processes; None for one a core, or none for a few tars.

    Raises:
      UserError: a tar that cannot be read, or an index that cannot be stored.
    """
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        index_paths = dict(zip(tars, pool.map(_cached, tars), strict=True))
    todo = [path for path, index_path in index_paths.items() if index_path is None]
    if todo:
        if processes is None:
            processes = min(os.cpu_count() or 1, 16, len(todo) // 4)
        _build_all(todo, processes)
    index_paths |= {path: _cached(path) for path in todo}
    for path, index_path in index_paths.items():
        if index_path is None:
            raise UserError(f"{path!r} changed while it was indexed; start again when it is complete.")
    return [index_path for path in tars if (index_path := index_paths[path])]


def _build_all(todo: list[str], processes: int) -> None:
    began = reported = time.monotonic()
    print(f"indexing {len(todo):,} tars, once ...", flush=True)
    todo = random.sample(todo, len(todo))  # hosts that begin together share the work if their orders differ
    for done, _ in enumerate(_indexed(todo, processes), 1):
        if (now := time.monotonic()) - reported > _PROGRESS_SECONDS:
            reported = now
            seconds = (now - began) / done * (len(todo) - done)
            print(f"indexed {done:,} of {len(todo):,} tars, {seconds:.0f} s left", flush=True)
    print(f"indexed {len(todo):,} tars in {time.monotonic() - began:.1f} s", flush=True)


def _indexed(todo: Sequence[str], processes: int) -> Iterator[None]:
    """Index tars, in processes since walking headers holds the interpreter's lock, and yield after each."""
    if processes < 2:
        yield from map(_build_missing, todo)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=init_worker
    )
    try:
        yield from pool.map(_build_missing, todo)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a process that indexes tars has ended; index them ahead, with xclip-jax index PATTERN, or start a "
            'script\'s work under `if __name__ == "__main__":`.'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def find(pattern: str) -> list[str]:
    """Return the tars of a local folder, whose name may have any letters, or the files from `storage.expand`.

    Raises:
      UserError: as for `storage.expand`; a folder without tars.
    """
    folder, tars = os.path.expanduser(pattern), []
    if not storage.is_remote(pattern) and os.path.isdir(folder):
        tars = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    return tars or storage.expand(pattern)


def main(arguments: Sequence[str]) -> None:
    """Run the command; see the module's docstring."""
    parser = Parser(prog="xclip-jax index", description="Index tars of pairs ahead of a run.")
    parser.add_argument("pattern", help="a folder of tars; or paths, ranges as {00000..01242}.tar and globs")
    options = parser.parse_args(arguments)
    with exit_with_message():
        load(find(options.pattern.removeprefix("tar:")))


if __name__ == "__main__":
    main(sys.argv[1:])
