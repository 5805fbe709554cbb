"""Pairs in CSV, TSV and parquet tables with columns of images or their paths and captions, and in ArrayRecord files."""

import contextlib
import dataclasses
import glob
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from xclip_jax.core import storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample, UserError, redact
from xclip_jax.data import labelled
from xclip_jax.data.base import (
    MAX_BYTES,
    LazySequence,
    Record,
    Source,
    SourceKind,
    SourceOptions,
    check_columns,
    choose,
    decode_utf8,
    json_strings,
    json_values,
    open_binary,
    pair,
    read_csv,
    split_columns,
    strip_texts,
)
from xclip_jax.data.tokenizer import clip_captions

_HASHED_WHOLE = 1 << 30  # bytes of the largest CSV table whose fingerprint covers all of its content


class ImageColumn(LazySequence):
    """Encoded images in an Arrow column: bytes, paths or URLs, or {"bytes", "path"} as Hugging Face writes them."""

    def __init__(self, column: Any, locate: Callable[[int, str], tuple[str, str]]) -> None:
        """Hold a `pyarrow.ChunkedArray` of images.

        `locate` maps the number of a row and its path to the file's place, and to the table's address if the table is
        remote, else "": remote tables may not name files of this machine, see `storage.check_named`.
        """
        self.column = column
        self._locate = locate
        super().__init__(len(column), lambda i: self.read(i)[0], lambda i: self.path(i) or f"row {i}", self._listed)

    def _value(self, index: int) -> Any:
        value = _cell(self.column, index)
        return value.get("bytes") or value.get("path") if isinstance(value, dict) else value

    def path(self, index: int) -> str:
        """Return the path or URL of an image; "" if the table contains the image itself, or none."""
        value = self._value(index)
        return self._locate(index, value)[0] if isinstance(value, str) and value else ""

    def _listed(self) -> Iterator[tuple[str, int]]:
        """Yield the row and size in bytes of each image, or its file name and 0."""
        column = self.column
        paths = None
        if pyarrow.types.is_struct(column.type):
            parts = dict(zip([field.name for field in column.type], column.flatten(), strict=True))
            column = parts.get("bytes", column)
            paths = parts.get("path")
        if pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type):
            column = pyarrow.compute.call_function("binary_length", [column])
        for index, value in enumerate(value for chunk in column.chunks for value in chunk.to_pylist()):
            size = value if isinstance(value, int) else 0
            if not size and paths is not None:
                value = paths[index].as_py()
            yield (value.rpartition("/")[2], 0) if isinstance(value, str) else (str(index), size)

    def read(self, index: int) -> tuple[bytes, str]:
        """Return an image, and its path or URL or else its row; raise `BadSample` for a missing or unreadable image."""
        value = self._value(index)
        name = str(index)
        if isinstance(value, str) and value:
            name, table = self._locate(index, value)
            try:
                value = storage.read(name, MAX_BYTES["image"], table)
            except (OSError, ValueError) as error:  # a ValueError for a zero byte, or a URL with an unknown scheme
                raise storage.unreadable(error, "file does not exist") from error
        if not (value and isinstance(value, bytes)):
            raise BadSample("image file is empty" if name != str(index) else "no image in the row")
        return value, name


def _cell(column: Any, index: int) -> Any:
    """Return a value of an Arrow column; `BadSample` for a text in another encoding."""
    try:
        return column[index].as_py()
    except UnicodeDecodeError as error:
        return decode_utf8(error.object)  # which raises


class ColumnSource(Source):
    """Rows of Arrow columns with an image or its path or URL, captions, and comma-separated keywords."""

    def __init__(self, images: ImageColumn, columns: Any, options: SourceOptions) -> None:
        """Hold images, and a `pyarrow.Table` with the columns of captions and keywords that `options` names."""
        self.images = images
        self.columns = columns
        self.options = options

    def __len__(self) -> int:
        return len(self.images)

    def _row(self, key: str, index: int) -> dict[str, Any]:
        """Return {COLUMN: value} of a row for the key COLUMN or COLUMN/FIELD."""
        name = key.partition("/")[0]
        return {name: _cell(self.columns[name], index)}

    def _values(self, key: str, index: int) -> list[Any]:
        row = self._row(key, index)
        (value,) = row.values()
        if isinstance(value, list) and value and isinstance(value[0], int | float):
            return clip_captions(value)
        return json_values(row, key)

    def texts(self, index: int) -> list[list[str]]:
        """Return the strings in each caption column of a row, without reading the image."""
        return [strip_texts(self._values(key, index)) for key in self.options.text_columns]

    def values(self, key: str, index: int) -> list[str]:
        """Return the values of a row in one column as strings, also numbers and booleans."""
        return json_strings(self._row(key, index), key, scalars=True)

    def __getitem__(self, index: int) -> Record:
        image, name = self.images.read(index)
        return pair(image, name, self.options, lambda key: self._values(key, index))

    def describe(self, index: int) -> dict[str, str]:
        try:
            path = self.images.path(index)
        except ValueError:  # bytes in another encoding, or a zero byte
            path = ""
        return {"file": path} if path else {"row": str(index)}


