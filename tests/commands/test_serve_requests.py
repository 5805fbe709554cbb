"""The search page under odd requests, while its files change, and as it is stopped."""

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
import pyarrow
import pytest
from PIL import Image

from tests.helpers import tiny
from tests.helpers.serving import served
from xclip_jax.commands.serve import COUNT, Index, make_app, make_index

pytestmark = pytest.mark.long

testclient = pytest.importorskip("starlette.testclient")

SECRET = b"the-secret-beside-the-images"
GOOD = b"/", b"/search?text=a", b"/similar/1", b"/thumbnail/1"
# One list for each kind of odd request; the kinds that are answered with status 200 are named in `odd`.
HOSTS = (b"evil.example", b"127.0.0.1.evil.example", b"evil.example:80", b"localhost@evil.example", b"", b"0.0.0.0",
         b"localhost\r\nHost: evil.example", b"localhost.", b"[::1]", bytes(range(128, 200)))  # fmt: skip
CLIMBS = b"../", b"..%2f", b"%2e%2e/", b"..\\", b"....//", b"%252e%252e/", b"/", b"%00/", b"%c0%ae%c0%ae/"
FILES = b"secret.txt", b"etc/passwd", b"proc/self/environ", b"images/001.png"
NUMBERS = (b"-1", b"30", b"1e3", b"0x1", b"1.0", b"9" * 18, b"9" * 5000, "٣".encode(), b"%31%00", b"", b"1/2")
LENGTHS = b"4", b"-1", b"9" * 30, b"4, 5", b"4\r\nContent-Length: 5"
METHODS = b"POST", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"get", b"\x00", b"PRI"
TEXTS = b"%00", b"%ff%fe", b"%ed%a0%80", b"a" * 60_000, b"%F0%9F%A6%8A", b"&text=b"


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    """Host and port of the served folder `images`; a secret is beside it."""
    root = tmp_path_factory.mktemp("requests")
    (root / "secret.txt").write_bytes(SECRET)
    with served(run, tiny.folder(root / "images", n=30), root / "cache") as url:
        yield "127.0.0.1", int(url.rsplit(":", 1)[1].strip("/"))


def odd(rng):
    """Return the bytes of an odd request, and whether status 200 is a right answer."""
    host, path, method, extra, body = b"localhost", rng.choice(GOOD), b"GET", b"", b""
    kind = rng.choice(["host", "path", "number", "long", "garbage", "length", "headers", "method", "text"])
    if kind == "host":
        host = rng.choice(HOSTS)
    elif kind == "path":
        start = rng.choice([b"/", b"/thumbnail/", b"/similar/", b"//", b"file:///"])
        path = start + rng.choice(CLIMBS) * rng.randrange(1, 12) + rng.choice(FILES)
    elif kind == "number":
        path = rng.choice([b"/similar/", b"/thumbnail/"]) + rng.choice(NUMBERS)
    elif kind == "long":
        path = b"/" + rng.choice([b"a", b"%ff", b"?text=", b"?"]) * rng.choice([10, 1000, 100_000])
    elif kind == "garbage":
        return rng.randbytes(rng.randrange(1, 5000)) + b"\r\n\r\n", False
    elif kind == "length":
        coding = rng.choice([b"chunked", b"x", b"\x0bchunked"])
        extra = b"Content-Length: " + rng.choice(LENGTHS) + b"\r\nTransfer-Encoding: " + coding + b"\r\n"
        body = b"0\r\n\r\nGET /secret.txt HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    elif kind == "headers":
        extra = b"".join(
            b"X-%d: %s\r\n" % (i, rng.randbytes(20).hex().encode()) for i in range(rng.choice([100, 5000]))
        )
    elif kind == "method":
        method = rng.choice(METHODS)
    else:
        path = b"/search?text=" + rng.choice(TEXTS)
    whole = method + b" " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + extra + b"Connection: close\r\n\r\n" + body
    may_succeed = kind in ("long", "length", "headers", "text")
    return whole[: rng.randrange(len(whole))] if rng.random() < 0.1 else whole, may_succeed


def answer_to(address, request, patience=10.0):
    """Return the bytes of the answer; the server waits for the rest of a request that is not whole."""
    data = b""
    with (
        socket.create_connection(address, timeout=patience) as connection,
        contextlib.suppress(ConnectionError, TimeoutError),
    ):
        connection.sendall(request)
        while part := connection.recv(1 << 16):
            data += part
    return data


