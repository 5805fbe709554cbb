"""Files of embeddings: small parts that are written whole or not at all, and one file of them all.

Columns are "kind", "id", "text" (strings) and "embedding" (fp32, e numbers each); beside them there is a dict about
where they are from. Joining takes no more memory than a part does.
"""

import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from xclip_jax.errors import UserError, one_of

COLUMNS = ("kind", "id", "text", "embedding")
_ABOUT = "xclip_jax"

Columns = Mapping[str, Any]


class Format(Protocol):
    """How a kind of file is written and read."""

    def write(self, path: pathlib.Path, columns: Columns) -> None:
        """Writes a part: lists of strings, and an array (n, e)."""

    def join(self, parts: Sequence[pathlib.Path], path: pathlib.Path, about: Mapping[str, Any]) -> None:
        """Writes one file of all parts, in their order, and what is to be known about it."""

    def about(self, path: pathlib.Path) -> dict[str, Any]:
        """What `join` was told; {} for a file from elsewhere."""


class Npz:
    """NumPy's .npz, not compressed; the dict is JSON in an array "xclip_jax"."""

    def write(self, path: pathlib.Path, columns: Columns) -> None:
        with path.open("wb") as file:
            np.savez(file, **{key: np.asarray(columns[key], None if key == "embedding" else str) for key in COLUMNS})

    def join(self, parts: Sequence[pathlib.Path], path: pathlib.Path, about: Mapping[str, Any]) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for column in COLUMNS:
                self._join(parts, archive, column)
            with archive.open(f"{_ABOUT}.npy", "w") as file:
                np.lib.format.write_array(file, np.array(json.dumps(about)))

    def _join(self, parts: Sequence[pathlib.Path], archive: zipfile.ZipFile, column: str) -> None:
        kinds, rows = set(), 0
        for part in parts:
            with np.load(part) as arrays:
                array = arrays[column]
                kinds.add((array.dtype, array.shape[1:]))
                rows += len(array)
        dtype, shape = max(kinds, key=lambda kind: kind[0].itemsize)  # strings are as wide as the longest
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, *shape)}
        with archive.open(f"{column}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_2_0(file, header)
            for part in parts:
                with np.load(part) as arrays:
                    file.write(arrays[column].astype(dtype).tobytes())

    def about(self, path: pathlib.Path) -> dict[str, Any]:
        with np.load(path) as arrays:
            return json.loads(str(arrays[_ABOUT])) if _ABOUT in arrays.files else {}


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


FORMATS = {".parquet": Parquet, ".npz": Npz}


def format_of(path: pathlib.Path) -> Format:
    """The format that a file's name asks for.

    Raises:
      UserError: neither .parquet nor .npz; parquet without pyarrow.
    """
    one_of("the ending of --out", path.suffix, FORMATS)
    return FORMATS[path.suffix]()
