"""Texts from files, tables and JSON: encodings, quotes, and strings that UTF-8 can express."""

import re
from collections.abc import Sequence
from typing import Any

from xclip_jax.core.errors import BadSample, UserError

_MAX_LINES = 20  # a longer field more likely begins with a quote that has no partner
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")


def decode_text(data: bytes) -> str:
    """Decode a text in UTF-8; raise `BadSample` for another encoding, or bytes that are no text."""
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
        remedy = "convert the file, as with iconv -f latin1 -t utf-8 FILE > NEW"
        raise BadSample("caption is not UTF-8", f"{data[start : error.end + 10]!r}; {remedy}") from error


def read_csv(path: str, columns: Sequence[str]) -> Any:
    """Return a CSV or TSV file in UTF-8 as a `pyarrow.Table` in which `columns` are strings.

    Bytes that are not UTF-8 are found on access. Fields are separated by tabs, semicolons or commas, as in the first
    line. With tabs, quotes are ordinary letters, since captions and titles contain single ones; otherwise a field in
    quotes may have several lines.
    """
    import pyarrow.compute  # only tables need it
    import pyarrow.csv

    with open(path, "rb") as file:
        head = file.readline()
    # Spreadsheets with decimal commas write semicolons.
    mark = "\t" if b"\t" in head else ";" if b";" in head and b"," not in head else ","
    parsing = pyarrow.csv.ParseOptions(
        delimiter=mark, quote_char=False if mark == "\t" else '"', newlines_in_values=mark != "\t"
    )
    strings = dict.fromkeys(columns, pyarrow.string())
    conversion = pyarrow.csv.ConvertOptions(check_utf8=False, column_types=strings, strings_can_be_null=False)
    table = pyarrow.csv.read_csv(path, parse_options=parsing, convert_options=conversion)
    for name in set(columns) & set(table.column_names):
        line_end = pyarrow.compute.MatchSubstringOptions("\n")
        ends = pyarrow.compute.call_function("count_substring", [table[name]], line_end)
        if (pyarrow.compute.call_function("max", [ends]).as_py() or 0) >= _MAX_LINES:
            raise UserError(f"table {path!r}: a field has {_MAX_LINES} lines or more; a quote in it has no partner.")
    return table


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
