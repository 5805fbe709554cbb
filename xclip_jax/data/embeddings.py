"""Files of embeddings, .parquet or .npz, written in small parts and then joined.

Columns are "kind", "id", "text" (strings) and "embedding" (fp32, e numbers each), with a dict of metadata. Parquet
files are joined part by part. Files in .npz are joined in memory, and their "id" and "text" are JSON, since NumPy pads
all strings to the longest: json.loads(np.load("captions.npz")["text"].tobytes()).
"""

import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from xclip_jax.core.errors import UserError, check_choice, first_line

__all__ = ["about", "read"]

COLUMNS = ("kind", "id", "text", "embedding")
_ABOUT = "xclip_jax"

Columns = Mapping[str, Any]


class Npz:
    """NumPy's .npz, not compressed; the metadata is JSON in an array "xclip_jax"."""

    def write(self, path: pathlib.Path, columns: Columns, about: Mapping[str, Any] | None = None) -> None:
        """Write a part: lists of strings, and an array (n, e)."""
        arrays: dict[str, Any] = {"kind": np.asarray(columns["kind"], "<U5")}
        arrays["embedding"] = np.asarray(columns["embedding"])
        for column in ("id", "text"):
            arrays[column] = np.frombuffer(json.dumps(list(columns[column])).encode(), np.uint8)
        if about is not None:
            arrays[_ABOUT] = np.array(json.dumps(about))
        with path.open("wb") as file:
            np.savez(file, **arrays)

    def join(self, parts: Sequence[pathlib.Path], path: pathlib.Path, about: Mapping[str, Any]) -> None:
        """Join the parts in their order, and add the metadata."""
        read = [self.read(part) for part in parts]
        columns = {key: list(itertools.chain.from_iterable(part[key] for part in read)) for key in COLUMNS[:-1]}
        self.write(path, columns | {"embedding": np.concatenate([part["embedding"] for part in read])}, about)

    def about(self, path: pathlib.Path) -> dict[str, Any]:
        """Return the metadata written by `join`; {} for another program's file."""
        with np.load(path) as arrays:
            return json.loads(str(arrays[_ABOUT])) if _ABOUT in arrays.files else {}

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        """Return the columns of a part or of a joined file: lists of strings, and an array (n, e)."""
        with np.load(path) as arrays:
            strings = {column: json.loads(arrays[column].tobytes()) for column in ("id", "text")}
            return {"kind": arrays["kind"].tolist(), **strings, "embedding": arrays["embedding"]}


class Parquet:
    """Parquet with a row group for each part, and embeddings as lists of fixed size; see `Npz` for the methods."""

    def write(self, path: pathlib.Path, columns: Columns) -> None:
        rows = np.asarray(columns["embedding"], np.float32)
        vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1])
        strings = [pyarrow.array(columns[key], pyarrow.string()) for key in COLUMNS[:-1]]
        table = pyarrow.table([*strings, vectors], names=list(COLUMNS))
        pyarrow.parquet.write_table(table, path, use_dictionary=["kind"])

    def join(self, parts: Sequence[pathlib.Path], path: pathlib.Path, about: Mapping[str, Any]) -> None:
        schema = pyarrow.parquet.read_schema(parts[0]).with_metadata({_ABOUT: json.dumps(about)})
        with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=["kind"]) as writer:
            for part in parts:
                writer.write_table(pyarrow.parquet.read_table(part).cast(schema))

    def about(self, path: pathlib.Path) -> dict[str, Any]:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        return json.loads(metadata.get(_ABOUT.encode(), b"{}"))

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        table = pyarrow.parquet.read_table(path)
        vectors = [np.asarray(chunk.flatten()) for chunk in table["embedding"].chunks]
        size = table.schema.field("embedding").type.list_size
        rows = np.concatenate([np.empty(0, np.float32), *vectors]).reshape(-1, size)
        return {column: table[column].to_pylist() for column in COLUMNS[:-1]} | {"embedding": rows}


FORMATS = {".parquet": Parquet, ".npz": Npz}


def format_of(path: pathlib.Path) -> Npz | Parquet:
    """Return the format of a file by its ending; `UserError` for neither .parquet nor .npz."""
    check_choice(f"the ending of {str(path)!r}", path.suffix, FORMATS)
    return FORMATS[path.suffix]()


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Return the columns of a file of embeddings: "kind", "id", "text" (lists) and "embedding", fp32 (n, e)."""
    return _read(pathlib.Path(path), "read")


def about(path: str | os.PathLike) -> dict[str, Any]:
    """Return the metadata of a file of `xclip_jax.commands.embed`; {} for another program's file."""
    return _read(pathlib.Path(path), "about")


def _read(path: pathlib.Path, method: str) -> Any:
    file_format = format_of(path)
    try:
        return getattr(file_format, method)(path)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # of any class
        raise UserError(
            f"{path} is damaged or another program's ({first_line(error)}); delete it, or name another file."
        ) from error
