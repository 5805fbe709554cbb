"""Pairs named by a table: CSV, TSV or parquet files of image paths and captions; and ArrayRecord files of examples."""

import csv
import itertools
import multiprocessing
import os
import pathlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from xclip_jax import storage
from xclip_jax.data import tar_index
from xclip_jax.errors import BadSample, UserError

Record = dict[str, Any]

# A field in quotes may run over so many lines; above, two quotes without partners are likelier.
_MAX_LINES = 20
_END = "end of the table"  # read behind its last line: a field that is still open swallows it
# Bytes up to which a table counts whole in its card.
_WHOLE = 1 << 30


class _Strings:
    """Many strings in two arrays; a list of them would take several times the memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._data = b"".join(parts)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._data[start : int(self._ends[index])].decode("utf-8", "surrogatepass")


def _check_columns(path: str, there: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [key for key in wanted if key not in there]
    if missing:
        raise UserError(
            f"table {path!r} has no column {missing[0]!r} but {', '.join(map(repr, there))}; set data.image_key, "
            "data.text_keys and data.tags_key."
        )


def read_rows(path: str, *, errors: str = "replace") -> Iterator[list[str]]:
    """Yield the rows of a CSV or TSV file, the one that names the columns first, without empty lines.

    Commas part the columns, or tabs if the first line has one. Quotes mean nothing between tabs: captions and titles
    hold single ones. Between commas a field in quotes may run over several lines.

    Args:
      path: the file, in UTF-8, with or without a byte order mark.
      errors: what becomes of bytes that are not UTF-8, "replace" or "strict".

    Raises:
      UserError: a quote that is never closed, or that only one of a later row seems to close, so that rows would be
        lost in a field; with "strict" text that is not UTF-8.
    """
    csv.field_size_limit(sys.maxsize)
    lines: list[str] = []  # of the row that is being read

    def read_lines(file: Iterable[str]) -> Iterator[str]:
        for line in itertools.chain(file, [_END]):
            lines.append(line)
            if len(lines) > _MAX_LINES:
                raise UserError(_about_quote(path, rows.line_num - len(lines) + 2, f"more than {_MAX_LINES} lines"))
            yield line

    spread = []
    with open(path, encoding="utf-8-sig", errors=errors, newline="") as file:
        try:
            tabs = "\t" in file.readline()
            file.seek(0)
            quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
            rows = csv.reader(read_lines(file), delimiter="\t" if tabs else ",", quoting=quoting)
            for row in rows:
                if len(lines) > 1:
                    first = rows.line_num - len(lines) + 1
                    if not _is_closed(lines):
                        what = "all rows behind it" if lines[-1] == _END else "rows behind it"
                        raise UserError(_about_quote(path, first, what))
                    spread.append(first)
                if row and lines != [_END]:
                    yield row
                lines.clear()
        except UnicodeDecodeError as error:
            raise UserError(f"table {path!r} is not UTF-8 ({error}); save it in that encoding.") from error
    if spread and multiprocessing.parent_process() is None:
        warnings.warn(
            f"table {path!r} has {len(spread):,} rows of several lines, the first at line {spread[0]}; if that is not "
            "meant, a quote there has no partner and rows are lost.",
            stacklevel=2,
        )


def _is_closed(lines: Sequence[str]) -> bool:
    """Whether the quotes of a row of several lines are in pairs, each around a whole field."""
    try:
        return lines[-1] != _END and len(list(csv.reader(lines, strict=True))) == 1
    except csv.Error:
        return False


def _about_quote(path: str, line: int, what: str) -> str:
    return (
        f"table {path!r}, line {line}: a quote opens a field that swallows {what}; double a quote that is part of the "
        'text ("" in a quoted field), or write the table with tabs, between which quotes mean nothing.'
    )


def _read_csv(path: str, wanted: Sequence[str]) -> Iterator[list[str]]:
    """Yield the columns `wanted` of each row."""
    rows = read_rows(path)
    names = next(rows, [])
    _check_columns(path, names, wanted)
    columns = [names.index(key) for key in wanted]
    for row in rows:
        yield [row[i] if i < len(row) else "" for i in columns]


class TableSource:
    """Rows of CSV or parquet files: a path or URL of an image, or its bytes, and captions."""

    def __init__(self, kind: str, pattern: str, image_key: str, text_keys: Sequence[str], tags_key: str = "") -> None:
        """Reads the columns that are wanted into memory.

        Args:
          kind: "csv" (commas or tabs, the first line names the columns) or "parquet".
          pattern: the tables, see `storage.expand`.
          image_key: column of paths, taken from the table's folder where they are not absolute; in parquet also of
            bytes, or of {"bytes", "path"} as Hugging Face writes them.
          text_keys: columns of captions, one of which is drawn each time; in parquet also lists.
          tags_key: column of keywords, in CSV parted by commas; or "".

        Raises:
          UserError: no such file or column, no row.
        """
        self._arguments = (kind, pattern, image_key, text_keys, tags_key)
        self.text_keys, self.image_key, self.tags_key = tuple(text_keys), image_key, tags_key
        self.tables = storage.expand(pattern)
        wanted = list(dict.fromkeys([image_key, *text_keys, *filter(None, [tags_key])]))
        read = {"csv": self._open_csv, "parquet": self._open_parquet}[kind]
        self._columns, counts = read(wanted)
        self._ends = np.cumsum(counts)
        if not len(self):
            raise UserError(f"{pattern!r} has no row behind its head line; name a table of paths and captions.")

    def _open_csv(self, wanted: list[str]) -> tuple[dict[str, Any], list[int]]:
        columns, counts = [[] for _ in wanted], []
        for path in self.tables:
            before = len(columns[0])
            for row in _read_csv(path, wanted):
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
            counts.append(len(columns[0]) - before)
        return {key: _Strings(column) for key, column in zip(wanted, columns, strict=True)}, counts

    def _open_parquet(self, wanted: list[str]) -> tuple[dict[str, Any], list[int]]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError("parquet tables need pyarrow: pip install 'xclip_jax[parquet]'.") from error
        tables, schema = [], pyarrow.schema([])
        for path in self.tables:
            try:
                _check_columns(path, pyarrow.parquet.read_schema(path).names, wanted)
                tables.append(pyarrow.parquet.read_table(path, columns=wanted))
            except UserError:
                raise
            except Exception as error:  # of many classes, by what is damaged
                raise UserError(f"{path!r} cannot be read as parquet ({first_line(error)}).") from error
            try:
                # A column without any value has a type of its own and fits the others.
                schema = pyarrow.unify_schemas([schema, tables[-1].schema], promote_options="default")
            except pyarrow.ArrowException as error:
                raise UserError(
                    f"a column of {path!r} has another type than in the tables before it ({first_line(error)}); name "
                    "tables of one schema, or make each a source of its own."
                ) from error
        columns = pyarrow.concat_tables(tables, promote_options="default").columns
        return dict(zip(wanted, columns, strict=True)), [table.num_rows for table in tables]

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """A worker process reads the tables itself."""
        return TableSource, self._arguments

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _value(self, key: str, index: int) -> Any:
        value = self._columns[key][index]
        try:
            return value if isinstance(value, str) else value.as_py()
        except UnicodeDecodeError as error:
            raise BadSample("text is not UTF-8", str(error)) from error

    def _path(self, index: int, value: str) -> str:
        if storage.is_remote(value):
            return value
        table = self.tables[int(np.searchsorted(self._ends, index, side="right"))]
        return str(pathlib.Path(table).parent / value)

    def where(self, index: int) -> dict[str, str]:
        """Path of the image, or the row's number."""
        try:
            value = self._value(self.image_key, index)
        except BadSample:
            value = None
        return {"file": self._path(index, value)} if isinstance(value, str) else {"row": str(index)}

    def card(self) -> dict[str, Any]:
        """Number of rows, a hash of the tables (see `storage.fingerprint`), and their names and sizes."""
        return _card(len(self), self.tables, whole=_WHOLE if self._arguments[0] == "csv" else 0)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, name = self._value(self.image_key, index), str(index)
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image:
            name = self._path(index, image)
            try:
                image = storage.read(name, tar_index.MAX_BYTES["image"])
            except (OSError, ValueError) as error:  # a ValueError for a zero byte, or a URL that cannot be opened
                raise storage.unreadable(error) from error
        if not (image and isinstance(image, bytes)):
            raise BadSample("image file is empty" if name != str(index) else "no image in the row")
        text = [caption for key in self.text_keys for caption in _strings(self._value(key, index))]
        if not text:
            raise BadSample("caption is empty")
        tags = self._value(self.tags_key, index) if self.tags_key else []
        return {
            "image": image,
            "text": text,
            "tags": _strings(tags.split(",") if isinstance(tags, str) else tags),
            "id": name,
        }


