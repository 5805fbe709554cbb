"""Pairs in tables: CSV, TSV or parquet files of image paths or images, and captions; and ArrayRecord files."""

import contextlib
import dataclasses
import functools
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
from xclip_jax.core.errors import BadSample, UserError, first_line, redact
from xclip_jax.data import labelled
from xclip_jax.data.base import (
    MAX_BYTES,
    Record,
    Source,
    SourceKind,
    SourceOptions,
    check_columns,
    choose,
    decode_utf8,
    json_strings,
    json_values,
    no_caption,
    open_binary,
    read_csv,
    split_columns,
    strip_texts,
)
from xclip_jax.data.tokenizer import clip_captions

# CSV tables of at most this number of bytes are hashed as a whole for their fingerprint.
_HASHED_WHOLE = 1 << 30


def pair(image: Any, name: str, options: SourceOptions, read: Callable[[str], Any]) -> Record:
    """Return a record of pairs; `name` is its "id".

    `read` returns the values, or one value, of a column that `options` names; one string of keywords is split at
    commas. `BadSample` if there is no caption and the options want one.
    """
    columns = {key: read(key) for key in options.text_columns}
    text = [caption for values in columns.values() for caption in strip_texts(values)]
    if options.captions and not text:
        raise no_caption(columns)
    tags = read(options.tags_key) if options.tags_key else []
    tags = strip_texts(tags.split(",") if isinstance(tags, str) else tags)
    return {"image": image, "text": text, "tags": tags, "id": name}


class ImageColumn(Sequence):
    """Encoded images in an Arrow column: bytes, paths or URLs, or {"bytes", "path"} as Hugging Face writes them."""

    def __init__(self, column: Any, locate: Callable[[int, str], tuple[str, str]]) -> None:
        """Hold a `pyarrow.ChunkedArray` of images.

        `locate` returns the place of the file that a path in a row names, and the address of the table if that is not
        on this machine, else "": such a table may name no files of this machine, see `storage.check_named`.
        """
        self.column, self._locate = column, locate

    def __len__(self) -> int:
        return len(self.column)

    def _value(self, index: int) -> Any:
        value = self.column[index].as_py()
        return value.get("bytes") or value.get("path") if isinstance(value, dict) else value

    def path(self, index: int) -> str:
        """Return the path or URL of an image, "" if the table holds the image itself, or none."""
        value = self._value(index)
        return self._locate(index, value)[0] if isinstance(value, str) and value else ""

    def name(self, index: int) -> str:
        return self.path(index) or f"row {index}"

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Yield the number and size in bytes of each image, or its file name and 0."""
        column, paths = self.column, None
        if pyarrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            paths = self._field("path") if column.type.get_field_index("path") >= 0 else None
            column = self._field("bytes")
        if pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type):
            column = pyarrow.compute.call_function("binary_length", [column])
        for index, value in enumerate(value for chunk in column.chunks for value in chunk.to_pylist()):
            size = value if isinstance(value, int) else 0
            if not size and paths is not None:
                value = paths[index].as_py()
            yield (value.rpartition("/")[2], 0) if isinstance(value, str) else (str(index), size)

    def _field(self, name: str) -> Any:
        options = pyarrow.compute.StructFieldOptions(name)
        return pyarrow.compute.call_function("struct_field", [self.column], options)

    def read(self, index: int) -> tuple[bytes, str]:
        """Return an image, and its path or URL, or the number of its row.

        Raises:
          BadSample: a file that cannot be read or is empty, or no image.
        """
        value = self._value(index)
        name = str(index)
        if isinstance(value, str) and value:
            name, table = self._locate(index, value)
            try:
                value = storage.read(name, MAX_BYTES["image"], table)
            except (OSError, ValueError) as error:  # a ValueError for a zero byte, or a URL that cannot be opened
                raise storage.unreadable(error) from error
        if not (value and isinstance(value, bytes)):
            raise BadSample("image file is empty" if name != str(index) else "no image in the row")
        return value, name

    def __getitem__(self, index: int) -> bytes:  # ty: ignore[incompatible-method-override] no slices
        return self.read(index)[0]


@contextlib.contextmanager
def _utf8() -> Iterator[None]:
    """Raise the error of a cell in another encoding as `BadSample`."""
    try:
        yield
    except UnicodeDecodeError as error:
        decode_utf8(error.object)
        raise


class ColumnSource(Source):
    """Rows of Arrow columns: an image, or its path or URL, captions, and keywords with commas between them."""

    def __init__(self, images: ImageColumn, columns: Any, options: SourceOptions) -> None:
        """`columns` is a `pyarrow.Table` with the columns of captions and keywords, which `options` names."""
        self.images, self.columns, self.options = images, columns, options

    def __len__(self) -> int:
        return len(self.images)

    def _values(self, key: str, index: int) -> Any:
        name = key.partition("/")[0]
        value = self.columns[name][index].as_py()
        if isinstance(value, list) and value and isinstance(value[0], int | float):
            return clip_captions(value)
        values = json_values({name: value}, key)
        return values[0] if len(values) == 1 else values

    def texts(self, index: int) -> list[list[str]]:
        """Return the strings of a row in each column of captions, without reading its image."""
        with _utf8():
            return [strip_texts(self._values(key, index)) for key in self.options.text_columns]

    def values(self, key: str, index: int) -> list[str]:
        """Return the texts of a row's values in a column that the options name, also of numbers and booleans."""
        name = key.partition("/")[0]
        with _utf8():
            return json_strings({name: self.columns[name][index].as_py()}, key, scalars=True)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with _utf8():
            image, name = self.images.read(index)
            try:
                return pair(image, name, self.options, lambda key: self._values(key, index))
            except (UnicodeDecodeError, BadSample):
                if self.options.captions:
                    raise
                return {"image": image, "text": [], "tags": [], "id": name}

    def describe(self, index: int) -> dict[str, str]:
        try:
            path = self.images.path(index)
        except ValueError:  # bytes that are not UTF-8, or a zero byte
            path = ""
        return {"file": path} if path else {"row": str(index)}


