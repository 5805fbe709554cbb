"""Base classes of sources and of kinds of sources, and helpers to decode text from files, tables and JSON."""

import abc
import codecs
import dataclasses
import errno
import math
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core import storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample, UserError

__all__ = ["IMAGE_SUFFIXES", "MAX_BYTES", "Record", "Source", "SourceKind", "SourceOptions", "json_strings"]

Record = dict[str, Any]

# Those of torchvision's ImageFolder, and JPE, JFIF, GIF, AVIF and JP2.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff",
)  # fmt: skip
MAX_BYTES = {"image": 1 << 28, "text": 1 << 20, "json": 1 << 24}  # larger files are refused
_REQUEST = 8 << 20  # most bytes of one request
_MAX_LINES = 20  # a longer field more likely begins with an unpaired quote
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
# Columns are named at a spec's end, or before the split that a probe adds.
_COLUMN = "(?:image|label)=[^/?&]+"
_COLUMNS = re.compile(rf"\?({_COLUMN}(?:&{_COLUMN})*)(?=/[^/]*$|$)")


class Source(abc.ABC):
    """Random access to image-text pairs, for several threads.

    A record has "image", encoded (bytes) or decoded (uint8 (h, w, 3)), "text", captions to draw from (list of strings,
    at least one), "negatives", texts in `data.negative_columns`, and "tags", the field of `data.caption_transform`
    (lists of strings, may be empty), "id", a name, and any vectors that terms of the objective read, see
    `Term.columns`. With "columns", the numbers of the captions' columns in `SourceOptions.text_columns`, these may
    have weights.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records, including bad ones."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Return a record, or raise `BadSample`: it is listed, and a random record of the source replaces it."""

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return JSON that identifies the data: "samples", the number of records, "hash", and any description.

        Copies share a hash, and other data has another one. A run stores fingerprints in data.json, and does not resume
        on data with other fingerprints.
        """

    def describe(self, index: int) -> dict[str, str]:
        """Return a human-readable place of the record, such as {"file": its path}; must not raise."""
        return {}


@dataclasses.dataclass(eq=False)
class LazySequence(Sequence):
    """A sequence of `n` items that `get` reads on access."""

    n: int
    get: Callable[[int], Any]
    name: Callable[[int], str] = "record {}".format  # of the item at an index, for humans
    sizes: Any = None  # function that lists name and size in bytes of all items for fingerprints; None if unknown

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:  # ty: ignore[incompatible-method-override] no slices
        return self.get(range(self.n)[index])


def display_name(items: Any, index: int) -> str:
    """Return a human-readable name of an item, by the source's `describe` or the sequence's `name`."""
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
    """A source that delegates to another one; subclasses override the rest."""

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


def check_columns(source: str, names: Iterable[str], keys: Iterable[str]) -> None:
    """Raise `UserError` unless each of `keys` occurs once among the column `names` of `source`."""
    names = list(names)
    for key in keys:
        count = names.count(key)
        if count != 1:
            columns = f"{count} columns" if count else "no column"
            raise UserError(
                f"{source} has {columns} {key!r}; its columns are {', '.join(map(repr, names))}; name its columns, by "
                "data.image_column and data.text_columns, small:pairs=SOURCE,image=COLUMN,text=COLUMN, "
                "SOURCE?image=COLUMN&label=COLUMN or retrieval/SOURCE?image=COLUMN&text=COLUMN."
            )


def split_columns(rest: str) -> tuple[str, dict[str, str]]:
    """Split the optional "?image=COLUMN&label=COLUMN" off a spec; return the remaining spec, and the columns.

    In names %2F is a / and %26 is &.
    """
    match = _COLUMNS.search(rest)
    if not match:
        return rest, {}
    return rest[: match.start()] + rest[match.end() :], dict(urllib.parse.parse_qsl(match[1].replace("+", "%2B")))


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Keys of config group `data` that sources may use.

    Without `captions`, captions may be missing; "text" of such a record is [].
    """

    dir: str = ""
    image_column: str = "image"
    text_columns: Sequence[str] = ("text",)
    tags_key: str = ""
    captions: bool = True
    negative_columns: Sequence[str] = ()

    @property
    def caption_columns(self) -> list[str]:
        """Columns or features with texts and tags; COLUMN/FIELD reads COLUMN."""
        keys = [*self.text_columns, *self.negative_columns, *filter(None, [self.tags_key])]
        return list(dict.fromkeys(key.partition("/")[0] for key in keys))

    @property
    def columns(self) -> list[str]:
        """All columns or features to read."""
        return list(dict.fromkeys([self.image_column, *self.caption_columns]))


