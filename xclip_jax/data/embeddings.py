"""Parquet files of embeddings, written in small parts and then joined.

Columns are "kind", "id", "text" (strings) and "embedding" (lists of e numbers in fp32), with a dict of metadata.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import unreadable_as

__all__ = ["about", "files", "read"]

COLUMNS = ("kind", "id", "text", "embedding")
_STRINGS = pyarrow.schema([(column, pyarrow.string()) for column in COLUMNS[:-1]])
_ABOUT = "xclip_jax"


def write(path: pathlib.Path, columns: Mapping[str, Any]) -> None:
    """Write a part: lists of strings, and an array (n, e)."""
    rows = np.asarray(columns["embedding"], np.float32)
    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1])
    # File names may contain bytes invalid in UTF-8.
    strings = [[text.encode("utf-8", "replace").decode() for text in columns[key]] for key in COLUMNS[:-1]]
    arrays = [pyarrow.array(texts, pyarrow.string()) for texts in strings]
    table = pyarrow.table([*arrays, vectors], names=list(COLUMNS))
    pyarrow.parquet.write_table(table, path, use_dictionary=["kind"])


def join(parts: Sequence[pathlib.Path], path: pathlib.Path, metadata: Mapping[str, Any]) -> None:
    """Join the parts in their order, one at a time, and add the metadata."""
    schema = pyarrow.parquet.read_schema(parts[0]).with_metadata({_ABOUT: json.dumps(metadata)})
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=["kind"]) as writer:
        for part in parts:
            writer.write_table(pyarrow.parquet.read_table(part).cast(schema))


def files(path: str | os.PathLike) -> list[str]:
    """Return [path], or the files of a folder of shares in order; `UserError` unless it has all shares of one job."""
    path = os.path.expanduser(path)
    found = sorted(map(str, pathlib.Path(path).glob("*.parquet")))
    if not found:
        return [path]
    plans = [about(file).get("plan", {}) for file in found]
    expected = [plans[0] | {"share": i + 1} for i in range(plans[0].get("shares", 0))]
    if plans != expected:
        missing = ", ".join(f"{plan['share']}/{len(expected)}" for plan in expected if plan not in plans)
        raise UserError(f"{path} lacks --share {missing or 'none'} for {found[0]}, or has files of other jobs.")
    return found


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Return the columns of a file, or folder of `files`: "kind", "id", "text" (lists) and "embedding", fp32 (n, e)."""
    columns = read_arrow(path)
    return columns | {column: columns[column].to_pylist() for column in COLUMNS[:-1]}


def read_arrow(path: str | os.PathLike) -> dict[str, Any]:
    """Return `read`, with the strings as `pyarrow.ChunkedArray`: which need no object each."""
    path = os.path.expanduser(path)
    parts = files(path)
    with _naming(path):
        tables = [pyarrow.parquet.ParquetFile(part) for part in parts]
        size = tables[0].schema_arrow.field("embedding").type.list_size
        # Filled one group at a time: joining chunks would need the memory twice.
        rows = np.empty((sum(table.metadata.num_rows for table in tables), size), np.float32)
        start = 0
        strings = []
        for file, group in ((t, group) for t in tables for group in range(t.num_row_groups)):
            table = file.read_row_group(group, list(COLUMNS))
            for chunk in table["embedding"].chunks:
                rows[start : start + len(chunk)] = np.asarray(chunk.flatten()).reshape(-1, size)
                start += len(chunk)
            strings.append(table.select(COLUMNS[:-1]).cast(_STRINGS))
        table = pyarrow.concat_tables([_STRINGS.empty_table(), *strings])
        return {column: table[column] for column in COLUMNS[:-1]} | {"embedding": rows}


def about(path: str | os.PathLike) -> dict[str, Any]:
    """Return the metadata of a file of `xclip_jax.commands.embed`; {} for another program's file."""
    path = os.path.expanduser(path)
    with _naming(path):
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        return json.loads(metadata.get(_ABOUT.encode(), b"{}"))


def _naming(path: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    os.stat(path)  # an error of the path is no damage
    return unreadable_as(f"{path} is damaged or another program's; delete it, or name another file")