def _class_names(schema: Any, label: str) -> list[str]:
    """Return the names of a column that is a ClassLabel of the package `datasets`; [] for another column."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        return list(feature["names"]) if feature["_type"] == "ClassLabel" else []
    return []


def in_classes(spec: str, images: ImageColumn, table: Any, label: str) -> labelled.Labelled:
    """Return images with the classes in column `label` of a `pyarrow.Table`, without unlabelled rows.

    A ClassLabel of the package `datasets` keeps its names and their order; -1 means unlabelled. In other columns the
    classes are the distinct strings or integers, sorted, and an empty cell means unlabelled.
    `UserError` for values of another type, or if all rows are unlabelled.
    """
    column = table[label]
    names = _class_names(table.schema, label)
    try:
        cells = [x.strip() if isinstance(x, str) else x for chunk in column.chunks for x in chunk.to_pylist()]
        values = range(len(names)) or sorted(set(cells) - {None, ""})
    except (TypeError, UnicodeDecodeError):  # lists, structs or invalid strings
        cells = values = []
    if not all(isinstance(value, str | int) for value in values):
        cells = []
    number = {value: i for i, value in enumerate(values)}
    classes = np.array([number.get(cell, -1) for cell in cells], np.int64)
    kept = np.flatnonzero(classes >= 0)
    if not len(kept):
        raise UserError(
            f"{spec}: no row has a class, a string in UTF-8 or an integer, in column {label!r} of type {column.type}; "
            "name another column, ?label=COLUMN."
        )
    if len(kept) < len(classes):
        rows = f"{len(classes) - len(kept):,} of {len(classes):,} rows"
        log0(f"WARNING: {spec}: {rows} have no {label!r} and are left out, row {np.argmin(classes)} first")
    names = names or [str(value) for value in values]
    return labelled.Labelled("image", choose(images, kept), classes[kept], names)


def path_in(folder: str, path: str) -> str:
    """Return the place of a file named by a table in a local folder: a URL or a path."""
    return path if storage.is_remote(path) else str(pathlib.Path(folder, path))


class TableSource(ColumnSource):
    """Rows of tables in files; paths in a table are relative to its folder."""

    def __init__(
        self, pattern: str, options: SourceOptions, read: Callable[[str, list[str]], Any], label: str = ""
    ) -> None:
        """Read the columns that `options` and `label` name into memory; `read` is `read_csv` or `read_parquet`."""
        self.tables = storage.expand(pattern)
        self._read = read
        keys = list(dict.fromkeys([*options.columns, *filter(None, [label])]))
        tables = []
        for path in self.tables:
            with storage.unreadable_as(f"table {path!r} cannot be read"):
                table = read(path, keys)
            check_columns(f"table {path!r}", table.column_names, keys)
            tables.append(table.select(keys))
        first = _class_names(tables[0].schema, label)
        for path, table in zip(self.tables, tables, strict=True):
            if _class_names(table.schema, label) != first:
                raise UserError(
                    f"tables {self.tables[0]!r} and {path!r} number other classes in {label!r}; name them separately, "
                    "or convert the column to strings."
                )
        with storage.unreadable_as(f"the tables of {pattern!r} have columns of different types"):
            # A column without values has a type of its own, which fits every other.
            joined = pyarrow.concat_tables(tables, promote_options="default")
        if not len(joined):
            raise UserError(f"{pattern!r} has no row; pass a table of paths and captions.")
        self._ends = np.cumsum([len(table) for table in tables])
        super().__init__(ImageColumn(joined[options.image_column], self._locate), joined, options)

    def _locate(self, index: int, path: str) -> tuple[str, str]:
        table = self.tables[int(np.searchsorted(self._ends, index, side="right"))]
        if not storage.is_remote(table):
            return path_in(os.path.dirname(table), path), ""
        if not storage.is_remote(path) and not path.startswith("/"):
            path = f"{table.partition('?')[0].rpartition('/')[0]}/{path}"  # a Path would turn the address's // into /
        return path, table

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows, hash (and column of images), names and sizes; see `storage.fingerprint`."""
        known = fingerprint(len(self), self.tables, whole=_HASHED_WHOLE if self._read is read_csv else 0)
        return known | {"hash": f"{known['hash']} {self.options.image_column}"}