def in_classes(spec: str, images: ImageColumn, table: Any, label: str) -> labelled.Labelled:
    """Return the images of a `pyarrow.Table` in the classes of its column `label`, without rows that have none.

    A ClassLabel of the package `datasets` keeps its names and their order; -1 stands for none. In another column the
    distinct strings or integers, sorted, are the classes, and an empty cell has none.

    Raises:
      UserError: a column of other values, or no row with a class; `spec` begins the message.
    """
    column = table[label]
    names = _stored_names(table, label)
    try:
        cells = [x.strip() if isinstance(x, str) else x for chunk in column.chunks for x in chunk.to_pylist()]
        values = range(len(names)) or sorted(set(cells) - {None, ""})
    except (TypeError, UnicodeDecodeError):  # lists, structs or invalid strings
        values = [b""]
    if not all(isinstance(value, str | int) for value in values):
        raise UserError(
            f"{spec}: column {label!r} has values of type {column.type}, and classes are strings in UTF-8 or integers; "
            "name another one, ?label=COLUMN."
        )
    number = {value: i for i, value in enumerate(values)}
    classes = np.array([number.get(cell, -1) for cell in cells], np.int64)
    kept = np.flatnonzero(classes >= 0)
    if not len(kept):
        raise UserError(f"{spec}: no row has a label in column {label!r}; name another split or column.")
    names = names or [str(value) for value in values]
    if len(kept) == len(classes):
        return labelled.Labelled("image", images, classes, names)
    missing = len(classes) - len(kept)
    first = np.argmin(classes)
    log0(f"WARNING: {spec}: {missing:,} of {len(classes):,} rows have no {label!r} and are left out, row {first} first")
    return labelled.Labelled("image", choose(images, kept), classes[kept], names)


