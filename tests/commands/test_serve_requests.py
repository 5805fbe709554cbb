"""The search page under odd requests, and while its files change."""

import contextlib
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers import bad_tars, tiny
from tests.helpers.serving import served
from xclip_jax.commands.serve import COUNT, Index, make_app, make_index

pytestmark = pytest.mark.long

testclient = pytest.importorskip("starlette.testclient")

SECRET = b"the-secret-beside-the-images"
GOOD = b"/", b"/search?text=a", b"/similar/1", b"/thumbnail/1"


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    """Host and port of the served folder `images`; a secret is beside it."""
    root = tmp_path_factory.mktemp("requests")
    (root / "secret.txt").write_bytes(SECRET)
    with served(run, tiny.folder(root / "images", n=30), root / "cache") as url:
        yield "127.0.0.1", int(url.rsplit(":", 1)[1].strip("/"))


def climbing(rng):
    """A path out of the images."""
    up = rng.choice([b"../", b"..%2f", b"%2e%2e/", b"..\\", b"....//", b"%252e%252e/", b"/", b"%00/", b"%c0%ae%c0%ae/"])
    file = rng.choice([b"secret.txt", b"etc/passwd", b"proc/self/environ", b"images/001.png"])
    return rng.choice([b"/", b"/thumbnail/", b"/similar/", b"//", b"file:///"]) + up * rng.randrange(1, 12) + file


def numbers(rng):
    """An image that does not exist."""
    number = rng.choice([b"-1", b"30", b"1e3", b"0x1", b"1.0", b"9" * 18, b"9" * 5000, "٣".encode(), b"%31%00", b"", b"1/2"])
    return rng.choice([b"/similar/", b"/thumbnail/"]) + number


def odd(rng):
    """Bytes of a request, and whether it may be answered with status 200."""
    host, path, method, extra, body = b"localhost", rng.choice(GOOD), b"GET", b"", b""
    kind = rng.randrange(9)
    if kind == 0:
        others = [b"evil.example", b"127.0.0.1.evil.example", b"evil.example:80", b"localhost@evil.example", b"", b"0.0.0.0"]
        host = rng.choice([*others, b"localhost\r\nHost: evil.example", b"localhost.", b"[::1]", bytes(range(128, 200))])
    elif kind == 1:
        path = climbing(rng)
    elif kind == 2:
        path = numbers(rng)
    elif kind == 3:
        path = b"/" + rng.choice([b"a", b"%ff", b"?text=", b"?"]) * rng.choice([10, 1000, 100_000])
    elif kind == 4:
        return rng.randbytes(rng.randrange(1, 5000)) + b"\r\n\r\n", False
    elif kind == 5:
        length = rng.choice([b"4", b"-1", b"9" * 30, b"4, 5", b"4\r\nContent-Length: 5"])
        extra = b"Content-Length: " + length + b"\r\nTransfer-Encoding: " + rng.choice([b"chunked", b"x", b"\x0bchunked"]) + b"\r\n"
        body = b"0\r\n\r\nGET /secret.txt HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    elif kind == 6:
        extra = b"".join(b"X-%d: %s\r\n" % (i, rng.randbytes(20).hex().encode()) for i in range(rng.choice([100, 5000])))
    elif kind == 7:
        method = rng.choice([b"POST", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"get", b"\x00", b"PRI"])
    else:
        path = b"/search?text=" + rng.choice([b"%00", b"%ff%fe", b"%ed%a0%80", b"a" * 60_000, b"%F0%9F%A6%8A", b"&text=b"])
    whole = method + b" " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + extra + b"Connection: close\r\n\r\n" + body
    return whole[: rng.randrange(len(whole))] if rng.random() < 0.1 else whole, kind in (3, 5, 6, 8)


def answer_to(address, request):
    """Bytes of the answer; the end of what is sent ends a request that is not whole."""
    data = b""
    with socket.create_connection(address, timeout=10) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(1 << 16):
            data += part
    return data


def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_odd_requests_get_nothing_and_leave_the_server_well(address):
    rng = random.Random(0)
    page = answer_to(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert page.startswith(b"HTTP/1.1 200")
    memory = 0
    for i in range(260):
        request, may_succeed = odd(rng)
        answer = answer_to(address, request)
        status = answer[9:12]
        assert not answer or answer.startswith(b"HTTP/1.1 ") and status < b"500", (request[:200], answer[:200])
        assert may_succeed or status != b"200", (request[:200], answer[:200])
        assert SECRET not in answer and b"root:" not in answer and b"PATH=" not in answer and b"requests0" not in answer
        memory = resident() if i == 60 else memory  # by then all kinds of answers have been given
    assert resident() - memory < 16 << 20
    assert answer_to(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").split(b"\r\n\r\n")[1:] == page.split(b"\r\n\r\n")[1:]


def test_half_open_connections_do_not_delay_others(address):
    with contextlib.ExitStack() as stack:
        for i in range(300):
            connection = stack.enter_context(socket.create_connection(address, timeout=10))
            connection.sendall(b"GET /search?text=a HTTP/1.1\r\nHost: loc"[: i % 40])
        began = time.monotonic()
        assert answer_to(address, b"GET /search?text=a HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began < 2


def bomb(path):
    """A small file of 100 million pixels."""
    Image.new("1", (10_000, 10_000)).save(path, "PNG")


CHANGES = {
    "deleted": pathlib.Path.unlink,
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a bomb": bomb,
    "replaced": lambda path: shutil.copy(path.with_name("002.png"), path),
}


def test_files_change_while_they_are_served(model, tmp_path, monkeypatch):
    """A thumbnail of a lost file is one sentence without its path; another content, or a new file, waits for a start."""
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    folder = tiny.folder(tmp_path / "images", n=5)
    bomb(folder / "100.png")  # left out
    index = make_index(model, str(folder))
    client = testclient.TestClient(make_app(index), base_url="http://localhost", raise_server_exceptions=False)
    found = client.get("/search?text=a").json()
    shutil.copy(folder / "000.png", folder / "0000.png")
    for i, (name, change) in enumerate(CHANGES.items()):
        change(folder / f"00{i}.png")
        answer = client.get(f"/thumbnail/{i}")
        if name == "replaced":
            assert answer.status_code == 400 if not (folder / "002.png").is_file() else 200
        else:
            assert answer.status_code == 400, name
            assert answer.json() == {"error": f"The file of image {i}, '00{i}.png', can no longer be read."}
    assert client.get("/search?text=a").json() == found and len(found["matches"]) == 5


def test_the_best_are_those_of_a_full_sort():
    """Equal images too: the first ones of a folder come first."""
    rng = np.random.default_rng(0)
    for n in (1, COUNT - 1, COUNT, COUNT + 1, 500):
        rows = rng.integers(-2, 3, (n, 4)).astype(np.float32)
        texts = pyarrow.chunked_array([[f"/x/{i:03d}" for i in range(n)]])
        columns = {"id": texts, "text": texts, "embedding": rows}
        matches = Index(None, None, np.arange(n), columns).by_image(n // 2)
        assert [match.image for match in matches] == np.argsort(-rows @ rows[n // 2], kind="stable")[:COUNT].tolist()
        assert n == 1 or matches[0].name == f"{matches[0].image:03d}"