class SourceKind:
    """A kind of sources. Its specs begin with its key in `sources.SOURCES`, or with "package.module:Class".

    A kind overrides `open`, `open_labelled` or both, and `has_split` if its labelled items may have several splits,
    named SPEC/SPLIT.

    Attributes:
      extras: required optional dependencies of this package (setup.py).
      labelled_items: "image" or "text".
      suffixes: endings of its files, to suggest a spec for a path.
    """

    extras: ClassVar[tuple[str, ...]] = ()
    labelled_items: ClassVar[str] = "image"
    suffixes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> Source:
        """Open image-text pairs; `rest` is the spec after the kind's name. `UserError` if it or a file is wrong."""
        raise NotImplementedError

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> Any:
        """Open labelled items as `labelled.Labelled`; see `open` for arguments and errors."""
        raise NotImplementedError

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        """Whether the source `rest` has a split of this name."""
        return False


def _begins_as_utf16(data: bytes) -> bool:
    return data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or 0 in data[:2]


def _not_utf8(data: bytes) -> str:
    """Return the fault of bytes other than UTF-8, and the remedy."""
    is_utf16 = _begins_as_utf16(data)
    name = "utf-16" if is_utf16 else "latin1"
    return f"{'UTF-16, ' * is_utf16}not UTF-8; convert the file, as with iconv -f {name} -t utf-8 FILE > NEW"


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8 or raise `BadSample`; other encodings are not tried, since wrong ones also give text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = max(error.start - 20, 0)
        raise BadSample("caption is not UTF-8", f"{data[start : error.end + 10]!r} is {_not_utf8(data)}") from error