def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_odd_requests_get_nothing_and_leave_the_server_well(address):
    rng = random.Random(0)
    whole = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    page = answer_to(address, whole)
    assert page.startswith(b"HTTP/1.1 200")
    memory, answered = 0, 0
    for i in range(260):
        request, may_succeed = odd(rng)
        answer = answer_to(address, request, patience=0.2)
        answered += bool(answer)
        status = answer[9:12]
        assert not answer or (answer.startswith(b"HTTP/1.1 ") and status < b"500"), (request[:200], answer[:200])
        assert may_succeed or status != b"200", (request[:200], answer[:200])
        assert not any(secret in answer for secret in (SECRET, b"root:", b"PATH=", b"requests0"))
        memory = resident() if i == 60 else memory  # by then all kinds of answers have been given
    assert answered > 150 and resident() - memory < 16 << 20
    assert answer_to(address, whole).split(b"\r\n\r\n")[1:] == page.split(b"\r\n\r\n")[1:]


def test_half_open_connections_do_not_delay_others(address):
    request = b"GET /search?text=a HTTP/1.1\r\nHost: localhost\r\n"
    with contextlib.ExitStack() as stack:
        for i in range(300):
            connection = stack.enter_context(socket.create_connection(address, timeout=10))
            connection.sendall(request[: i % 40])
        began = time.monotonic()
        assert answer_to(address, request + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began < 2


def bomb(path):
    """Write a small file of 400 million pixels."""
    Image.new("1", (20_000, 20_000)).save(path, "PNG")


CHANGES = {
    "replaced": lambda path: shutil.copy(path.with_name("004.png"), path),
    "deleted": pathlib.Path.unlink,
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a bomb": bomb,
}


def test_files_change_while_they_are_served(model, tmp_path, monkeypatch):
    """A lost file's thumbnail is one sentence without its path; a new content or a new file waits for a start."""
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    folder = tiny.folder(tmp_path / "images", n=5)
    bomb(folder / "100.png")
    index = make_index(model, str(folder))
    client = testclient.TestClient(make_app(index), base_url="http://localhost", raise_server_exceptions=False)
    found = client.get("/search?text=a").json()
    assert len(found["matches"]) == 5
    for i, (name, change) in enumerate(CHANGES.items()):
        change(folder / f"00{i}.png")
        answer = client.get(f"/thumbnail/{i}")
        if name == "replaced":
            assert answer.status_code == 200
        else:
            error = f"The file of image {i}, '00{i}.png', can no longer be read."
            assert (answer.status_code, answer.json()) == (400, {"error": error}), name
    assert client.get("/search?text=a").json() == found
    shutil.copy(folder / "000.png", folder / "200.png")
    assert client.get("/search?text=a").json() == found
    assert len(make_index(model, str(folder))) == 2


@contextlib.contextmanager
def started(run, images, cache, *flags):
    """Yield the process of the command; it is killed at the end."""
    command = [
        sys.executable,
        "-m",
        "xclip_jax.main",
        "serve",
        str(run),
        "--images",
        str(images),
        "--port",
        "0",
        *flags,
    ]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"XCLIP_CACHE": str(cache)}, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def line_with(process, words):
    return next(line for line in process.stdout if words in line)


def address_of(process):
    return "127.0.0.1", int(line_with(process, "http://").split()[2].rsplit(":")[-1])


def test_two_pages_share_a_cache_and_ctrl_c_ends_them(run, tmp_path):
    """Ctrl-C while parts are embedded, and while requests are answered; the next start goes on after the parts."""
    images, cache = tiny.folder(tmp_path / "images", n=20), tmp_path / "cache"
    for i in range(4096):
        os.link(images / "000.png", images / f"more-{i:04d}.png")
    with started(run, images, cache) as first:
        line_with(first, "images 4,096/4,116")
        first.send_signal(signal.SIGINT)
        assert first.communicate()[1].count("\n") <= 1 and first.returncode == 130
    with started(run, images, cache) as one, contextlib.ExitStack() as stack:
        line_with(one, "resuming after part 1 of 2")
        addresses = [address_of(one)]
        other = stack.enter_context(started(run, images, cache))
        line_with(other, "is complete")
        addresses.append(address_of(other))
        request = b"GET /search?text=a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answers = {answer_to(address, request).split(b"\r\n\r\n")[1] for address in addresses}
        assert len(answers) == 1 and b".png" in answers.pop()
        for _ in range(20):
            connection = stack.enter_context(socket.create_connection(addresses[1], timeout=10))
            connection.sendall(request)
        for process in (other, one):
            process.send_signal(signal.SIGINT)
            assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)


def test_the_best_are_those_of_a_full_sort():
    """Equal images, too: those that come first in the folder come first."""
    rng = np.random.default_rng(0)
    for n in (1, COUNT - 1, COUNT, COUNT + 1, 500):
        rows = rng.integers(-2, 3, (n, 4)).astype(np.float32)
        texts = pyarrow.chunked_array([[f"/x/{i:03d}" for i in range(n)]])
        columns = {"id": texts, "text": texts, "embedding": rows}
        matches = Index(None, None, np.arange(n), columns).by_image(n // 2)
        assert [match.image for match in matches] == np.argsort(-rows @ rows[n // 2], kind="stable")[:COUNT].tolist()
        assert n == 1 or matches[0].name == f"{matches[0].image:03d}"
