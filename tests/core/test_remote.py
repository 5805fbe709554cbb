"""Files of web servers: how much of them is received, for how long, and who may name them."""

import errno
import socket
import sys
import time

import pyarrow
import pytest

from tests.helpers import web
from xclip_jax.core import remote, storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.readers.table import Cells


def read_named(path, table=""):
    """The image that a row of a table names."""
    return Cells(pyarrow.chunked_array([[path]]), lambda _, path: (path, table)).read(0)


@pytest.fixture
def site():
    with web.serve() as site:
        yield site


def endless(chunk, pause=0.0):
    """An answer without a length and without end."""

    def answer(handler):
        site = handler.server.site
        handler.send_response(200)
        handler.end_headers()
        while not site.closed:
            handler.wfile.write(chunk)
            site.sent += len(chunk)
            time.sleep(pause)

    return answer


def test_no_more_of_an_answer_is_received_than_is_allowed(site):
    site.files["endless.jpg"] = endless(bytes(1 << 16))
    with pytest.raises(OSError, match="larger than 100,000 bytes") as error:
        storage.read(site.url("endless.jpg"), 100_000)
    assert error.value.errno == errno.EFBIG
    assert site.sent < 32 << 20  # what the buffers of two sockets hold, and no tar of memory


def test_an_answer_that_is_slow_without_end_ends(site, monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 0.3)
    site.files["slow.jpg"] = endless(b".", pause=0.02)
    with pytest.raises(OSError, match=r"no complete answer in 0\.3 s") as error:
        storage.read(site.url("slow.jpg"), 100_000)
    assert error.value.errno == errno.ETIMEDOUT
    assert len(site.requests) == 1  # not tried again
    with pytest.raises(BadSample, match=r"^file cannot be read: .*no complete answer in 0\.3 s"):
        read_named(site.url("slow.jpg"))


def test_a_part_of_a_file_is_read_and_a_server_of_whole_files_is_a_sentence(site):
    site.files["a"] = b"0123456789"
    file = storage.File(site.url("a"))
    assert (file.read(2, 3), file.read(8, 5), file.read(10, 5)) == (b"234", b"89", b"")

    def whole(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(b"0123456789")

    site.files["whole"] = whole
    assert storage.read(site.url("whole"), 10) == b"0123456789"
    with pytest.raises(OSError, match="the server gives whole files only; download the file"):
        storage.File(site.url("whole")).read(2, 3)


def test_secrets_open_a_file_and_are_not_in_the_error(site):
    site.files["a"] = b"content"
    assert storage.read(site.url("a", secret=True), 100) == b"content"
    for path, status in (("none", "no such file"), ("a", "403")):
        url = site.url(path, secret=True).replace(
            web.SIGNATURE, f"{web.SIGNATURE}-old" * (path == "a") or "5ecre7-signature"
        )
        with pytest.raises(OSError, match=status) as error:
            storage.read(url, 100)
        assert error.value.filename == site.url(f"secret/{path}")
        assert web.SIGNATURE not in str(error.value) and web.PASSWORD not in str(error.value)


def test_http_without_its_package_names_the_package(monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "http", raising=False)
    monkeypatch.setitem(sys.modules, "fsspec.implementations.http", None)
    with pytest.raises(UserError, match=r"'http://host/a.jpg' cannot be opened .*; pip install 'aiohttp>=3\.12'\.$"):
        storage.read("http://host/a.jpg", 100)


TABLE = "https://elsewhere.example/pairs/table.parquet"
NAMES = ("/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "local:///etc/passwd", "sftp://10.0.0.1/a",
         "simplecache::file:///etc/passwd", "hf://a::file:///etc/passwd", "http://[::1]/a")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_table_from_elsewhere_names_no_files_of_this_machine(name):
    with pytest.raises(BadSample, match=r"^file cannot be read: .*a table that is not on this machine may not name it"):
        read_named(name, TABLE)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "inner.example"])
def test_a_table_from_elsewhere_names_no_address_of_the_inner_network(host, site, monkeypatch):
    site.files["a.jpg"] = b"content"
    real = socket.getaddrinfo
    lookup = lambda name, *rest, **more: real("127.0.0.1" if name == "inner.example" else name, *rest, **more)  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(BadSample, match=r"is an address of the inner network"):
        read_named(f"http://{host}:{site.port}/a.jpg", TABLE)
    assert site.requests == []


def test_a_redirection_leads_no_table_to_the_inner_network(site, monkeypatch):
    """The public server is this machine's, whose address counts as public for its first request."""
    site.files["a.jpg"] = b"content"

    def away(handler):
        handler.send_response(302)
        handler.send_header("Location", f"http://127.0.0.2:{site.port}/a.jpg")
        handler.end_headers()

    site.files["public.jpg"] = away
    real = remote.is_public
    monkeypatch.setattr(remote, "is_public", lambda host: host == "127.0.0.1" or real(host))
    with pytest.raises(BadSample, match=r"127\.0\.0\.2 is an address of the inner network: a table that"):
        read_named(site.url("public.jpg"), TABLE)
    assert site.requests == ["public.jpg"]
    assert read_named(site.url("a.jpg"), TABLE)[0] == b"content"


@pytest.mark.parametrize("host", ["10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "fe80::1%eth0",
                                  "fd00:ec2::254", "::ffff:10.0.0.1", "224.0.0.1",
                                  "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::127.0.0.1",
                                  "fec0::1", "192.0.0.192"])  # fmt: skip
def test_addresses_that_are_not_public(host):
    assert not remote.is_public(host)
    assert remote.is_public("1.1.1.1") and remote.is_public("2606:4700::1111")


def test_tables_of_this_machine_name_what_they_like(site, tmp_path):
    site.files["a.jpg"] = b"content"
    (tmp_path / "a.jpg").write_bytes(b"content")
    for name in (site.url("a.jpg"), str(tmp_path / "a.jpg"), f"file://{tmp_path}/a.jpg"):
        assert read_named(name)[0] == b"content"


def test_a_table_names_files_of_its_own_server(site):
    site.files["a.jpg"] = b"content"
    assert read_named(site.url("a.jpg"), site.url("table.parquet"))[0] == b"content"
