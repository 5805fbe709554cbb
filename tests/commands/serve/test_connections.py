"""The search server over sockets: slow, unfinished and too many connections."""

import asyncio
import concurrent.futures
import contextlib
import os
import pathlib
import select
import socket
import threading
import time

import pytest
from PIL import Image

from tests.helpers import serving, tiny
from xclip_jax.core.errors import UserError

uvicorn = pytest.importorskip("uvicorn")
connections = pytest.importorskip("xclip_jax.commands.serve.connections")
thumbnails = pytest.importorskip("xclip_jax.commands.serve.thumbnails")

needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is in /proc")

LIMIT = 0.4  # seconds
HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def test_half_sent_requests_keep_nobody_else_waiting(run, tmp_path):
    with (
        serving.served(run, tiny.folder(tmp_path / "pictures", n=2), tmp_path / "cache") as (address, _),
        contextlib.ExitStack() as opened,
    ):
        for _ in range(64):
            opened.enter_context(serving.connect(address)).sendall(HALF)
        status, _, seconds = serving.get(address)
    assert status == 200 and seconds < 2


began = threading.Event()


async def slow_echo(scope, receive, send):
    """An application that reads the body, if there is one, and answers later than the limit of a request."""
    if scope["type"] == "http":
        while scope["method"] == "POST" and (await receive()).get("more_body"):
            pass
        began.set()
        await asyncio.sleep(2 * LIMIT)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def address(monkeypatch):
    """A server in this process with a limit of `LIMIT` seconds a request, and four connections an address."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", LIMIT)
    monkeypatch.setattr(connections, "PER_ADDRESS", 4)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(slow_echo, http=connections.Connection, ws="none", log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"", b""),
        (HALF, b""),
        (HALF, b"X"),  # a letter now and then
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n", b"X"),
    ],
)
def test_a_request_that_does_not_end_is_closed(first, more, address):
    with serving.connect(address) as connection:
        connection.sendall(first)
        start = time.monotonic()
        connection.settimeout(LIMIT / 4)
        while time.monotonic() - start < 20 * LIMIT:
            with contextlib.suppress(TimeoutError):
                assert connection.recv(100) == b""
                break
            with contextlib.suppress(ConnectionError):
                connection.sendall(more)
        assert LIMIT * 0.9 < time.monotonic() - start < 20 * LIMIT


def test_a_slow_answer_and_a_second_request_on_its_connection_are_not_cut_off(address):
    with serving.connect(address) as connection:
        for _ in range(2):
            connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n")
            time.sleep(LIMIT / 2)
            connection.sendall(b"x")
            assert read(connection).endswith(b"ok")
            time.sleep(LIMIT * 0.8)


def read(connection):
    data = b""
    while not data.endswith(b"ok") and (part := connection.recv(1000)):
        data += part
    return data


def test_more_connections_of_an_address_close_those_that_wait(address, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 60)
    with contextlib.ExitStack() as opened:
        busy, *idle = [opened.enter_context(serving.connect(address)) for _ in range(4)]
        began.clear()
        busy.sendall(HALF + b"\r\n")
        assert began.wait(20)
        new = opened.enter_context(serving.connect(address))
        (closed,) = select.select(idle, [], [], 20)[0]
        assert closed.recv(10) == b""
        new.sendall(HALF + b"\r\n")
        assert read(busy).endswith(b"ok") and read(new).endswith(b"ok")


def test_names_without_end_are_refused_while_others_are_answered(run, tmp_path):
    with serving.served(run, tiny.folder(tmp_path / "pictures", n=2), tmp_path / "cache") as (address, _):
        serving.get(f"{address}thumbnail/0")
        with concurrent.futures.ThreadPoolExecutor(2) as clients:
            bodies = [b"x,\n" * (8 << 20), b"x,\n" * (7 << 20)]  # more than is read, and just below
            asked = [clients.submit(serving.get, f"{address}names?image=0", body) for body in bodies]
            seconds = [serving.get(f"{address}thumbnail/0")[2] for _ in range(20)]
            assert [answer.result()[0] for answer in asked] == [413, 400]
        assert max(seconds) < 0.7 and max(answer.result()[2] for answer in asked) < 5


def ask_for_thumbnails(run, tmp_path, n, side):
    """Peak memory, bytes, of a server of which n clients request the thumbnails of n PNGs, one each, and its growth."""
    (tmp_path / "large").mkdir()
    Image.new("RGB", (side, side), "red").save(tmp_path / "large" / "0.png", compress_level=1)
    for i in range(1, n):
        os.link(tmp_path / "large" / "0.png", tmp_path / "large" / f"{i}.png")
    with serving.served(run, tmp_path / "large", tmp_path / "cache") as (address, process):
        folder = pathlib.Path(f"/proc/{process.pid}")
        (folder / "clear_refs").write_text("5")  # forgets the peak of the embedding
        before = peak(folder)
        with concurrent.futures.ThreadPoolExecutor(n) as clients:
            answers = list(clients.map(lambda i: serving.get(f"{address}thumbnail/{i}"), range(n)))
        assert [(status, data[:4]) for status, data, _ in answers] == [(200, b"RIFF")] * n
        return peak(folder), peak(folder) - before


def peak(folder):
    return int((folder / "status").read_text().split("VmHWM:")[1].split()[0]) << 10


def test_requests_for_one_thumbnail_share_one_computation_and_failures_are_tried_again():
    made, running, most = [], [], []

    def make(image):
        made.append(image)
        running.append(image)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        if made == [7]:
            raise UserError("not yet")
        return b"%d" % image

    async def ask():
        small = thumbnails.Thumbnails(make)
        with pytest.raises(UserError, match="not yet"):
            await small.get(7)
        return await asyncio.gather(*(small.get(image) for image in [7, 1, 2, 3] * 8))

    assert asyncio.run(ask()) == [b"7", b"1", b"2", b"3"] * 8
    assert sorted(made) == [1, 2, 3, 7, 7] and max(most) == 2


@needs_proc
def test_thumbnails_of_large_images_need_little_memory(run, tmp_path):
    _, growth = ask_for_thumbnails(run, tmp_path, n=12, side=4000)
    assert growth < 350 << 20  # an image has 64 MB; so two threads may have 256


@needs_proc
@pytest.mark.slow
def test_thumbnails_of_32_images_of_64_million_pixels_need_less_than_a_gigabyte(run, tmp_path):
    total, _ = ask_for_thumbnails(run, tmp_path, n=32, side=8000)
    assert total < 1 << 30