def _stored_names(table: Any, column: str) -> list[str]:
    """Return the names of a column that the package `datasets` wrote as ClassLabel, [] for another column."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        feature = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"][column]
        return list(feature["names"]) if feature["_type"] == "ClassLabel" else []
    return []


def path_in(folder: str, path: str) -> str:
    """Return the place of a file that a table in a local folder names: a URL, or a path, which may begin with ~."""
    return path if storage.is_remote(path) else str(pathlib.Path(folder, os.path.expanduser(path)))


def _locate(tables: Sequence[str], ends: np.ndarray, index: int, path: str) -> tuple[str, str]:
    """Return the place of a file that a row of `tables` names; `ends` are their last rows, plus 1."""
    table = tables[int(np.searchsorted(ends, index, side="right"))]
    if not storage.is_remote(table):
        return path_in(os.path.dirname(table), path), ""
    if not storage.is_remote(path) and not path.startswith("/"):
        path = f"{table.rpartition('/')[0]}/{path}"  # a Path would turn the address's // into /
    return path, table if storage.scheme(table) != "file" else ""


class TableSource(ColumnSource):
    """Rows of files. Paths are relative to the file's folder, unless they are absolute."""

    def __init__(self, pattern: str, options: SourceOptions, read: Callable[[str, list[str]], Any]) -> None:
        """Read the columns that `options` names into memory; `read` is `read_csv` or `read_parquet`."""
        self.pattern = pattern
        self.tables = storage.expand(pattern)
        self._read = read
        keys = options.columns
        tables = []
        for path in self.tables:
            try:
                tables.append(read(path, keys))
            except UserError:
                raise
            except Exception as error:  # the class depends on the damage
                raise UserError(f"table {path!r} cannot be read ({first_line(error)}).") from error
            check_columns(f"table {path!r}", tables[-1].column_names, keys)
            tables[-1] = tables[-1].select(keys)
        try:
            # A column without values has a type of its own, which fits every other.
            joined = pyarrow.concat_tables(tables, promote_options="default")
        except pyarrow.ArrowException as error:
            raise UserError(f"the tables of {pattern!r} have columns of other types ({first_line(error)}).") from error
        if not len(joined):
            raise UserError(f"{pattern!r} has no row; pass a table of paths and captions.")
        ends = np.cumsum([len(table) for table in tables])
        images = ImageColumn(joined[options.image_column], functools.partial(_locate, self.tables, ends))
        super().__init__(images, joined, options)

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows, a hash of the tables (see `storage.fingerprint`), and their names and sizes."""
        return fingerprint(len(self), self.tables, whole=_HASHED_WHOLE if self._read is read_csv else 0)


def read_parquet(path: str, columns: list[str]) -> Any:
    """Return the columns of a local or remote parquet file, or all if it lacks one, as a `pyarrow.Table`."""
    with open_binary(path) as file:
        place: Any = file if storage.is_remote(path) else path
        missing = set(columns) - set(pyarrow.parquet.read_schema(place).names)
        return pyarrow.parquet.read_table(place, columns=None if missing else columns)


def fingerprint(samples: int, paths: Sequence[str], whole: int = 0) -> dict[str, Any]:
    """Return the fingerprint of files: `samples`, a hash (`whole` as for `storage.fingerprint`), names and sizes."""
    sizes = [{"name": os.path.basename(redact(path)), "bytes": storage.stat(path)[0]} for path in paths]
    return {"samples": samples, "hash": storage.fingerprint(paths, whole=whole), "files": sizes}


class ArrayRecordSource(Source):
    """Pairs in ArrayRecord files of tf.train.Example, the format that TensorFlow's users write; read without it."""

    def __init__(self, pattern: str, options: SourceOptions) -> None:
        """Open the files that `pattern` names, or raise `UserError`; `options` names features."""
        from array_record.python import array_record_data_source

        self.files = storage.expand(pattern)
        self.options = options
        try:
            self._data = array_record_data_source.ArrayRecordDataSource(self.files)
        except Exception as error:  # the library raises bare errors of C++
            raise UserError(f"{pattern!r} cannot be read as ArrayRecord files ({error}).") from error

    def __len__(self) -> int:
        return len(self._data)

    def describe(self, index: int) -> dict[str, str]:
        return {"row": str(index)}

    def __getitem__(self, index: int) -> Record:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            example = tf_example_pb2.Example.FromString(self._data[index])  # ty: ignore[missing-attribute]
        except Exception as error:
            raise BadSample("record cannot be read", str(error)) from error
        features = {key: list(value.bytes_list.value) for key, value in example.features.feature.items()}
        if not (image := features.get(self.options.image_column)):
            raise BadSample("no image in the record", f"it has {', '.join(sorted(features))}")

        def read(key: str) -> list[str]:
            return [decode_utf8(value) for value in features.get(key, ())]

        return pair(image[0], str(index), self.options, read)

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of records, a hash of the files (see `storage.fingerprint`), and their names and sizes."""
        return fingerprint(len(self), self.files)


class CsvTables(SourceKind):
    """`csv:PATTERN` of pairs, `csv:PATH` of labelled images."""

    suffixes = (".csv", ".tsv")

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> TableSource:
        return TableSource(rest, options, read_csv)

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        return labelled.open_files(f"csv:{rest}", rest)


class ParquetTables(SourceKind):
    """`parquet:PATTERN` and `parquet:FOLDER/SPLIT`, for labels with ?label=COLUMN, and for both ?image=COLUMN."""

    suffixes = (".parquet",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> TableSource:
        place, columns = split_columns(rest)
        options = dataclasses.replace(options, image_column=columns.get("image", options.image_column))
        return TableSource(_files(place), options, read_parquet)

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        label = split_columns(rest)[1].get("label", "label")
        table = cls.open(rest, dataclasses.replace(options, text_columns=(label,), tags_key=""))
        return in_classes(f"parquet:{rest}", table.images, table.columns, label)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        return bool(glob.glob(_files(split_columns(f"{rest}/{split}")[0])))


def _files(place: str) -> str:
    """Return the pattern that `place` is, or that of the tables SPLIT.parquet and SPLIT-*.parquet of FOLDER/SPLIT."""
    folder, split = os.path.split(os.path.expanduser(place))
    is_pattern = re.search(r"[^\w-]", split) or os.path.exists(place) or not os.path.isdir(folder)
    return place if is_pattern else f"{glob.escape(folder)}/{split}[.-]*parquet"


class ArrayRecords(SourceKind):
    """`array_record:PATTERN`."""

    suffixes = (".array_record", ".arrayrecord")

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> ArrayRecordSource:
        return ArrayRecordSource(rest, options)
