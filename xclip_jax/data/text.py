"""Texts from files and JSON: encodings, and strings that UTF-8 can express."""

import codecs
import re
from typing import Any

from xclip_jax.core.errors import BadSample, UserError

TO_UTF8 = "iconv -f latin1 -t utf-8 FILE > NEW"  # the remedy for most texts that are not UTF-8
_OTHER_ENCODINGS = (  # by byte order mark; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")


def decode_text(data: bytes) -> str:
    """Decode a text: UTF-8 or, by its byte order mark, UTF-16.

    Raises:
      BadSample: the bytes are of another encoding, or not text.
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
    """Decode UTF-8. Raises `BadSample`; another encoding is not guessed, since most guesses give some text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = max(error.start - 20, 0)
        raise BadSample(
            "caption is not UTF-8", f"{data[start : error.end + 10]!r}; convert the file, as with {TO_UTF8}"
        ) from error


def check_encoding(name: str, path: str, head: bytes) -> None:
    """Raise `UserError` where the first bytes of the file `path`, which `name` names, mark UTF-16 or UTF-32."""
    for mark, encoding in _OTHER_ENCODINGS:
        if head.startswith(mark):
            raise UserError(
                f"{name} is {encoding} by its byte order mark; expected UTF-8. Save it as UTF-8, or convert it: "
                f"iconv -f {encoding} -t UTF-8 {path} > NEW."
            )


def separator(head: str) -> str:
    """Return what separates the columns of a table with this first line: tabs, semicolons or commas.

    Spreadsheets write semicolons where the comma is that of decimals.
    """
    return "\t" if "\t" in head else ";" if ";" in head and "," not in head else ","


def json_strings(record: Any, key: str) -> list[str]:
    """Return the strings at `key` of a JSON object, '/' for nested ones; [] if it is missing.

    JSON may contain half of a surrogate pair, of a letter cut in two; it becomes U+FFFD, since UTF-8 cannot express it.
    """
    for part in key.split("/"):
        record = record.get(part) if isinstance(record, dict) else None
    values = record if isinstance(record, list) else [record]
    return [text for value in values if isinstance(value, str) and (text := join_surrogates(value.strip()))]


def join_surrogates(text: str) -> str:
    """Return `text` with surrogate pairs joined and halves of them replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def first_line(error: Exception) -> str:
    """Class and first line of an error of a library, for a sentence."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