def _card(samples: int, paths: Sequence[str], whole: int = 0) -> dict[str, Any]:
    sizes = [{"name": os.path.basename(path), "bytes": storage.stat(path)[0]} for path in paths]
    return {"samples": samples, "hash": storage.fingerprint(paths, whole=whole), "files": sizes}


def first_line(error: Exception) -> str:
    """Class and first line of an error of a library, for a sentence."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for item in values if isinstance(item, str) and (text := item.strip())]


class ArrayRecordSource:
    """ArrayRecord files of serialized tf.train.Example, the format that TensorFlow's users write; read without it."""

    def __init__(self, pattern: str, image_key: str, text_keys: Sequence[str], tags_key: str = "") -> None:
        """Opens the files.

        Args:
          pattern: see `storage.expand`.
          image_key: feature with the encoded image.
          text_keys: features with captions.
          tags_key: feature with keywords, or "".

        Raises:
          UserError: no such file.
        """
        from array_record.python import array_record_data_source

        self.files = storage.expand(pattern)
        self.image_key, self.text_keys, self.tags_key = image_key, tuple(text_keys), tags_key
        try:
            self._data = array_record_data_source.ArrayRecordDataSource(self.files)
        except Exception as error:  # the library raises bare errors of C++
            raise UserError(f"{pattern!r} cannot be read as ArrayRecord files ({error}).") from error

    def __len__(self) -> int:
        return len(self._data)

    def where(self, index: int) -> dict[str, str]:
        """Number of the record over all files."""
        return {"row": str(index)}

    def __getitem__(self, index: int) -> Record:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            example = tf_example_pb2.Example.FromString(self._data[index])  # ty: ignore[missing-attribute]
        except Exception as error:
            raise BadSample("record cannot be read", str(error)) from error
        features = {key: list(value.bytes_list.value) for key, value in example.features.feature.items()}
        if not features.get(self.image_key):
            raise BadSample("no image in the record", f"it has {', '.join(sorted(features))}")

        def strings(keys: Sequence[str]) -> list[str]:
            return _strings([value.decode("utf-8", "replace") for key in keys for value in features.get(key, ())])

        text = strings(self.text_keys)
        if not text:
            raise BadSample("caption is empty")
        tags = strings([self.tags_key])
        return {"image": features[self.image_key][0], "text": text, "tags": tags, "id": str(index)}

    def card(self) -> dict[str, Any]:
        """Number of records, a hash of the files (see `storage.fingerprint`), and their names and sizes."""
        return _card(len(self), self.files)