def read_parquet(path: str, columns: list[str]) -> Any:
    """Return columns of a local or remote parquet file as a `pyarrow.Table`; all of them if one is missing."""
    with open_binary(path) as file:
        place: Any = file if storage.is_remote(path) else path
        missing = set(columns) - set(pyarrow.parquet.read_schema(place).names)
        return pyarrow.parquet.read_table(place, columns=None if missing else columns)


def fingerprint(samples: int, paths: Sequence[str], whole: int = 0) -> dict[str, Any]:
    """Return the fingerprint of files: number of samples, hash (see `storage.fingerprint`), names and sizes."""
    sizes = [{"name": os.path.basename(redact(path)), "bytes": storage.stat(path)[0]} for path in paths]
    return {"samples": samples, "hash": storage.fingerprint(paths, whole=whole), "files": sizes}


class ArrayRecordSource(Source):
    """Pairs in ArrayRecord files of tf.train.Example, read without TensorFlow."""

    def __init__(self, pattern: str, options: SourceOptions) -> None:
        """Open the files of a pattern; `options` names features, and unreadable files raise `UserError`."""
        from array_record.python import array_record_data_source

        self.files = storage.expand(pattern)
        self.options = options
        with storage.unreadable_as(f"{pattern!r} cannot be read as ArrayRecord files"):
            self._data = array_record_data_source.ArrayRecordDataSource(self.files)

    def __len__(self) -> int:
        return len(self._data)

    def describe(self, index: int) -> dict[str, str]:
        return {"row": str(index)}

    def __getitem__(self, index: int) -> Record:
        from tensorflow_datasets.proto import tf_example_pb2

        example = tf_example_pb2.Example.FromString(self._data[index])  # ty: ignore[missing-attribute]
        features = {key: list(value.bytes_list.value) for key, value in example.features.feature.items()}
        image = features.get(self.options.image_column)
        if not image:
            raise BadSample("no image in the record", f"it has {', '.join(sorted(features))}")

        def read(key: str) -> list[str]:
            return [decode_utf8(value) for value in features.get(key, ())]

        return pair(image[0], str(index), self.options, read)

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(len(self), self.files)


class CsvTables(SourceKind):
    """`csv:PATTERN` with pairs, `csv:PATH` with labelled images."""

    suffixes = (".csv", ".tsv")

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> TableSource:
        return TableSource(rest, options, read_csv)

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        return labelled.open_files(f"csv:{rest}", rest)


class ParquetTables(SourceKind):
    """`parquet:PATTERN` and `parquet:FOLDER/SPLIT`, optionally with ?image=COLUMN&label=COLUMN."""

    suffixes = (".parquet",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions, label: str = "") -> TableSource:
        place, columns = split_columns(rest)
        options = dataclasses.replace(options, image_column=columns.get("image", options.image_column))
        return TableSource(_files(place), options, read_parquet, label)

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        label = split_columns(rest)[1].get("label", "label")
        table = cls.open(rest, dataclasses.replace(options, text_columns=(), tags_key=""), label)
        return in_classes(f"parquet:{rest}", table.images, table.columns, label)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        return bool(glob.glob(_files(split_columns(f"{rest}/{split}")[0])))


def _files(place: str) -> str:
    """Return a pattern as it is, and for FOLDER/SPLIT that of SPLIT.parquet, or else of SPLIT-NUMBER*.parquet."""
    folder, split = os.path.split(os.path.expanduser(place).rstrip("/"))
    is_pattern = re.search(r"[^\w-]", split) or os.path.exists(place) or not os.path.isdir(folder)
    if is_pattern:
        return place
    prefix = f"{glob.escape(folder)}/{split}"
    whole = f"{prefix}.parquet"  # train-small.parquet is another split than "train"
    return whole if glob.glob(whole) else f"{prefix}-[0-9]*.parquet"


class ArrayRecords(SourceKind):
    """`array_record:PATTERN`."""

    suffixes = (".array_record", ".arrayrecord")

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> ArrayRecordSource:
        return ArrayRecordSource(rest, options)
