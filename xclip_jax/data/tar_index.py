"""Where the samples of tar files lie: each tar is walked once, header by header, and the result is kept.

    python -m xclip_jax.data.tar_index PATTERN

indexes ahead of a run; a run does it by itself. A row is one sample, or one thing that is wrong with the tar, so that
nothing is lost without a trace: a row with a fault cannot be read, and whoever reads it learns the reason.
"""

import concurrent.futures
import hashlib
import io
import json
import os
import pathlib
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

import numpy as np

from xclip_jax import storage
from xclip_jax.data import assets
from xclip_jax.errors import Parser, UserError, exit_with_message

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jfif", "ppm")
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
# Bytes of a file that is read. The largest photographs are a tenth of it; a caption so long is none, and takes seconds.
MAX_BYTES = {"image": 1 << 28, "text": 1 << 20, "json": 1 << 24}

_VERSION = 1
_DIGEST = 16  # bytes
_FOLDER = ".xclip_index"
_BLOCK = 512
_CHUNK = 1 << 20
_REGULAR = b"0\0007"  # types with data of their own: "0", NUL and "7"
_PROGRESS_SECONDS = 10
_FIELDS = ("image", "image_size", "text", "text_size", "json", "json_size", "fault")


def dtype(key_size: int) -> np.dtype:
    """A row: where image, .txt and .json begin, their sizes (0 for none), the fault, the key in UTF-8."""
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


def _number(field: bytes) -> int | None:
    """A tar header's number: octal digits, or base 256 above 8 GiB; None if it is neither, or negative."""
    if field[0] & 0x80:
        return None if field[0] & 0x40 else int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.strip(b" \0")
    # int() would take signs and underscores too, and a walk by a negative size never ends.
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _header_size(block: bytes) -> int | None:
    """Bytes of data behind a header, or None if `block` is no header."""
    if len(block) < _BLOCK:
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    # The sum over 512 bytes costs as much as all the rest; the magic word and a number where one belongs say as much.
    return size if block[257:262] == b"ustar" or (any(block) and _sum_is_right(block)) else None


def _sum_is_right(block: bytes) -> bool:
    return sum(block) - sum(block[148:156]) + 8 * 32 == _number(block[148:156])


class _Reader:
    """Blocks of a file at growing offsets: single ones from a disk, large pieces from a bucket."""

    def __init__(self, path: str) -> None:
        self._file, self._remote = storage.File(path), storage.is_remote(path)
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        if not self._remote:
            return self._file.read(offset, size)
        if not self._start <= offset <= offset + size <= self._start + len(self._data):
            self._start, self._data = offset, self._file.read(offset, max(size, 8 * _CHUNK))
        return self._data[offset - self._start : offset - self._start + size]


