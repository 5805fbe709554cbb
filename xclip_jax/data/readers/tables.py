"""Pairs in tables: CSV, TSV or parquet files of image paths, or images, and captions."""

import abc
import array
import csv
import itertools
import multiprocessing
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core import remote, storage
from xclip_jax.core.errors import BadSample, UserError, public
from xclip_jax.data import labelled
from xclip_jax.data.base import MAX_BYTES, MissingColumnError, Record, Source, SourceKind, SourceOptions
from xclip_jax.data.text import check_encoding, decode_utf8, first_line, separator

# Most lines of a field in quotes; above, two quotes without partners are likelier.
_MAX_LINES = 20
_END = "end of the table"  # read after its last line: a field that is still open includes it
# Bytes up to which the whole of a CSV table is hashed for its fingerprint.
_HASHED_WHOLE = 1 << 30


class _Strings:
    """Many strings in two buffers; a list of them would take several times the memory."""

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


def read_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and fields of each row of a CSV or TSV file, the one with the names of the columns first.

    Fields are separated by what `text.separator` says of the first line. Between tabs quotes are ordinary letters,
    since captions and titles contain single ones. Else a field in quotes may have several lines; the row's number is
    that of the last one. Empty lines are left out.

    Args:
      path: the file, in UTF-8, with or without a byte order mark; other bytes are escaped by surrogates.

    Raises:
      UserError: a quote that is never closed, or that only one of a later row seems to close, so that rows would be
        lost in a field; UTF-16 or UTF-32 by its byte order mark.
    """
    csv.field_size_limit(sys.maxsize)
    lines: list[str] = []  # of the row that is being read

    def read_lines(file: Iterable[str]) -> Iterator[str]:
        for line in itertools.chain(file, [_END]):
            lines.append(line)
            if len(lines) > _MAX_LINES:
                raise UserError(_about_quote(path, rows.line_num - len(lines) + 2, f"more than {_MAX_LINES} lines"))
            yield line

    long_rows = []  # first lines of rows of several lines
    with open(path, "rb") as binary:
        check_encoding(f"table {path!r}", path, binary.read(4))
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        mark = separator(file.readline())
        file.seek(0)
        quoting = csv.QUOTE_NONE if mark == "\t" else csv.QUOTE_MINIMAL
        rows = csv.reader(read_lines(file), delimiter=mark, quoting=quoting)
        for row in rows:
            if len(lines) > 1:
                first = rows.line_num - len(lines) + 1
                if not _is_closed(lines, mark):
                    what = "all rows after it" if lines[-1] == _END else "rows after it"
                    raise UserError(_about_quote(path, first, what))
                long_rows.append(first)
            if row and lines != [_END]:
                yield rows.line_num, row
            lines.clear()
    if long_rows and multiprocessing.parent_process() is None:
        warnings.warn(
            f"table {path!r} has {len(long_rows):,} rows of several lines, the first at line {long_rows[0]}; if that "
            "is not intended, a quote there has no partner and rows are lost.",
            stacklevel=2,
        )


def _is_closed(lines: Sequence[str], mark: str) -> bool:
    """Whether the quotes of a row of several lines are in pairs, each around a whole field."""
    try:
        return lines[-1] != _END and len(list(csv.reader(lines, delimiter=mark, strict=True))) == 1
    except csv.Error:
        return False


def _about_quote(path: str, line: int, what: str) -> str:
    return (
        f"table {path!r}, line {line}: a quote opens a field that swallows {what}; double a quote that is part of the "
        'text ("" in a quoted field), or write the table with tabs, between which quotes are ordinary letters.'
    )


class TableSource(Source):
    """Rows of tables: a path or URL of an image, or its bytes, and captions."""

    def __init__(self, pattern: str, image_key: str, text_keys: Sequence[str], tags_key: str = "") -> None:
        """Reads the columns of these keys into memory.

        Args:
          pattern: the tables, see `storage.expand`.
          image_key: column of paths, relative to the table's folder where they are not absolute.
          text_keys: columns of captions, one of which is drawn each time.
          tags_key: column of keywords, with commas between them; or "".

        Raises:
          UserError: no such file or column, no row.
        """
        self._arguments = (pattern, image_key, text_keys, tags_key)
        self.text_keys, self.image_key, self.tags_key = tuple(text_keys), image_key, tags_key
        self.tables = storage.expand(pattern)
        keys = list(dict.fromkeys([image_key, *text_keys, *filter(None, [tags_key])]))
        self._columns, counts = self._read(keys)
        self._ends = np.cumsum(counts)
        if not len(self):
            raise UserError(f"{pattern!r} has no row after its first line; pass a table of paths and captions.")

    @abc.abstractmethod
    def _read(self, keys: list[str]) -> tuple[dict[str, Any], list[int]]:
        """Return the columns over all tables, each indexable by row, and the number of rows of each table."""

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """A worker process reads the tables itself."""
        return type(self), self._arguments

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
        return f"{table.rpartition('/')[0]}/{value}"  # a Path would take the // of its address for one /

    def describe(self, index: int) -> dict[str, str]:
        """Path of the image, or the row's number."""
        try:
            value = self._value(self.image_key, index)
        except BadSample:
            value = None
        return {"file": self._path(index, value)} if isinstance(value, str) else {"row": str(index)}

    def fingerprint(self) -> dict[str, Any]:
        """Number of rows, a hash of the tables (see `storage.fingerprint`), and their names and sizes."""
        return fingerprint(len(self), self.tables)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        value = self._value(self.image_key, index)
        table = self._table(index)
        untrusted = table if remote.scheme(table) not in ("", "file") else ""
        image, name = image_of(value, str(index), lambda path: self._path(index, path), untrusted)
        text = [caption for key in self.text_keys for caption in strip_texts(self._value(key, index))]
        if not text:
            raise BadSample("caption is empty")
        tags = self._value(self.tags_key, index) if self.tags_key else []
        return {
            "image": image,
            "text": text,
            "tags": strip_texts(tags.split(",") if isinstance(tags, str) else tags),
            "id": name,
        }


