"""What readers share: the contracts of a source of records and of a kind of sources, and texts as files have them.

Texts come from files, tables and JSON, in encodings, in quotes, and with strings that UTF-8 cannot express.
"""

import abc
import dataclasses
import math
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, ClassVar

import numpy as np

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError

Record = dict[str, Any]

# torchvision's ImageFolder reads these, except for JPE, JFIF, GIF, AVIF and JP2.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff",
)  # fmt: skip
# Largest files that are read, in bytes.
MAX_BYTES = {"image": 1 << 28, "text": 1 << 20, "json": 1 << 24}
_MAX_LINES = 20  # a longer field more likely begins with a quote that has no partner
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
# Columns that a spec names at its end, or before the split that a probe adds.
_COLUMN = "(?:image|label)=[^/?&]+"
_COLUMNS = re.compile(rf"\?({_COLUMN}(?:&{_COLUMN})*)(?=/[^/]*$|$)")


class Source(abc.ABC):
    """Random access to image-text pairs, for several threads.

    A record has "image", encoded (bytes) or decoded (uint8 (h, w, 3)), "text", captions to draw from (list of strings,
    at least one), "tags", keywords (list of strings, may be empty), and "id", a name.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records, including those that cannot be used."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Return a record.

        Raises:
          BadSample: it cannot be used. It is listed, and a random record of the source replaces it.
        """

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return JSON that identifies the data: "samples", the number of records, "hash", and any description.

        A copy elsewhere has the same hash, and other data another one. A run stores fingerprints in data.json, and does
        not resume on data with other fingerprints.
        """

    def describe(self, index: int) -> dict[str, str]:
        """Return the record's place for people, such as {"file": its path}; must not raise."""
        return {}


class LazySequence(Sequence):
    """A sequence of `n` items that `get` reads on access.

    Attributes:
      name: returns the name of an item for people.
      sizes: returns name and size in bytes of all items, for fingerprints; None if they are unknown.
    """

    def __init__(
        self,
        n: int,
        get: Callable[[int], Any],
        name: Callable[[int], str] = "record {}".format,
        sizes: Callable[[], Iterable[tuple[str, int]]] | None = None,
    ) -> None:
        self._n = n
        self._get = get
        self.name = name
        self.sizes: Any = sizes

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Any:  # ty: ignore[incompatible-method-override] no slices
        if not 0 <= index < self._n:
            raise IndexError(index)
        return self._get(index)


def display_name(items: Any, index: int) -> str:
    """Return the name of an item for people: what a source says about the record, or a sequence's own `name`."""
    if isinstance(items, Source):
        return ", ".join(map(str, items.describe(index).values())) or f"record {index}"
    name = getattr(items, "name", None)
    return name(index) if callable(name) else f"record {index}"


def field(source: Any, key: str) -> LazySequence:
    """Return one feature of each record of a source, read on access."""
    return LazySequence(len(source), lambda i: source[i][key], lambda i: display_name(source, i))


def choose(items: Sequence[Any], positions: Sequence[int] | np.ndarray) -> LazySequence:
    """Return the items at some positions of a sequence, read on access."""
    all_sizes: Any = getattr(items, "sizes", None)

    def sizes() -> list[tuple[str, int]]:
        listed = list(all_sizes())
        return [listed[position] for position in positions]

    return LazySequence(
        len(positions),
        lambda i: items[positions[i]],
        lambda i: display_name(items, positions[i]),
        sizes if all_sizes else None,
    )