def _next_header(reader: _Reader, offset: int, end: int) -> tuple[int, bool]:
    """Where the next header lies at or behind `offset`, or `end`; and whether anything but zeros is before it."""
    rubbish = False
    while offset < end:
        chunk = reader.read(offset, _CHUNK)
        if not chunk:
            break
        if chunk.count(0) != len(chunk):
            for i in range(0, len(chunk), _BLOCK):
                block = chunk[i : i + _BLOCK]
                if _header_size(block) is not None:
                    return offset + i, rubbish
                rubbish = rubbish or any(block)
        offset += len(chunk)
    return end, rubbish


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Records "<length> <key>=<value>\\n" of an extended header; what cannot be read is left out."""
    found, at = {}, 0
    while at < len(data):
        length, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length):
            break
        key, _, value = data[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        found[key] = value
        at += int(length)
    return found


def members(path: str, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset of the data and size of each file in the tar `path` of `size` bytes, in order.

    A stretch that is no tar yields (b"", its offset, its size), and the walk goes on behind it. Long names (GNU and
    pax), sizes above 8 GiB and tars written one behind another are understood; links and folders are passed over.
    """
    reader = _Reader(path)
    offset, name, real_size = 0, b"", None
    while offset < size:
        block = reader.read(offset, _BLOCK)
        length = _header_size(block)
        if length is None or (offset + _BLOCK + length > size and not _sum_is_right(block)):
            after, rubbish = _next_header(reader, offset + _BLOCK * (length is not None), size)
            if rubbish or length is not None:
                yield b"", offset, after - offset
            offset, name, real_size = after, b"", None
            continue
        kind, data = block[156:157], offset + _BLOCK
        if kind in (b"L", b"x", b"X", b"g", b"K"):
            content = reader.read(data, min(length, _CHUNK))
            if kind == b"L":
                name = content.rstrip(b"\0")
            elif kind in (b"x", b"X"):
                records = _pax(content)
                name = records.get(b"path", name)
                digits = records.get(b"size", b"")
                real_size = int(digits) if digits.isdigit() and len(digits) < 20 else None
        else:
            length = length if real_size is None else real_size
            if kind in b"123456":
                length = 0
            elif kind in _REGULAR:
                short = block[:100].split(b"\0", 1)[0]
                prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
                yield name or (prefix + b"/" + short if prefix else short), data, length
            name, real_size = b"", None
        offset = data + -(-length // _BLOCK) * _BLOCK


def _split_name(name: bytes) -> tuple[bytes, str]:
    """b"./a/b.c.JPG" -> (b"a/b.c", "jpg"): dots and folders belong to the key. Hidden files have no suffix."""
    while name.startswith((b"./", b"/")):
        name = name[name.index(b"/") + 1 :]
    stem, dot, suffix = name.rpartition(b".")
    base = name.rpartition(b"/")[2]
    if not dot or b"/" in suffix or base.startswith(b"."):
        return name, ""
    return stem, suffix.decode("ascii", "replace").lower()


def index(path: str) -> np.ndarray:
    """Rows (see `dtype`) of the tar at `path`, in the order in which their keys first appear.

    Files belong together by key, wherever in the tar they lie; a name that comes again begins another sample.
    """
    size, _ = storage.stat(path)
    rows: list[dict[str, Any]] = []
    latest: dict[bytes, dict[str, Any]] = {}
    for name, offset, length in members(path, size):
        if not name:
            rows.append({"fault": DAMAGED, "image": offset, "key": b"byte %d" % offset})
            continue
        key, suffix = _split_name(name)
        part = "image" if suffix in IMAGE_SUFFIXES else {"txt": "text", "json": "json"}.get(suffix)
        if part is None:
            continue
        cut_off = offset + length > size
        row: dict[str, Any] | None = latest.get(key)
        if row is None or row.get(f"{part}_suffix") == suffix:
            row = latest[key] = {"key": key, "fault": OK}
            rows.append(row)
        elif part in row:
            continue  # another picture of the same sample, as a.png beside a.jpg: the first one counts
        too_large = length > MAX_BYTES[part]
        if part == "json" and (cut_off or too_large):
            continue  # most runs have no use for it
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
    found = np.zeros(len(rows), dtype(max(len(row["key"]) for row in rows)))
    for field in _FIELDS:
        found[field] = [row.get(field, 0) for row in rows]
    found["key"] = [row["key"] for row in rows]
    return found


def cached_at(path: str) -> list[pathlib.Path]:
    """Where the index of `path` may lie, best place first; the names change with the tar's size and time."""
    size, changed = storage.stat(path)
    name = path.rpartition("/")[2] if storage.is_remote(path) else os.path.basename(path)
    file = f"{name}-{size:x}-{changed:x}-v{_VERSION}.npy"
    folder = path.rpartition("/")[0] if storage.is_remote(path) else os.path.dirname(os.path.abspath(path))
    elsewhere = assets.cache_dir() / "tar_index" / hashlib.sha256(folder.encode()).hexdigest()[:16] / file
    return [elsewhere] if storage.is_remote(path) else [pathlib.Path(folder) / _FOLDER / file, elsewhere]


def read(place: pathlib.Path) -> np.ndarray | None:
    """Return the rows of a stored index, mapped into memory; None where it does not exist or is not as it was written.

    Behind the rows is their digest: whatever cut, emptied or changed the file, the tar is then indexed again.
    """
    try:
        with place.open("rb") as file:
            left = os.fstat(file.fileno()).st_size - _DIGEST
            digest = hashlib.blake2b(digest_size=_DIGEST)
            while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
            if file.read() != digest.digest():
                return None
        rows = np.load(place, mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError):
        return None
    key = (rows.dtype.fields or {}).get("key")
    return rows if rows.ndim == 1 and len(rows) and key and rows.dtype == dtype(key[0].itemsize) else None


def _cached(path: str) -> pathlib.Path | None:
    return next((place for place in cached_at(path) if read(place) is not None), None)


def build(path: str) -> pathlib.Path:
    """Indexes the tar and stores the rows; safe in concurrent processes. Returns the place.

    Raises:
      UserError: neither the tar's folder nor the cache can be written.
    """
    rows = index(path)
    for place in cached_at(path):
        if not storage.writable(place.parent):
            continue
        temporary = place.with_name(f".{place.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            content = io.BytesIO()
            np.save(content, rows)
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.write(hashlib.blake2b(content.getbuffer(), digest_size=_DIGEST).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except OSError:  # a full or a read-only disk that did not look like one
            temporary.unlink(missing_ok=True)
            continue
        return place
    raise UserError(f"no place for the index of {path!r}: set XCLIP_CACHE to a folder that can be written.")


class _Indexer:
    """A process that indexes one tar at a time: walking headers keeps the interpreter's lock.

    Not `multiprocessing`: its processes import the main program, and with it JAX, only to count bytes.
    """

    def __init__(self) -> None:
        path = [str(pathlib.Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "xclip_jax.data.tar_index", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        )
        self._input, self._output = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)

    def __call__(self, path: str) -> None:
        self._input.write(json.dumps(path) + "\n")  # a name may hold a line break
        self._input.flush()
        answer = self._output.readline()
        if answer != "ok\n":
            raise UserError(f"{path!r} cannot be indexed ({answer.strip() or 'the indexing process died'}).")

    def close(self) -> None:
        self._input.close()
        self._process.wait()
        self._output.close()


def load(paths: Sequence[str], *, processes: int | None = None) -> list[pathlib.Path]:
    """The stored index of each tar; those that have none, or were changed, are indexed first, in parallel.

    Args:
      paths: tars.
      processes: that index at once; None for one a core. Few tars are not worth a process.

    Raises:
      UserError: a tar that cannot be read, or no place to store an index.
    """
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        places = dict(zip(paths, pool.map(_cached, paths), strict=True))
    todo = [path for path, place in places.items() if place is None]
    if todo:
        if processes is None:
            processes = min(os.cpu_count() or 1, 16, len(todo) // 4)
        _build_all(todo, processes)
    places |= {path: _cached(path) for path in todo}
    for path, place in places.items():
        if place is None:
            raise UserError(f"{path!r} changed while it was indexed; start again when it is complete.")
    return [place for path in paths if (place := places[path])]


def _build_all(todo: list[str], processes: int) -> None:
    began = said = time.monotonic()
    print(f"indexing {len(todo):,} tars, once ...", flush=True)
    # Several hosts that begin together share the work if each takes the tars in an order of its own.
    work: queue.SimpleQueue[str] = queue.SimpleQueue()
    for path in random.sample(todo, len(todo)):
        work.put(path)
    done = 0

    def go(indexer: _Indexer | None) -> None:
        nonlocal done, said
        while True:
            try:
                path = work.get_nowait()
            except queue.Empty:
                return
            if _cached(path) is None:
                try:
                    indexer(path) if indexer else build(path)
                except OSError as error:
                    raise UserError(f"{path!r} cannot be read ({error}).") from error
            done += 1
            if (now := time.monotonic()) - said > _PROGRESS_SECONDS:
                said = now
                left = (now - began) / done * (len(todo) - done)
                print(f"indexed {done:,} of {len(todo):,} tars, {left:.0f} s left", flush=True)

    if processes < 2:
        go(None)
    else:
        indexers = [_Indexer() for _ in range(processes)]
        try:
            with concurrent.futures.ThreadPoolExecutor(processes) as pool:
                list(pool.map(go, indexers))
        finally:
            for indexer in indexers:
                indexer.close()
    print(f"indexed {len(todo):,} tars in {time.monotonic() - began:.1f} s", flush=True)


def _serve() -> None:
    for line in sys.stdin:
        try:
            build(json.loads(line))
            print("ok", flush=True)
        except (OSError, UserError) as error:
            print(" ".join(str(error).split()), flush=True)


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    if list(arguments) == ["--serve"]:  # by `_Indexer`
        _serve()
        return
    parser = Parser(prog="python -m xclip_jax.data.tar_index", description="Index tars of pairs ahead of a run.")
    parser.add_argument("pattern", help="of tars: paths, ranges as {00000..01242}.tar and globs, with commas between")
    options = parser.parse_args(arguments)
    with exit_with_message():
        load(storage.expand(options.pattern))


if __name__ == "__main__":
    main(sys.argv[1:])
