"""Texts from files, tables and JSON: encodings, quotes, and strings that UTF-8 can express."""

import codecs
import csv
import itertools
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from xclip_jax.core.errors import BadSample, UserError

TO_UTF8 = "iconv -f latin1 -t utf-8 FILE > NEW"  # the remedy for most texts that are not UTF-8
_OTHER_ENCODINGS = (  # by byte order mark; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Most lines of a field in quotes; a longer one more likely begins with a quote that has no partner.
_MAX_LINES = 20
_END = "end of the table"  # appended as a last line: a field that is still open includes it
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")


def decode_text(data: bytes) -> str:
    """Decode a text: UTF-8 or, by its byte order mark, UTF-16.

    Raises:
      BadSample: the bytes have another encoding, or are not text.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            text = data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise BadSample("caption is not text", f"begins with {data[:8]!r}") from error
    else:
        text = decode_utf8(data)
    if _CONTROL.search(text):
        raise BadSample("caption is not text", f"begins with {data[:8]!r}")
    return text


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8 or raise `BadSample`; no other encoding is tried, since wrong ones give text, too."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = max(error.start - 20, 0)
        raise BadSample(
            "caption is not UTF-8", f"{data[start : error.end + 10]!r}; convert the file, as with {TO_UTF8}"
        ) from error


def check_encoding(name: str, path: str, head: bytes) -> None:
    """Raise `UserError`, which begins with `name`, if the first bytes of the file `path` mark UTF-16 or UTF-32."""
    for mark, encoding in _OTHER_ENCODINGS:
        if head.startswith(mark):
            raise UserError(
                f"{name} is {encoding} by its byte order mark; expected UTF-8. Save it as UTF-8, or convert it: "
                f"iconv -f {encoding} -t UTF-8 {path} > NEW."
            )


def _separator(head: str) -> str:
    """Return the separator of a table with this first line; spreadsheets with decimal commas write semicolons."""
    return "\t" if "\t" in head else ";" if ";" in head and "," not in head else ","


def csv_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the fields of each row of a CSV or TSV file, including the names of the columns.

    Fields are separated by tabs, by semicolons or by commas, as in the first line. With tabs, quotes are ordinary
    letters, since captions and titles contain single ones; otherwise a field in quotes may have several lines, and its
    row has the number of the last one. Empty lines are left out.

    Args:
      path: the file, in UTF-8, with or without a byte order mark; other bytes are escaped by surrogates.

    Raises:
      UserError: a quote that is not closed, or only by a quote of a later row, so that a field would contain rows;
        UTF-16 or UTF-32 by the byte order mark.
    """
    csv.field_size_limit(sys.maxsize)
    lines: list[str] = []  # lines of the row that is being read

    def read_lines(file: Iterable[str]) -> Iterator[str]:
        for line in itertools.chain(file, [_END]):
            lines.append(line)
            if len(lines) > _MAX_LINES:
                raise UserError(_about_quote(path, rows.line_num - len(lines) + 2, f"more than {_MAX_LINES} lines"))
            yield line

    long_rows = []  # first line of each row of several lines
    with open(path, "rb") as binary:
        check_encoding(f"table {path!r}", path, binary.read(4))
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        mark = _separator(file.readline())
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


def strip_texts(value: Any) -> list[str]:
    """Return the strings in a string or a list, without surrounding white space and without empty ones."""
    values = value if isinstance(value, list) else [value]
    return [text for item in values if isinstance(item, str) and (text := item.strip())]


def json_strings(record: Any, key: str) -> list[str]:
    """Return the strings at `key` of a JSON object, '/' for nested ones; [] if it is missing.

    Half of a surrogate pair, which JSON may contain and UTF-8 cannot express, becomes U+FFFD.
    """
    for part in key.split("/"):
        record = record.get(part) if isinstance(record, dict) else None
    values = record if isinstance(record, list) else [record]
    return [text for value in values if isinstance(value, str) and (text := join_surrogates(value.strip()))]


def join_surrogates(text: str) -> str:
    """Return `text` with surrogate pairs joined, and single surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
