"""Requests that are refused because a web page of another origin makes a visitor's browser send them."""

import ipaddress
import socket
import urllib.parse

from starlette.datastructures import Headers


def machine_names() -> set[str]:
    """Return the names of this machine."""
    name = socket.gethostname().lower()
    first = name.partition(".")[0]
    return {"localhost", name, first, f"{first}.local", socket.getfqdn().lower()}


def fault(headers: Headers, path: str, names: set[str]) -> str:
    """Return why a request is refused, or "".

    A page of another site may send requests, but for browsers they have its origin; and a name of its own may lead to
    this machine, so a host must be an address or one of `names`.
    """
    host = headers.get("host", "")
    if not _is_here(host, names):
        return f"This server is not called {host[:80]!r}; use its address, or a name of its machine."
    site, origin = headers.get("sec-fetch-site", ""), headers.get("origin", "")
    if site:  # from browsers, if the connection is local or encrypted
        foreign = site not in ("same-origin", "none") and path != "/"  # a link to the page is no harm
    else:
        foreign = bool(origin) and origin.partition("://")[2] != host
    return "Requests from pages of other sites are refused." if foreign else ""


def _is_here(host: str, names: set[str]) -> bool:
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name.lower().rstrip(".") in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