def read_text(path: pathlib.Path) -> str:
    """Return a text file in UTF-8, without a byte order mark; raise `UserError` for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is {_not_utf8(error.object)} ({error}).") from error


def open_binary(path: str) -> Any:
    """Open a local or remote file for reading; a remote one as `storage.File`, in requests of bounded size."""
    if not storage.is_remote(path):
        if not os.path.isfile(path) and os.path.exists(path):  # opening a named pipe would wait for a writer
            raise OSError(errno.EINVAL, "not a regular file", path)
        return open(path, "rb")
    import fsspec.spec  # only remote files need it

    file = storage.File(path)

    class Remote(fsspec.spec.AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            return b"".join(file.read(i, min(_REQUEST, end - i)) for i in range(start, end, _REQUEST))

    return Remote(*storage.file_system(path), block_size=_REQUEST, size=storage.remote_info(path)["size"])


def read_csv(path: str, columns: Sequence[str]) -> Any:
    """Return a local or remote CSV or TSV file in UTF-8 as a `pyarrow.Table` in which `columns` are strings.

    Bytes invalid in UTF-8 are found on access. The first line decides between tabs, semicolons and commas. With tabs,
    quotes are ordinary letters, since captions and titles contain unpaired ones; else a field may have several lines.
    """
    import pyarrow.compute  # only tables need it
    import pyarrow.csv

    with open_binary(path) as file:
        head = file.readline()
        file.seek(0)
        if _begins_as_utf16(head):
            raise UserError(f"table {path!r} is {_not_utf8(head)}.")
        mark = next((mark for mark in "\t,;" if mark.encode() in head), ",")
        quote = False if mark == "\t" else '"'
        parsing = pyarrow.csv.ParseOptions(delimiter=mark, quote_char=quote, newlines_in_values=bool(quote))
        strings = dict.fromkeys(columns, pyarrow.string())
        conversion = pyarrow.csv.ConvertOptions(check_utf8=False, column_types=strings, strings_can_be_null=False)
        place: Any = file if storage.is_remote(path) else path
        try:
            table = pyarrow.csv.read_csv(place, parse_options=parsing, convert_options=conversion)
        except pyarrow.ArrowInvalid as error:
            if "straddl" not in str(error):  # a row does not end within two blocks
                raise
            fault = "a row is longer than a megabyte: a field is a long text, or a quote in it is unpaired"
            raise UserError(f"table {path!r}: {fault}; close the quote, or shorten the field.") from error
    line_end = pyarrow.compute.MatchSubstringOptions("\n")
    for name, column in zip(table.column_names, table.columns, strict=True):  # unused ones also swallow rows
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_binary(column.type)):
            continue
        ends = pyarrow.compute.call_function("count_substring", [column], line_end).to_numpy()
        if np.max(ends, initial=0) >= _MAX_LINES:
            raise UserError(
                f"table {path!r}: a field of column {name!r} has more than {_MAX_LINES} lines: it is a long text, or a "
                "quote in it is unpaired; close the quote, or remove the column."
            )
        if ends.any():
            fields = f"fields of column {name!r} with several lines: {np.count_nonzero(ends):,}"
            first = f"the first in row {np.argmax(ends > 0)}"
            log0(f"WARNING: table {path!r}: {fields}, {first}; if a quote there is unpaired, rows are lost")
    return table


def strip_texts(values: Iterable[Any]) -> list[str]:
    """Return the non-empty strings among `values`, see `clean_text`."""
    texts = [clean_text(item) for item in values if isinstance(item, str)]
    return [text for text in texts if text]


def clean_text(text: str) -> str:
    """Strip a byte order mark and white space, see also `join_surrogates`; `BadSample` for control characters."""
    if len(text) > MAX_BYTES["text"]:
        raise BadSample("caption too large", f"{len(text):,} letters; at most {MAX_BYTES['text']:,}")
    if _CONTROL.search(text):
        raise BadSample("caption is not text", f"begins with {text[:8]!r}")
    return join_surrogates(text.removeprefix("\ufeff").strip())


def split_lines(data: bytes) -> list[str]:
    """Return the non-empty lines of a text in UTF-8, see `strip_texts`."""
    # str.splitlines() would also cut at letters of damaged texts, such as U+0085.
    return strip_texts(re.split(r"[\r\n]+", decode_utf8(data)))


def pair(
    image: Any,
    name: str,
    options: SourceOptions,
    read: Callable[[str], list[Any]],
    read_other: Callable[[str], list[Any]] | None = None,
) -> Record:
    """Return a record with "id" `name`, whose texts are the strings that `read` returns for each key of `options`.

    `read_other` is for keywords and negatives, by default `read`; a single string of keywords is split at commas.
    `BadSample` for unreadable texts or no caption, if `options` require captions; else the record has no texts.
    """
    read_other = read_other or read
    try:
        columns = {key: read(key) for key in options.text_columns}
        texts = {key: strip_texts(values) for key, values in columns.items()}
        if options.captions and not any(texts.values()):
            raise _no_caption(columns)
        tags = strip_texts(read_other(options.tags_key)) if options.tags_key else []
        tags = strip_texts(tags[0].split(",")) if len(tags) == 1 else tags
        negatives = [wrong for key in options.negative_columns for wrong in strip_texts(read_other(key))]
    except BadSample:
        if options.captions:
            raise
        texts, tags, negatives = {}, [], []
    text = [caption for captions in texts.values() for caption in captions]
    numbers = [number for number, captions in enumerate(texts.values()) for _ in captions]
    return {"image": image, "text": text, "columns": numbers, "negatives": negatives, "tags": tags, "id": name}


def _no_caption(columns: Mapping[str, list[Any]]) -> BadSample:
    """Return the reason why the values of columns or fields contain no text."""
    for key, values in columns.items():
        for value in values:
            missing = value is None or (isinstance(value, float) and math.isnan(value))
            if not missing and not isinstance(value, str):
                remedy = "name a column or field of strings, or convert it"
                return BadSample("caption is not text", f"{key!r} has the type {type(value).__name__}; {remedy}")
    return BadSample("caption is empty")


def json_values(record: Any, key: str) -> list[Any]:
    """Return the values at `key` of a JSON object, '/' for nested ones, also in lists; [] if there are none."""
    values = [record]
    for part in key.split("/"):
        fields = [value.get(part) for value in values if isinstance(value, dict)]
        values = [item for field in fields for item in (field if isinstance(field, list) else [field])]
    return values


def json_strings(record: Any, key: str, *, scalars: bool = False) -> list[str]:
    """Return the strings among `json_values`, see `strip_texts`; with `scalars`, numbers and booleans as text, too."""
    values = json_values(record, key)
    if scalars:
        values = [str(value) for value in values if value is not None]
    return strip_texts(values)


def join_surrogates(text: str) -> str:
    """Join surrogate pairs, and replace single surrogates, which JSON may contain and UTF-8 cannot, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
