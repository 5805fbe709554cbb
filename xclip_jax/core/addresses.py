"""Addresses as they may be shown and stored: without user names, passwords, signatures and tokens."""

import re
from collections.abc import Mapping
from typing import Any

# The bounds keep matching linear in the length of a text, which may be a caption of somebody else.
_USER = re.compile(r"""(?<![A-Za-z0-9+.-])([A-Za-z0-9+.-]{1,40})://([^\s/"]{0,2000})@""")
# A query, in http also a fragment: up to a space, a quote, closing marks before these, or a comma and a next address.
# Elsewhere than in http a ? without KEY= is a wildcard.
_QUERY = re.compile(
    r"""
    (?<![A-Za-z0-9+.-])
    (https?://[^\s"`<>?\#]*+ (?=[?\#]) | [A-Za-z0-9+.-]{1,40}://[^\s"`<>?]*+ (?=\?[\w.-]+=))
    ((?:(?!,\s{0,9}[A-Za-z][\w.+:-]{0,40}:) (?![?'"()\[\]{},.:;!\\]{0,9}(?:[\s"`<>]|$)) (?:[^\s"`<>\\]|\\(?!["'])))*)
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Columns that the name of a source or set ends in, which are no part of the address.
_COLUMNS = re.compile(r"\?(?:(?:image|text|label)=[^?#&]*(?:&|$))+$")


def public(content: Any) -> Any:
    """Return `content`, a text or JSON, without user information, query and fragment of every URL in it.

    The user of another file system than http stays where it has no password: abfs://container@account names a place. So
    do columns, ?image=COLUMN&text=COLUMN, at the end of a source or set.
    """
    if isinstance(content, str):
        return _QUERY.sub(_without_query, _USER.sub(_without_user, content)) if "://" in content else content
    if isinstance(content, Mapping):
        return {public(key): public(value) for key, value in content.items()}
    return type(content)(map(public, content)) if isinstance(content, (list, tuple)) else content


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match.groups()
    return f"{scheme}://" if scheme.lower() in ("http", "https") or ":" in user else match[0]


def _without_query(match: re.Match[str]) -> str:
    columns = _COLUMNS.search(match[2])
    return match[1] + (columns[0] if columns else "")
