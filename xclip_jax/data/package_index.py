"""Download a wheel from the package index that uv or pip is configured with, without running either of them.

An environment made by uv has no pip, and one made by pip has no uv.
"""

import base64
import configparser
import html.parser
import http.client
import os
import pathlib
import re
import shutil
import ssl
import sys
import tomllib
import urllib.parse
import urllib.request
from typing import Any

from xclip_jax.errors import UserError

PYPI = "https://pypi.org/simple"
_TIMEOUT = 60  # seconds without an answer


class _Links(html.parser.HTMLParser):
    """Collects the addresses that a page of a simple index (PEP 503) links to."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.addresses += [value for name, value in attrs if name == "href" and value]


def _config_files(name: str) -> list[pathlib.Path]:
    """Return paths of the user's and the system's configuration, the user's first."""
    folders = [os.environ.get("XDG_CONFIG_HOME") or "~/.config"]
    folders += (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    return [pathlib.Path(folder).expanduser() / name for folder in [*folders, "/etc"] if folder]


def _uv_index() -> str | None:
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if value := os.environ.get(variable):
            return re.sub(r"^[\w.-]+=(?=\w+://)", "", value)  # uv lets an index be named, as in name=https://...
    own = os.environ.get("UV_CONFIG_FILE")
    for path in [pathlib.Path(own)] if own else _config_files("uv/uv.toml"):
        try:
            settings: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"uv's configuration {str(path)!r} is not valid TOML: {error}") from error
        defaults = [index["url"] for index in settings.get("index", []) if index.get("default")]
        if url := next(iter(defaults), None) or settings.get("index-url") or settings.get("pip", {}).get("index-url"):
            return url
    return None


def pip_setting(name: str) -> str | None:
    """Return an option of pip, such as "index-url", from its variables and the section [global] of its files."""
    if value := os.environ.get(f"PIP_{name.upper().replace('-', '_')}"):
        return value
    own = [os.environ.get("PIP_CONFIG_FILE") or "", os.path.join(sys.prefix, "pip.conf")]
    others = [os.path.expanduser("~/.pip/pip.conf"), *_config_files("pip/pip.conf"), "/etc/pip.conf"]
    for path in filter(None, [*own, *others]):
        settings = configparser.RawConfigParser()
        try:
            settings.read(path, encoding="utf-8")  # skips a file that does not exist
        except configparser.Error as error:
            raise UserError(f"pip's configuration {str(path)!r} cannot be read: {error}") from error
        if value := settings.get("global", name, fallback=None):
            return value
    return None


def index_url() -> str:
    """Return the URL of the simple index: uv's (variables, uv.toml), else pip's (PIP_INDEX_URL, pip.conf), else PyPI's.

    Raises:
      UserError: a configuration file is malformed.
    """
    return (_uv_index() or pip_setting("index-url") or PYPI).rstrip("/")


def _without_login(url: str) -> tuple[str, str | None]:
    """Return the URL without its user and password, and these as the value of an Authorization header."""
    parts = urllib.parse.urlsplit(url)
    login, separator, host = parts.netloc.rpartition("@")
    if not separator:
        return url, None
    token = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
    return parts._replace(netloc=host).geturl(), f"Basic {token}"


def _open(url: str, login: str | None) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"Accept": "text/html, */*;q=0.1"})
    if login:
        request.add_unredirected_header("Authorization", login)  # must not reach the host of a redirect
    # Without `cert`, OpenSSL's default certificates and SSL_CERT_FILE.
    context = ssl.create_default_context(cafile=pip_setting("cert"))
    return urllib.request.urlopen(request, timeout=_TIMEOUT, context=context)


def download(wheel: str, folder: pathlib.Path) -> pathlib.Path:
    """Download the wheel with this file name from the configured index; returns its path in `folder`.

    The caller checks the content.

    Raises:
      UserError: the index cannot be reached, or does not have the wheel. The message contains no password.
    """
    index, login = _without_login(index_url())
    page = f"{index}/{re.sub(r'[-_.]+', '-', wheel.split('-')[0]).lower()}/"
    try:
        with _open(page, login) as response:
            base, links = response.url, _Links()
            links.feed(response.read().decode("utf-8"))
        addresses = [urllib.parse.urljoin(base, address) for address in links.addresses]
        address = next((a for a in addresses if urllib.parse.urlsplit(a).path.rpartition("/")[2] == wheel), None)
        if address is None:
            raise UserError(f"{page} does not list {wheel}")
        same_host = urllib.parse.urlsplit(address).netloc == urllib.parse.urlsplit(page).netloc
        with _open(urllib.parse.urldefrag(address).url, login if same_host else None) as response:
            with (folder / wheel).open("wb") as file:
                shutil.copyfileobj(response, file)
            if response.length:
                raise OSError(f"the connection ended {response.length:,} bytes early")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{page}: {error or type(error).__name__}") from error
    return folder / wheel
