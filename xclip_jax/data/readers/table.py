"""Pairs in tables: CSV, TSV or parquet files of image paths or images, and captions; and ArrayRecord files."""

import abc
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError, first_line, public
from xclip_jax.data import labelled
from xclip_jax.data.base import MAX_BYTES, Form, MissingColumnError, Record, Source, SourceKind, SourceOptions
from xclip_jax.data.text import csv_rows, decode_utf8, strip_texts

# CSV tables of at most this number of bytes are hashed as a whole for their fingerprint.
_HASHED_WHOLE = 1 << 30


def pair(image: Any, name: str, options: SourceOptions, read: Callable[[str], Any]) -> Record:
    """Return a record of pairs.

    Args:
      image: encoded or decoded.
      name: the record's "id".
      options: names of the columns.
      read: function from a column's name to its strings, or one string; one string of keywords is split at commas.

    Raises:
      BadSample: no caption.
    """
    text = [caption for key in options.text_keys for caption in strip_texts(read(key))]
    if not text:
        raise BadSample("caption is empty")
    tags = read(options.tags_key) if options.tags_key else []
    return {
        "image": image,
        "text": text,
        "tags": strip_texts(tags.split(",") if isinstance(tags, str) else tags),
        "id": name,
    }


class _Strings:
    """Many strings in two buffers; a list would take several times the memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._data = b"".join(parts)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._data[start : int(self._ends[index])].decode("utf-8", "surrogatepass")


def _check_columns(path: str, names: Sequence[str], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in names]
    if missing:
        fault = f"table {path!r} has no column {missing[0]!r}; its columns are {', '.join(map(repr, names))}"
        raise MissingColumnError(fault, "data.image_key, data.text_keys and data.tags_key")


class TableSource(Source):
    """Rows of tables: a path or URL of an image, or its bytes, and captions."""

    def __init__(self, pattern: str, options: SourceOptions) -> None:
        """Reads the columns into memory.

        Args:
          pattern: the tables, see `storage.expand`.
          options: names of the columns: image paths, relative to the table's folder unless absolute; captions, one of
            which is drawn each time; and keywords with commas between them.

        Raises:
          UserError: no such file or column, no row.
        """
        self.pattern, self.options = pattern, options
        self.tables = storage.expand(pattern)
        keys = list(dict.fromkeys([options.image_key, *options.text_keys, *filter(None, [options.tags_key])]))
        self._columns, counts = self._read(keys)
        self._ends = np.cumsum(counts)
        if not len(self):
            raise UserError(f"{pattern!r} has no row after its first line; pass a table of paths and captions.")

    @abc.abstractmethod
    def _read(self, keys: list[str]) -> tuple[dict[str, Any], list[int]]:
        """Return the columns over all tables, each indexable by row, and the number of rows of each table."""

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Pickle the arguments; a worker process reads the tables itself."""
        return type(self), (self.pattern, self.options)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _table(self, index: int) -> str:
        return self.tables[int(np.searchsorted(self._ends, index, side="right"))]

    def _value(self, key: str, index: int) -> Any:
        return self._columns[key][index]

    def _path(self, index: int, value: str) -> str:
        table = self._table(index)
        if not storage.is_remote(table):
            return value if storage.is_remote(value) else str(pathlib.Path(table).parent / value)
        if storage.is_remote(value) or value.startswith("/"):
            return value
        return f"{table.rpartition('/')[0]}/{value}"  # a Path would turn the address's // into /

    def describe(self, index: int) -> dict[str, str]:
        try:
            value = self._value(self.options.image_key, index)
        except BadSample:
            value = None
        return {"file": self._path(index, value)} if isinstance(value, str) else {"row": str(index)}

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows, a hash of the tables (see `storage.fingerprint`), and their names and sizes."""
        return fingerprint(len(self), self.tables)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        value = self._value(self.options.image_key, index)
        table = self._table(index)
        untrusted = table if storage.scheme(table) not in ("", "file") else ""
        image, name = image_of(value, str(index), lambda path: self._path(index, path), untrusted)
        return pair(image, name, self.options, lambda key: self._value(key, index))


def image_of(value: Any, row: str, locate: Callable[[str], str] = str, table: str = "") -> tuple[bytes, str]:
    """Return the encoded image in a cell of a table, and its path or URL, or `row` if it has none.

    Args:
      value: bytes, a path or URL, or {"bytes", "path"} as Hugging Face writes them.
      row: name of the row.
      locate: function from a path in the table to the place of the file.
      table: address of a table that is not on this machine, which may not name files of this machine.

    Raises:
      BadSample: a file that cannot be read or is empty, or no image.
    """
    name = row
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        name = locate(value)
        try:
            value = storage.read(name, MAX_BYTES["image"], table)
        except (OSError, ValueError) as error:  # a ValueError for a zero byte, or a URL that cannot be opened
            bad = storage.unreadable(error)
            raise BadSample(bad.reason, bad.detail + labelled.elsewhere(value, error)) from error
    if not (value and isinstance(value, bytes)):
        raise BadSample("image file is empty" if name != row else "no image in the row")
    return value, name


class CsvSource(TableSource):
    """Rows of CSV or TSV files; the first line has the names of the columns."""

    def _read(self, keys: list[str]) -> tuple[dict[str, Any], list[int]]:
        columns, counts = [[] for _ in keys], []
        self._faults: dict[int, str] = {}  # rows with more fields than columns: a caption was cut at its comma
        for path in self.tables:
            if storage.is_remote(path):
                raise UserError(f"table {path!r} is not on this machine; copy it here, or write it as parquet.")
            before = len(columns[0])
            rows = csv_rows(path)
            _, names = next(rows, (0, []))
            if not names:
                raise UserError(f"table {path!r} is empty; pass one whose first line has the names of its columns.")
            _check_columns(path, names, keys)
            positions = [names.index(key) for key in keys]
            for line, row in rows:
                if any(field.strip() for field in row[len(names) :]):
                    self._faults[len(columns[0])] = f"{path!r}, line {line}: {len(row)} fields"
                for column, position in zip(columns, positions, strict=True):
                    column.append(row[position] if position < len(row) else "")
            counts.append(len(columns[0]) - before)
        return {key: _Strings(column) for key, column in zip(keys, columns, strict=True)}, counts

    def _value(self, key: str, index: int) -> str:
        value = super()._value(key, index)
        return value if key == self.options.image_key else decode_utf8(value.encode("utf-8", "surrogateescape"))

    def __getitem__(self, index: int) -> Record:
        if index in self._faults:
            raise BadSample(
                "row has too many fields", f"{self._faults[index]}; put captions that contain a comma in quotes"
            )
        return super().__getitem__(index)

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows, a hash of the tables (see `storage.fingerprint`), and their names and sizes."""
        return fingerprint(len(self), self.tables, whole=_HASHED_WHOLE)


