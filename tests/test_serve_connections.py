"""The search server over sockets: slow, unfinished and too many connections."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

from tests import serving, tiny

uvicorn = pytest.importorskip("uvicorn")
connections = pytest.importorskip("xclip_jax.serve.connections")

LIMIT = 0.4  # seconds
HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def test_half_sent_requests_keep_nobody_else_waiting(run, tmp_path):
    with (
        serving.served(run, tiny.folder(tmp_path / "pictures", n=2), tmp_path / "x.npz") as (address, _),
        contextlib.ExitStack() as opened,
    ):
        for _ in range(64):
            opened.enter_context(serving.connect(address)).sendall(HALF)
        status, _, seconds = serving.get(address)
    assert status == 200 and seconds < 2


async def slow_echo(scope, receive, send):
    """An application that reads the body, if there is one, and answers later than the limit of a request."""
    if scope["type"] == "http":
        while scope["method"] == "POST" and (await receive()).get("more_body"):
            pass
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
        began = time.monotonic()
        connection.settimeout(LIMIT / 4)
        while time.monotonic() - began < 20 * LIMIT:
            with contextlib.suppress(TimeoutError):
                assert connection.recv(100) == b""
                break
            with contextlib.suppress(ConnectionError):
                connection.sendall(more)
        assert LIMIT * 0.9 < time.monotonic() - began < 10 * LIMIT


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


def test_more_connections_of_an_address_close_those_that_wait(address):
    with contextlib.ExitStack() as opened:
        busy, *idle = [opened.enter_context(serving.connect(address)) for _ in range(4)]
        busy.sendall(HALF + b"\r\n")
        time.sleep(LIMIT / 8)
        new = opened.enter_context(serving.connect(address))
        idle[0].settimeout(LIMIT / 2)
        assert idle[0].recv(10) == b""  # long before its time is over
        new.sendall(HALF + b"\r\n")
        assert read(busy).endswith(b"ok") and read(new).endswith(b"ok")
