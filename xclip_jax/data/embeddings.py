"""Files of embeddings: small parts that are written completely or not at all, and one file of all of them.

Columns are "kind", "id", "text" (strings) and "embedding" (fp32, e numbers each), with a dict of metadata. Joining
takes no more memory than a part does.

In .npz "id" and "text" are each two arrays, since NumPy's own strings are all as wide as the longest: "text_utf8", the
bytes of all strings without gaps, and "text_offsets", int64 (n + 1,), where each begins and the last one ends:

    arrays = np.load("captions.npz")
    utf8, ends = arrays["text_utf8"].tobytes(), arrays["text_offsets"]
    texts = [utf8[start:end].decode() for start, end in zip(ends, ends[1:])]

`read` gives the same.
"""

import contextlib
import itertools
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from xclip_jax.core.errors import UserError, check_choice, first_line

COLUMNS = ("kind", "id", "text", "embedding")
_STRINGS = ("id", "text")  # of any length
_KIND = "<U5"  # "image" or "text"
_ABOUT = "xclip_jax"

Columns = Mapping[str, Any]


class Format(Protocol):
    """A file format: how parts are written, joined and read."""

    def write(self, path: pathlib.Path, columns: Columns) -> None:
        """Write a part: lists of strings, and an array (n, e)."""

    def join(self, parts: Sequence[pathlib.Path], path: pathlib.Path, about: Mapping[str, Any]) -> None:
        """Write one file of all parts, in their order, with metadata."""

    def about(self, path: pathlib.Path) -> dict[str, Any]:
        """Return the metadata that `join` wrote; {} for a file of another program."""

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        """Return the columns of a part or of a joined file: lists of strings, and an array (n, e)."""


class Npz:
    """NumPy's .npz, not compressed; the dict is JSON in an array "xclip_jax"."""

    def write(self, path: pathlib.Path, columns: Columns) -> None:
        arrays: dict[str, Any] = {
            "kind": np.asarray(columns["kind"], _KIND),
            "embedding": np.asarray(columns["embedding"]),
        }
        for column in _STRINGS:
            arrays |= dict(zip(_names(column), _pack(columns[column]), strict=True))
        with path.open("wb") as file:
            np.savez(file, **arrays)

    def join(self, parts: Sequence[pathlib.Path], path: pathlib.Path, about: Mapping[str, Any]) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            _append(archive, "kind", lambda: _each(parts, lambda arrays: arrays["kind"].astype(_KIND)))
            for column in _STRINGS:
                utf8, offsets = _names(column)
                _append(archive, utf8, lambda utf8=utf8: _each(parts, lambda arrays: arrays[utf8]))
                _append(archive, offsets, lambda offsets=offsets: _offsets(parts, offsets))
            _append(archive, "embedding", lambda: _each(parts, lambda arrays: arrays["embedding"]))
            with archive.open(f"{_ABOUT}.npy", "w") as file:
                np.lib.format.write_array(file, np.array(json.dumps(about)))

    def about(self, path: pathlib.Path) -> dict[str, Any]:
        with np.load(path) as arrays:
            return json.loads(str(arrays[_ABOUT])) if _ABOUT in arrays.files else {}

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        with np.load(path) as arrays:
            columns = {"kind": arrays["kind"].tolist(), "embedding": arrays["embedding"]}
            for column in _STRINGS:
                utf8, offsets = (arrays[name] for name in _names(column))
                data = utf8.tobytes()
                columns[column] = [data[start:end].decode() for start, end in itertools.pairwise(offsets.tolist())]
            return {column: columns[column] for column in COLUMNS}


def _names(column: str) -> tuple[str, str]:
    return f"{column}_utf8", f"{column}_offsets"