class WrappedSource(Source):
    """A source that behaves as another one, except for what a subclass changes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.source[index]

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint()

    def describe(self, index: int) -> dict[str, str]:
        return self.source.describe(index)


class MissingColumnError(UserError):
    """A source lacks a column that a key of the config names; `fault` says so, without the keys to set."""

    def __init__(self, fault: str, keys: str) -> None:
        super().__init__(f"{fault}; set {keys}.")
        self.fault = fault


def check_columns(what: str, names: Iterable[str], keys: Iterable[str]) -> None:
    """Raise an error that lists the columns of `what` if one of `keys` is not among them."""
    names = list(names)
    for key in keys:
        if key not in names:
            fault = f"{what} has no column {key!r}; its columns are {', '.join(map(repr, names))}"
            raise MissingColumnError(fault, "data.image_column, data.text_columns and data.tags_key")
        if (count := names.count(key)) > 1:
            raise UserError(f"{what} has {count} columns {key!r}; rename all but one.")


def split_columns(rest: str) -> tuple[str, dict[str, str]]:
    """Split "?image=COLUMN&label=COLUMN" off a spec; return the spec without it, and the columns that it names.

    Both are optional; in names %2F is a / and %26 is &.
    """
    match = _COLUMNS.search(rest)
    if not match:
        return rest, {}
    return rest[: match.start()] + rest[match.end() :], dict(urllib.parse.parse_qsl(match[1]))


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Keys of config group `data` that sources may use.

    Without `captions` a source has images whose captions may be missing: "text" of these records is [].
    """

    dir: str = ""
    image_column: str = "image"
    text_columns: Sequence[str] = ("text",)
    tags_key: str = ""
    captions: bool = True

    @property
    def caption_columns(self) -> list[str]:
        """Columns or features with captions and keywords; the key COLUMN/FIELD reads COLUMN."""
        keys = [*self.text_columns, *filter(None, [self.tags_key])]
        return list(dict.fromkeys(key.partition("/")[0] for key in keys))

    @property
    def columns(self) -> list[str]:
        """All columns or features that are read."""
        return list(dict.fromkeys([self.image_column, *self.caption_columns]))


class SourceKind:
    """A kind of sources, whose specs begin with its key in `sources.SOURCES` or with "package.module:Class".

    A kind overrides `open`, `open_labelled` or both, and `has_split` if its labelled items may have several splits,
    each named SPEC/SPLIT.

    Attributes:
      extras: optional dependencies of this package (setup.py) that the kind needs.
      labelled_items: "image" or "text".
      suffixes: endings of its files, to suggest a spec for a path.
    """

    extras: ClassVar[tuple[str, ...]] = ()
    labelled_items: ClassVar[str] = "image"
    suffixes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> Source:
        """Open image-text pairs; `rest` is the spec after the kind's name.

        Raises:
          UserError: names what is wrong with `rest`, an option or a file.
        """
        raise NotImplementedError

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> Any:
        """Open labelled items as `labelled.Labelled`; arguments and errors are those of `open`."""
        raise NotImplementedError

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        """Whether the source `rest` has a split of this name."""
        raise NotImplementedError


def decode_text(data: bytes) -> str:
    """Decode a text in UTF-8; raise `BadSample` for another encoding, or bytes that are no text."""
    text = decode_utf8(data)
    if _CONTROL.search(text):
        raise BadSample("caption is not text", f"begins with {data[:8]!r}")
    return text


_TO_UTF8 = "convert the file, as with iconv -f latin1 -t utf-8 FILE > NEW"


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8 or raise `BadSample`; no other encoding is tried, since wrong ones give text, too."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = max(error.start - 20, 0)
        raise BadSample("caption is not UTF-8", f"{data[start : error.end + 10]!r}; {_TO_UTF8}") from error


def read_text(path: pathlib.Path) -> str:
    """Return a text file in UTF-8, without a byte order mark; raise `UserError` for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 ({error}); {_TO_UTF8}.") from error


def open_binary(path: str, **options: Any) -> IO[bytes]:
    """Open a local or remote file to read; `options` are fsspec's for remote ones."""
    if not storage.is_remote(path):
        return open(path, "rb")
    system, name = storage.file_system(path)
    return system.open(name, "rb", **options)


