"""Pairs named by a table: CSV, TSV or parquet files of image paths and captions; and ArrayRecord files of examples."""

import csv
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xclip_jax.data import files
from xclip_jax.errors import BadSample, UserError

Record = dict[str, Any]


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


def _read_csv(path: str, wanted: Sequence[str]) -> Iterator[list[str]]:
    """The columns `wanted` of each row; the first line names the columns, tabs or commas part them."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        head = file.readline()
        file.seek(0)
        rows = csv.reader(file, delimiter="\t" if "\t" in head else ",")
        names = next(rows, [])
        _check_columns(path, names, wanted)
        columns = [names.index(key) for key in wanted]
        for row in rows:
            if row:
                yield [row[i] if i < len(row) else "" for i in columns]


class TableSource:
    """Rows of CSV or parquet files: a path or URL of an image, or its bytes, and captions."""

    def __init__(self, kind: str, pattern: str, image_key: str, text_keys: Sequence[str], tags_key: str = "") -> None:
        """Reads the columns that are wanted into memory.

        Args:
          kind: "csv" (commas or tabs, the first line names the columns) or "parquet".
          pattern: the tables, see `files.expand`.
          image_key: column of paths, taken from the table's folder where they are not absolute; in parquet also of
            bytes, or of {"bytes", "path"} as Hugging Face writes them.
          text_keys: columns of captions, one of which is drawn each time; in parquet also lists.
          tags_key: column of keywords, in CSV parted by commas; or "".

        Raises:
          UserError: no such file or column, no row.
        """
        self._arguments = (kind, pattern, image_key, text_keys, tags_key)
        self.text_keys, self.image_key, self.tags_key = tuple(text_keys), image_key, tags_key
        self.tables = files.expand(pattern)
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
        tables = []
        for path in self.tables:
            _check_columns(path, pyarrow.parquet.read_schema(path).names, wanted)
            tables.append(pyarrow.parquet.read_table(path, columns=wanted))
        return dict(zip(wanted, pyarrow.concat_tables(tables).columns, strict=True)), [t.num_rows for t in tables]

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """A worker process reads the tables itself."""
        return TableSource, self._arguments

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _value(self, key: str, index: int) -> Any:
        value = self._columns[key][index]
        return value if isinstance(value, str) else value.as_py()

    def _path(self, index: int, value: str) -> str:
        if files.is_remote(value):
            return value
        table = self.tables[int(np.searchsorted(self._ends, index, side="right"))]
        return str(pathlib.Path(table).parent / value)

    def where(self, index: int) -> dict[str, str]:
        """Path of the image, or the row's number."""
        value = self._value(self.image_key, index)
        return {"file": self._path(index, value)} if isinstance(value, str) else {"row": str(index)}

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, name = self._value(self.image_key, index), str(index)
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image:
            name = self._path(index, image)
            try:
                image = files.File(name).read(0, files.stat(name)[0])
            except OSError as error:
                raise BadSample("file cannot be read", str(error)) from error
        if not image:
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


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for item in values if isinstance(item, str) and (text := item.strip())]


class ArrayRecordSource:
    """ArrayRecord files of serialized tf.train.Example, the format that TensorFlow's users write; read without it."""

    def __init__(self, pattern: str, image_key: str, text_keys: Sequence[str], tags_key: str = "") -> None:
        """Opens the files.

        Args:
          pattern: see `files.expand`.
          image_key: feature with the encoded image.
          text_keys: features with captions.
          tags_key: feature with keywords, or "".

        Raises:
          UserError: no such file.
        """
        from array_record.python import array_record_data_source

        self.files = files.expand(pattern)
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
            example = tf_example_pb2.Example.FromString(self._data[index])
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
        """Names and sizes of the files, and the number of records."""
        found = [{"name": os.path.basename(path), "bytes": files.stat(path)[0]} for path in self.files]
        return {"samples": len(self), "hash": "", "files": found}