def image_of(value: Any, row: str, locate: Callable[[str], str] = str, table: str = "") -> tuple[bytes, str]:
    """Return the encoded image in a cell of a table, and its path or URL, or `row` where it has none.

    Args:
      value: bytes, a path or URL, or {"bytes", "path"} as Hugging Face writes them.
      row: name of the row.
      locate: function from a path in the table to where the file is.
      table: its address where it is not on this machine: it may not name files and addresses of the inner network.

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
    """Rows of CSV or TSV files, whose first line has the names of the columns."""

    def _read(self, keys: list[str]) -> tuple[dict[str, Any], list[int]]:
        columns, counts = [[] for _ in keys], []
        self._too_long = array.array("q")  # index, line and number of fields of rows with too many of them
        for path in self.tables:
            if storage.is_remote(path):
                raise UserError(f"table {path!r} is not on this machine; copy it here, or write it as parquet.")
            before = len(columns[0])
            rows = read_rows(path)
            _, names = next(rows, (0, []))
            if not names:
                raise UserError(f"table {path!r} is empty; pass one whose first line has the names of its columns.")
            _check_columns(path, names, keys)
            positions = [names.index(key) for key in keys]
            for line, row in rows:
                if any(field.strip() for field in row[len(names) :]):
                    self._too_long.extend((len(columns[0]), line, len(row)))
                for column, position in zip(columns, positions, strict=True):
                    column.append(row[position] if position < len(row) else "")
            counts.append(len(columns[0]) - before)
        return {key: _Strings(column) for key, column in zip(keys, columns, strict=True)}, counts

    def _value(self, key: str, index: int) -> str:
        value = super()._value(key, index)
        return value if key == self.image_key else decode_utf8(value.encode("utf-8", "surrogateescape"))

    def __getitem__(self, index: int) -> Record:
        if fault := self._too_many_fields(index):
            raise BadSample("row has too many fields", fault)
        return super().__getitem__(index)

    def _too_many_fields(self, index: int) -> str:
        """Where a row has more fields than columns: a caption may have been cut at its comma. Else ""."""
        indices = np.frombuffer(self._too_long, np.int64)[::3]
        i = int(np.searchsorted(indices, index))
        if i == len(indices) or indices[i] != index:
            return ""
        line, fields = self._too_long[3 * i + 1 : 3 * i + 3]
        return f"{self._table(index)!r}, line {line}: {fields} fields; put captions that contain a comma in quotes"

    def fingerprint(self) -> dict[str, Any]:
        """Number of rows, a hash of the tables (see `storage.fingerprint`), and their names and sizes."""
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
            except Exception as error:  # of many classes, by what is damaged
                raise UserError(f"{path!r} cannot be read as parquet ({first_line(error)}).") from error
            try:
                # A column without any value has a type of its own and fits the others.
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
    """The fingerprint of files: `samples`, a hash (`whole` is that of `storage.fingerprint`), names and sizes."""
    sizes = [{"name": os.path.basename(public(path)), "bytes": storage.stat(path)[0]} for path in paths]
    return {"samples": samples, "hash": storage.fingerprint(paths, whole=whole), "files": sizes}


def strip_texts(value: Any) -> list[str]:
    """The strings in a string or a list, without white space around them and without empty ones."""
    values = value if isinstance(value, list) else [value]
    return [text for item in values if isinstance(item, str) and (text := item.strip())]


class CsvTables(SourceKind):
    """`csv:PATTERN` of pairs, `csv:PATH` of labelled images."""

    pair_specs: ClassVar = {"csv:PATTERN": "tables with columns of image paths and captions, between commas, ; or tabs"}
    labelled_specs: ClassVar = {"csv:PATH": "a table with the columns path and label"}
    suffixes = (".csv", ".tsv")

    @classmethod
    def open_pairs(cls, rest: str, options: SourceOptions) -> CsvSource:
        """Open a `TableSource`."""
        return CsvSource(rest, options.image_key, options.text_keys, options.tags_key)

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        """Open the images of `labelled.read_files`."""
        return labelled.open_files(f"csv:{rest}", rest)


class ParquetTables(SourceKind):
    """`parquet:PATTERN`."""

    pair_specs: ClassVar = {"parquet:PATTERN": "tables with columns of images, or of their paths, and captions"}
    suffixes = (".parquet",)

    @classmethod
    def extras(cls, rest: str) -> tuple[str, ...]:
        """PyArrow."""
        return ("parquet",)

    @classmethod
    def open_pairs(cls, rest: str, options: SourceOptions) -> ParquetSource:
        """Open a `TableSource`."""
        return ParquetSource(rest, options.image_key, options.text_keys, options.tags_key)