def read_csv(path: str, columns: Sequence[str]) -> Any:
    """Return a local or remote CSV or TSV file in UTF-8 as a `pyarrow.Table` in which `columns` are strings.

    Bytes that are not UTF-8 are found on access. Fields are separated by tabs, semicolons or commas, as in the first
    line. With tabs, quotes are ordinary letters, since captions and titles contain single ones; otherwise a field in
    quotes may have several lines.
    """
    import pyarrow.compute  # only tables need it
    import pyarrow.csv

    with open_binary(path) as file:
        head = file.readline()
        file.seek(0)
        # Spreadsheets with decimal commas write semicolons.
        mark = "\t" if b"\t" in head else ";" if b";" in head and b"," not in head else ","
        parsing = pyarrow.csv.ParseOptions(
            delimiter=mark, quote_char=False if mark == "\t" else '"', newlines_in_values=mark != "\t"
        )
        strings = dict.fromkeys(columns, pyarrow.string())
        conversion = pyarrow.csv.ConvertOptions(check_utf8=False, column_types=strings, strings_can_be_null=False)
        place: Any = file if storage.is_remote(path) else path
        table = pyarrow.csv.read_csv(place, parse_options=parsing, convert_options=conversion)
    images = [name for name in table.column_names if name.partition("#")[0].lower().endswith(IMAGE_SUFFIXES)]
    if images and not set(columns) <= set(table.column_names):
        raise UserError(
            f"table {path!r} has the image {images[0]!r} in its first line, in place of names of columns; put a line "
            f"before it, such as {','.join(columns)}, with the table's separator."
        )
    line_end = pyarrow.compute.MatchSubstringOptions("\n")
    for name, column in zip(table.column_names, table.columns, strict=True):  # an unused one swallows rows, too
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_binary(column.type)):
            continue
        ends = pyarrow.compute.call_function("count_substring", [column], line_end)
        if (pyarrow.compute.call_function("max", [ends]).as_py() or 0) >= _MAX_LINES:
            raise UserError(
                f"table {path!r}: a field of column {name!r} has more than {_MAX_LINES} lines: a quote in it has no "
                "partner, or it is a long text; close the quote, or remove the column."
            )
    return table


def strip_texts(value: Any) -> list[str]:
    """Return the strings in a string or a list, without surrounding white space and without empty ones.

    Half of a surrogate pair, which JSON may contain and UTF-8 cannot express, becomes U+FFFD.
    """
    values = value if isinstance(value, list) else [value]
    return [text for item in values if isinstance(item, str) and (text := join_surrogates(item.strip()))]


def no_caption(columns: Mapping[str, Any]) -> BadSample:
    """Return why columns or fields, {key: value or list of values}, have no text: no value, or one of another type."""
    for key, values in columns.items():
        for value in values if isinstance(values, list) else [values]:
            missing = value is None or (isinstance(value, float) and math.isnan(value))
            if not missing and not isinstance(value, str):
                remedy = "name a column or field of strings, or convert it"
                return BadSample("caption is not text", f"{key!r} has the type {type(value).__name__}; {remedy}")
    return BadSample("caption is empty")


def json_values(record: Any, key: str) -> list[Any]:
    """Return the values at `key` of a JSON object, '/' for nested ones, also in lists; [] if it is missing."""
    values = [record]
    for part in key.split("/"):
        fields = [value.get(part) for value in values if isinstance(value, dict)]
        values = [item for field in fields for item in (field if isinstance(field, list) else [field])]
    return values


def json_strings(record: Any, key: str, *, scalars: bool = False) -> list[str]:
    """Return the strings among `json_values`, see `strip_texts`.

    With `scalars` other values than strings, such as numbers and booleans, give their texts.
    """
    values = json_values(record, key)
    if scalars:
        values = [str(value) for value in values if value is not None]
    return strip_texts(values)


def join_surrogates(text: str) -> str:
    """Return `text` with surrogate pairs joined, and single surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
