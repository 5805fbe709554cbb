"""Index of the samples in tar files: each tar is walked once, header by header, and the result is stored.

    xclip-jax index PATTERN

indexes ahead of a run; a run does it by itself. A row is one sample, or one fault of the tar, so that nothing is lost
silently: a row with a fault cannot be read, and names the reason.
"""

import concurrent.futures
import glob
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
from collections.abc import Sequence
from typing import IO, Any, cast

import numpy as np

from xclip_jax.core import storage
from xclip_jax.core.errors import Parser, UserError, exit_with_message, public
from xclip_jax.data import assets
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES
from xclip_jax.data.readers.tar_headers import members

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
_FIELDS = ("image", "image_size", "text", "text_size", "json", "json_size", "fault")


def dtype(key_size: int) -> np.dtype:
    """Type of a row: offsets of image, .txt and .json, their sizes (0 for none), the fault, the key in UTF-8."""
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
    """b"./a/b.c.JPG" -> (b"a/b.c", ".jpg"): dots and folders belong to the key. Hidden files have no suffix."""
    while name.startswith((b"./", b"/")):
        name = name[name.index(b"/") + 1 :]
    stem, dot, suffix = name.rpartition(b".")
    base = name.rpartition(b"/")[2]
    if not dot or b"/" in suffix or base.startswith(b"."):
        return name, ""
    return stem, f".{suffix.decode('ascii', 'replace').lower()}"


def index(path: str) -> np.ndarray:
    """Return the rows (see `dtype`) of the tar at `path`, in the order in which their keys first appear.

    Files of one key are one sample, wherever in the tar they are; a name that is repeated begins another sample.
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
            continue  # another image of the same sample, as a.png beside a.jpg: the first one counts
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
    """Paths at which the index of `path` may be stored, the preferred one first; they change with its size and time."""
    size, changed = storage.stat(path)
    shown = public(path)  # a new signature is no new tar
    name = shown.rpartition("/")[2] if storage.is_remote(path) else os.path.basename(path)
    file = f"{name}-{size:x}-{changed:x}-v{_VERSION}.npy"
    folder = shown.rpartition("/")[0] if storage.is_remote(path) else os.path.dirname(os.path.abspath(path))
    cached = assets.cache_dir() / "tar_index" / hashlib.sha256(folder.encode()).hexdigest()[:16] / file
    return [cached] if storage.is_remote(path) else [pathlib.Path(folder) / _FOLDER / file, cached]


def read(index_path: pathlib.Path) -> np.ndarray | None:
    """Return the rows of a stored index, mapped into memory; None where it does not exist or has changed.

    The rows are followed by their digest: if the file was cut, emptied or changed, the tar is indexed again. So it is
    where an index that came with its tar has values that `index` does not write.
    """
    try:
        with index_path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size - _DIGEST
            digest = hashlib.blake2b(digest_size=_DIGEST)
            while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
            if file.read() != digest.digest():
                return None
        rows = np.load(index_path, mmap_mode="r").view(np.ndarray)
        return rows if _is_sound(rows) else None
    except Exception:  # of any class, from a header that is damaged
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
    """Index the tar and store the rows; safe in concurrent processes. Returns the path of the index.

    Raises:
      UserError: neither the tar's folder nor the cache can be written.
    """
    rows = index(path)
    for index_path in index_files(path):
        if not storage.writable(index_path.parent):
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
        except OSError:  # a full or a read-only disk that did not look like one
            temporary.unlink(missing_ok=True)
            continue
        return index_path
    raise UserError(f"the index of {path!r} cannot be stored: set XCLIP_CACHE to a folder that can be written.")


class _Indexer:
    """A process that indexes one tar at a time: walking headers holds the interpreter's lock.

    Not `multiprocessing`: its processes import the main program, and with it JAX, only to count bytes.
    """

    def __init__(self) -> None:
        path = [str(pathlib.Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "xclip_jax.data.readers.tar_index", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # Ctrl-C reaches the command alone, and its end this process
        )
        self._input, self._output = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)

    def __call__(self, path: str) -> None:
        self._input.write(json.dumps(path) + "\n")  # a name may contain a line break
        self._input.flush()
        answer = self._output.readline()
        if answer != "ok\n":
            raise UserError(f"{path!r} cannot be indexed ({answer.strip() or 'the indexing process died'}).")

    def close(self) -> None:
        self._input.close()
        self._process.wait()
        self._output.close()


def load(paths: Sequence[str], *, processes: int | None = None) -> list[pathlib.Path]:
    """Return the path of each tar's stored index; tars without one, and changed ones, are indexed first, in parallel.

    Args:
      paths: tars.
      processes: number of indexing processes; None for one a core. Few tars are not worth a process.

    Raises:
      UserError: a tar that cannot be read, or an index that cannot be stored.
    """
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        index_paths = dict(zip(paths, pool.map(_cached, paths), strict=True))
    todo = [path for path, index_path in index_paths.items() if index_path is None]
    if todo:
        if processes is None:
            processes = min(os.cpu_count() or 1, 16, len(todo) // 4)
        _build_all(todo, processes)
    index_paths |= {path: _cached(path) for path in todo}
    for path, index_path in index_paths.items():
        if index_path is None:
            raise UserError(f"{path!r} changed while it was indexed; start again when it is complete.")
    return [index_path for path in paths if (index_path := index_paths[path])]


def _build_all(todo: list[str], processes: int) -> None:
    began = reported = time.monotonic()
    print(f"indexing {len(todo):,} tars, once ...", flush=True)
    # Several hosts that begin together share the work if each takes the tars in an order of its own.
    pending: queue.SimpleQueue[str] = queue.SimpleQueue()
    for path in random.sample(todo, len(todo)):
        pending.put(path)
    done = 0

    def work_off(indexer: _Indexer | None) -> None:
        nonlocal done, reported
        while True:
            try:
                path = pending.get_nowait()
            except queue.Empty:
                return
            if _cached(path) is None:
                try:
                    indexer(path) if indexer else build(path)
                except OSError as error:
                    raise UserError(f"{path!r} cannot be read ({error}).") from error
            done += 1
            if (now := time.monotonic()) - reported > _PROGRESS_SECONDS:
                reported = now
                left = (now - began) / done * (len(todo) - done)
                print(f"indexed {done:,} of {len(todo):,} tars, {left:.0f} s left", flush=True)

    if processes < 2:
        work_off(None)
    else:
        indexers = [_Indexer() for _ in range(processes)]
        try:
            with concurrent.futures.ThreadPoolExecutor(processes) as pool:
                list(pool.map(work_off, indexers))
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


def find(pattern: str) -> list[str]:
    """Return the tars of a local folder, whose name may have any letters, or the files that `storage.expand` names.

    Raises:
      UserError: as `storage.expand`; a folder without tars.
    """
    folder, tars = os.path.expanduser(pattern), []
    if not storage.is_remote(pattern) and os.path.isdir(folder):
        tars = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    return tars or storage.expand(pattern)


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    if list(arguments) == ["--serve"]:  # by `_Indexer`
        _serve()
        return
    parser = Parser(prog="xclip-jax index", description="Index tars of pairs ahead of a run.")
    parser.add_argument("pattern", help="a folder of tars; or paths, ranges as {00000..01242}.tar and globs")
    options = parser.parse_args(arguments)
    with exit_with_message():
        load(find(options.pattern.removeprefix("tar:")))


if __name__ == "__main__":
    main(sys.argv[1:])