def _pack(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 of all strings, uint8 (bytes,), and where each begins and the last one ends, int64 (n + 1,)."""
    encoded = [string.encode() for string in strings]
    return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)], dtype=np.int64)


def _each(parts: Sequence[pathlib.Path], select: Callable[[Any], np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        with np.load(part) as arrays:
            yield select(arrays)


def _offsets(parts: Sequence[pathlib.Path], name: str) -> Iterator[np.ndarray]:
    yield np.zeros(1, np.int64)
    start = 0
    for offsets in _each(parts, lambda arrays: arrays[name]):
        yield start + offsets[1:]
        start += int(offsets[-1])


def _append(archive: zipfile.ZipFile, name: str, blocks: Callable[[], Iterator[np.ndarray]]) -> None:
    """Write the blocks as one array. They are iterated twice, since an array's length comes before its content."""
    rows, block = 0, np.empty(0)
    for block in blocks():
        rows += len(block)
    descr = np.lib.format.dtype_to_descr(block.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (rows, *block.shape[1:])}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for block in blocks():
            file.write(block.tobytes())


class Parquet:
    """Parquet, a row group a part, embeddings as lists of fixed size; the dict is in the schema's metadata."""

    def __init__(self) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError("parquet files need pyarrow: pip install 'xclip_jax[parquet]'; or write .npz.") from error
        self._pa = pyarrow

    def write(self, path: pathlib.Path, columns: Columns) -> None:
        rows = np.asarray(columns["embedding"], np.float32)
        vectors = self._pa.FixedSizeListArray.from_arrays(self._pa.array(rows.reshape(-1)), rows.shape[1])
        strings = [self._pa.array(columns[key], self._pa.string()) for key in COLUMNS[:-1]]
        table = self._pa.table([*strings, vectors], names=list(COLUMNS))
        self._pa.parquet.write_table(table, path, use_dictionary=["kind"])

    def join(self, parts: Sequence[pathlib.Path], path: pathlib.Path, about: Mapping[str, Any]) -> None:
        schema = self._pa.parquet.read_schema(parts[0]).with_metadata({_ABOUT: json.dumps(about)})
        with self._pa.parquet.ParquetWriter(path, schema, use_dictionary=["kind"]) as writer:
            for part in parts:
                writer.write_table(self._pa.parquet.read_table(part).cast(schema))

    def about(self, path: pathlib.Path) -> dict[str, Any]:
        metadata = self._pa.parquet.read_schema(path).metadata or {}
        return json.loads(metadata.get(_ABOUT.encode(), b"{}"))

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        table = self._pa.parquet.read_table(path)
        vectors = [np.asarray(chunk.flatten()) for chunk in table["embedding"].chunks]
        size = table.schema.field("embedding").type.list_size
        rows = np.concatenate([np.empty(0, np.float32), *vectors]).reshape(-1, size)
        return {column: table[column].to_pylist() for column in COLUMNS[:-1]} | {"embedding": rows}


FORMATS = {".parquet": Parquet, ".npz": Npz}


def format_of(path: pathlib.Path) -> Format:
    """Return the format of a file by its name.

    Raises:
      UserError: neither .parquet nor .npz; parquet without pyarrow.
    """
    check_choice(f"the ending of {str(path)!r}", path.suffix, FORMATS)
    return FORMATS[path.suffix]()


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Return the columns of a file of embeddings: "kind", "id", "text" (lists) and "embedding", fp32 (n, e).

    Raises:
      UserError: another ending, or a file that is damaged or another program's.
    """
    path = pathlib.Path(path)
    with _damage(path):
        return format_of(path).read(path)


def about(path: str | os.PathLike) -> dict[str, Any]:
    """Return the metadata of a file of `xclip_jax.commands.embed`; {} for one of another program.

    Raises:
      UserError: another ending, or a damaged file.
    """
    path = pathlib.Path(path)
    with _damage(path):
        metadata = format_of(path).about(path)
    return metadata if isinstance(metadata, dict) else {}


@contextlib.contextmanager
def _damage(path: pathlib.Path) -> Iterator[None]:
    """Raise what reading a damaged file leads to, which depends on the format and on the damage, as a `UserError`."""
    try:
        yield
    except (UserError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise UserError(
            f"{path} is damaged or another program's ({first_line(error)}); delete it, or name another file."
        ) from error