class ParquetSource(TableSource):
    """Rows of parquet files. Images may be bytes, or {"bytes", "path"} as Hugging Face writes them, captions lists."""

    def _read(self, keys: list[str]) -> tuple[dict[str, Any], list[int]]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError("parquet tables need pyarrow: pip install 'xclip_jax[parquet]'.") from error
        tables, schema = [], pyarrow.schema([])
        for path in self.tables:
            try:
                _check_columns(path, pyarrow.parquet.read_schema(path).names, keys)
                tables.append(pyarrow.parquet.read_table(path, columns=keys))
            except UserError:
                raise
            except Exception as error:  # the class depends on the damage
                raise UserError(f"{path!r} cannot be read as parquet ({first_line(error)}).") from error
            try:
                # A column without values has a type of its own, which fits every other.
                schema = pyarrow.unify_schemas([schema, tables[-1].schema], promote_options="default")
            except pyarrow.ArrowException as error:
                raise UserError(
                    f"a column of {path!r} has another type than in the tables before it ({first_line(error)}); pass "
                    "tables of one schema, or make each a source of its own."
                ) from error
        columns = pyarrow.concat_tables(tables, promote_options="default").columns
        return dict(zip(keys, columns, strict=True)), [table.num_rows for table in tables]

    def _value(self, key: str, index: int) -> Any:
        try:
            return self._columns[key][index].as_py()
        except UnicodeDecodeError as error:
            raise BadSample("caption is not UTF-8", str(error)) from error


def fingerprint(samples: int, paths: Sequence[str], whole: int = 0) -> dict[str, Any]:
    """Return the fingerprint of files: `samples`, a hash (`whole` as for `storage.fingerprint`), names and sizes."""
    sizes = [{"name": os.path.basename(public(path)), "bytes": storage.stat(path)[0]} for path in paths]
    return {"samples": samples, "hash": storage.fingerprint(paths, whole=whole), "files": sizes}


class ArrayRecordSource(Source):
    """Pairs in ArrayRecord files of tf.train.Example, the format that TensorFlow's users write; read without it."""

    def __init__(self, pattern: str, options: SourceOptions) -> None:
        """Opens the files.

        Args:
          pattern: see `storage.expand`.
          options: features with the encoded image, captions and keywords.

        Raises:
          UserError: no such file, or not an ArrayRecord file.
        """
        from array_record.python import array_record_data_source

        self.files, self.options = storage.expand(pattern), options
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
        if not (image := features.get(self.options.image_key)):
            raise BadSample("no image in the record", f"it has {', '.join(sorted(features))}")
        return pair(
            image[0], str(index), self.options, lambda key: [decode_utf8(value) for value in features.get(key, ())]
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of records, a hash of the files (see `storage.fingerprint`), and their names and sizes."""
        return fingerprint(len(self), self.files)


class CsvTables(SourceKind):
    """`csv:PATTERN` of pairs, `csv:PATH` of labelled images."""

    forms: ClassVar = {
        "csv:PATTERN": Form(pairs="tables with columns of image paths and captions, between commas, ; or tabs"),
        "csv:PATH": Form(labels="a table with the columns path and label"),
    }
    suffixes = (".csv", ".tsv")

    @classmethod
    def open(cls, rest: str, options: SourceOptions, labels: bool = False) -> Source:
        return labelled.open_files(f"csv:{rest}", rest) if labels else CsvSource(rest, options)


class ParquetTables(SourceKind):
    """`parquet:PATTERN`."""

    forms: ClassVar = {"parquet:PATTERN": Form(pairs="tables with columns of images, or of their paths, and captions")}
    suffixes = (".parquet",)

    @classmethod
    def extras(cls, rest: str) -> tuple[str, ...]:
        return ("parquet",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions, labels: bool = False) -> ParquetSource:
        return ParquetSource(rest, options)


class ArrayRecords(SourceKind):
    """`array_record:PATTERN`."""

    forms: ClassVar = {"array_record:PATTERN": Form(pairs="serialized tf.train.Example in ArrayRecord files")}
    suffixes = (".array_record", ".arrayrecord")

    @classmethod
    def open(cls, rest: str, options: SourceOptions, labels: bool = False) -> ArrayRecordSource:
        return ArrayRecordSource(rest, options)
