"""URLs and remote files: errors of their stores, reads limited in bytes and seconds, and which tables to trust."""

import contextlib
import errno
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

from xclip_jax.core.errors import UserError, public

# For one request of an http server: an answer that goes on without end, however slowly, ends.
SECONDS = 120
_WHOLE = "the server gives whole files only; download the file"
_PACKAGES = {
    "http": "aiohttp>=3.12", "https": "aiohttp>=3.12", "gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs",
    "abfs": "adlfs", "hf": "huggingface_hub",
}  # fmt: skip
# errno for errors that carry none, by class or HTTP status; EIO is retryable.
_NUMBERS = {
    FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, IsADirectoryError: errno.EISDIR,
    401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT,
    408: errno.EIO, 425: errno.EIO, 429: errno.EIO,
}  # fmt: skip
_NO_SECRETS = (
    "; this address has no password and no signature, and a run's files keep none: if it needs them, start the "
    "run's own command, which has the whole address, to evaluate with the set in --config.eval.final_sets"
)
_DOWNLOAD = "a table that is not on this machine may not name it; if you trust the table, download it"


# `is_global` is true for these: mapped IPv4 addresses, site-local ones, and a cloud's metadata.
_INNER = tuple(
    ipaddress.ip_network(network)
    for network in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "::/96", "fec0::/10", "192.0.0.0/24")
)


def scheme(path: str) -> str:
    """Return "https" of https://..., in lower case; "" where `path` does not begin like a URL."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    return match[1].lower() if match else ""


def file_system(path: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises:
      UserError: a sort of URL that does not exist, or whose package is not installed; the message names it.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(path, **options)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(scheme(path))
        remedy = f"pip install '{package}'" if package else "check the address, or install its file system's package"
        raise UserError(f"{path!r} cannot be opened ({error}); {remedy}.") from error


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Raise errors of a store's client as the `OSError` that a disk would have raised, with the name of the file.

    fsspec's file systems pass on the errors of their HTTP clients, which have no common class. A disk too names no file
    when it is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if getattr(error.__cause__, "status", None):  # fsspec says of any answer that there is no such file
            error = error.__cause__
        status = next((x for key in ("status", "code") if isinstance(x := getattr(error, key, None), int)), None)
        number = getattr(error, "errno", None) or _NUMBERS.get(type(error)) or _NUMBERS.get(status)
        if number is None:
            number = errno.EINVAL if isinstance(error, ValueError) or 400 <= (status or 0) < 500 else errno.EIO
        message = f"{type(error).__name__}{f', status {status}' if status else ''}: {error}"
        message = getattr(error, "strerror", None) or message
        if status in (401, 403) and public(path) == path:
            message += _NO_SECRETS
        # For a remote file without the first error, whose traceback may have its address with a password.
        raise OSError(number, public(message), public(path)) from (None if "://" in path else error)


def read(path: str, offset: int, size: int, *, table: str = "", whole: bool = False) -> bytes:
    """Return up to `size` bytes from `offset` of the file at a URL; no more than these are received.

    Args:
      path: the URL.
      offset, size: in bytes.
      whole: whether no part of the file but its beginning will be read, which any server can send.
      table: address of a remote table that names the file, see `check_named`; "" for none.

    Raises:
      OSError: the store's error; an http server that does not read at an offset (EINVAL), or that has not answered
        after `SECONDS` (ETIMEDOUT).
      UserError: see `file_system`.
    """
    if scheme(path) not in ("http", "https"):
        system, name = file_system(path)
        with os_errors(path):
            data = system.cat_file(name, start=offset, end=offset + size)
        if len(data) > size and not whole:
            raise OSError(errno.EINVAL, _WHOLE, public(path))
        return data[:size]
    from fsspec import asyn

    guarded = table and _origin(path) != _origin(table)
    system, name = file_system(path, **({"get_client": _guarded_client} if guarded else {}))
    with os_errors(path):
        try:
            return asyn.sync(system.loop, _get, system, name, offset, size, whole)
        except TimeoutError as error:
            raise OSError(errno.ETIMEDOUT, f"no complete answer in {SECONDS} s", public(path)) from error


async def _get(system: Any, url: str, offset: int, size: int, whole: bool) -> bytes:
    import aiohttp

    options = dict(system.kwargs)
    options["headers"] = options.get("headers", {}) | {
        "Accept-Encoding": "identity",
        "Range": f"bytes={offset}-{offset + size - 1}",
    }
    session = await system.set_session()
    async with session.get(system.encode_url(url), timeout=aiohttp.ClientTimeout(total=SECONDS), **options) as response:
        if response.status == 416:  # at the end of the file
            return b""
        if response.status == 404:
            raise FileNotFoundError(errno.ENOENT, "the server has no such file", public(url))
        response.raise_for_status()
        data, partial = bytearray(), response.status == 206
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > size or (partial and len(data) == size):
                response.close()  # the rest is not received
                break
        if not (partial or whole) and (offset or len(data) > size):
            raise OSError(errno.EINVAL, _WHOLE, public(url))
        return bytes(data[:size])


def check_named(path: str, table: str) -> None:
    """Check that a table which is not on this machine may name the file `path`.

    It may name files of its own server or bucket, of the usual stores, and of http servers. Http servers are asked
    only at public addresses, whatever name or redirection leads to them.

    Raises:
      PermissionError: a path of this machine, or another sort of URL, such as file://.
    """
    known = scheme(path) in _PACKAGES and "::" not in path  # which chains file systems
    if not known and _origin(path) != _origin(table):
        raise PermissionError(errno.EACCES, f"it is not on the web: {_DOWNLOAD}", public(path))


def _origin(url: str) -> list[str]:
    return url.lower().split("/", 3)[:3]


def is_public(host: str) -> bool:
    """Whether an IP address is one of the internet: not of this machine, a private network, or a cloud's metadata."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _INNER)


async def _guarded_client(**options: Any) -> Any:
    """An http client that connects only to public addresses, which it checks when it opens a socket."""
    import aiohttp

    def open_socket(address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, (host, *_) = address
        if not is_public(host):
            raise PermissionError(errno.EACCES, f"{host} is an address of the inner network: {_DOWNLOAD}")
        return socket.socket(family, kind, protocol)

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=open_socket), **options)


_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")  # one letter is a drive


def expand_home(path: str) -> str:
    """Return `path` with "~" at its start expanded, which shells leave in --config.run=~/x.

    Raises:
      UserError: a URL with one slash, which would be a local folder "gs:".
    """
    if match := _ONE_SLASH.match(path):
        scheme, rest = match[0][:-1], path[match.end() :]
        # Named as a URL, which messages show without passwords.
        written = f"'{scheme}//{rest}' is written with one slash after {scheme!r}"
        raise UserError(f"{written}; write two, or begin a local path with './'.")
    return os.path.expanduser(path)
