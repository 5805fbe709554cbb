"""The application of the search page: its index, answers and limits, and slow, unfinished and too many connections."""

import asyncio
import concurrent.futures
import contextlib
import io
import os
import pathlib
import select
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers import bad_tars, serving, tiny
from tests.helpers.pages import Page, check_basics
from xclip_jax.commands import search_app as application
from xclip_jax.commands import serve as command
from xclip_jax.commands.embed_sources import open_images
from xclip_jax.commands.search_index import Embedded, Index, make_index
from xclip_jax.core.errors import UserError

pytestmark = pytest.mark.long

testclient = pytest.importorskip("starlette.testclient")
uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def index(model, pictures, tmp_path_factory):
    return make_index(model, str(pictures), cache=str(tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture
def client(index):
    app = application.make_app(index, "<b>pictures", {"localhost"})
    return testclient.TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def name(client, image, names=()):
    """Request the best names of an image: its number, or the content of a file."""
    lines = "\n".join(names).encode()
    if isinstance(image, bytes):
        return client.post("/names", content=lines + b"\n\n" + image)
    return client.post("/names", params={"image": image}, content=lines)


def test_answers_are_those_of_the_model(client, index, model, pictures):
    assert len(index) == 8 and "picture 0" in index.names
    files = sorted(pictures.glob("[0-9]*.png"))
    images, (text,) = model.encode_image(files), model.encode_text(["picture 3"])
    matches = client.get("/search", params={"text": " picture 3 "}).json()["matches"]
    assert [match["score"] for match in matches] == pytest.approx(sorted(images @ text, reverse=True), abs=1e-5)
    assert matches[0]["name"] == files[int(np.argmax(images @ text))].name and len(matches) == 8
    names = ["fox", "hen {}", "cow"]
    expected = model.encode_text([f"a photo of a {n}." for n in names]) @ images[2]
    of_folder = name(client, 2, names).json()
    for answer in (of_folder, name(client, files[2].read_bytes(), names).json()):
        assert {x["name"]: x["score"] for x in answer["names"]} == pytest.approx(
            dict(zip(names, expected, strict=True)), abs=1e-4
        )
        assert answer["names"][0]["name"] == names[int(expected.argmax())]
    assert 2 not in [match["image"] for match in of_folder["matches"]] and len(of_folder["matches"]) == 7
    assert len(name(client, 2).json()["names"]) == 8  # the folder's captions


def test_thumbnails(client, index):
    answer = client.get("/thumbnail/1")
    assert answer.headers["content-type"] == "image/webp" and len(answer.content) < 20_000
    assert client.get("/thumbnail/8").status_code == 404 and "no image 8" in client.get("/thumbnail/8").json()["error"]
    assert client.get("/thumbnail/../../etc/passwd").status_code == 404


@pytest.mark.parametrize(
    ("address", "body", "status", "message"),
    [
        ("/names", b"fox\n\nno image", 400, "not an image"),
        ("/names", b"fox", 400, "has no image"),
        ("/names", b"", 400, "has no image"),
        ("/names?image=x", b"", 404, "Image 'x' does not exist"),
        ("/names?image=99", b"", 404, "no image 99"),
        ("/names?image=-1", b"", 404, "does not exist"),
        ("/names?image=0", b"fox\n \nhen", 400, "text is empty"),
        ("/names?image=0", b"x\n" * 500 + b"x", 400, "501 names are too many"),
        ("/names?image=0", b"\xff", 400, "not UTF-8"),
        ("/names?image=0", b"x" * 1001, 400, "1,001 letters"),
        ("/names?image=0", b"x" * 2_100_000, 413, "too large"),
        ("/names", b"\n\n" + bytes((20 << 20) + 1), 413, "too large"),
    ],
)
def test_a_bad_question_is_one_sentence(client, address, body, status, message):
    answer = client.post(address, content=body)
    assert answer.status_code == status and message in answer.json().get("error", "")


def test_bounds(client, monkeypatch):
    assert {client.get(f"/thumbnail/{number}").status_code for number in ("9" * 5000, "-1", "x", "99", "0x1")} == {404}
    assert "text is empty" in client.get("/search?text=%20").json()["error"]
    assert "1,001 letters" in client.get("/search", params={"text": "x" * 1001}).json()["error"]
    assert client.get("/nothing").json()["error"] == "Not Found" and client.get("/names").status_code == 405
    read = []

    def body():
        for _ in range(100):
            read.append(1)
            yield b" " * (1 << 16)

    monkeypatch.setattr(application, "_HELD", 1 << 20)
    answer = client.post("/names", content=body())
    assert answer.status_code == 503 and "Too many images" in answer.json()["error"]
    monkeypatch.setattr(application, "MAX_UPLOAD", 1 << 16)
    for _ in range(3):  # what was held is given back
        answer = client.post("/names", content=body())
        assert answer.status_code == 413 and "too large" in answer.json()["error"]


def test_the_page_escapes_names_and_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "<b>pictures" not in answer.text and "<img src=x" not in answer.text and "&lt;img src=x" in answer.text
    check_basics(Page(answer.text))
    assert "8 images" in answer.text and "http" not in answer.text.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"host": "evil.example"}, 403),
        ("/", {"host": "127.0.0.1.evil.example"}, 403),
        ("/", {"host": ""}, 403),
        ("/", {"host": "[::1"}, 403),
        ("/", {"host": "Localhost.:8000"}, 200),
        ("/", {"host": "[::1]:8000"}, 200),
        ("/", {"host": "192.168.1.7:8000"}, 200),
        ("/", {"sec-fetch-site": "cross-site"}, 200),  # a link
        ("/thumbnail/1", {"sec-fetch-site": "same-origin"}, 200),
        ("/thumbnail/1", {"sec-fetch-site": "none"}, 200),
        ("/thumbnail/1", {"sec-fetch-site": "cross-site"}, 403),
        ("/search?text=x", {"sec-fetch-site": "same-site"}, 403),
        ("/search?text=x", {"origin": "http://evil.example"}, 403),
        ("/search?text=x", {"origin": "null"}, 403),
        ("/search?text=x", {"origin": "http://127.0.0.1"}, 200),
    ],
)
def test_other_sites_are_refused(client, path, headers, status):
    assert client.get(path, headers=headers).status_code == status


def test_images_cannot_be_shown_by_other_sites_and_have_no_path_of_the_machine(client, pictures):
    assert client.get("/thumbnail/1").headers["cross-origin-resource-policy"] == "same-origin"
    answers = client.get("/").text, client.get("/search?text=x").text, name(client, 1).text
    assert not any(str(pictures) in answer for answer in answers) and '"003.png"' in answers[1]


def test_a_file_that_vanished_is_one_sentence_without_its_path(model, tmp_path):
    folder = tiny.folder(tmp_path / "images", n=2)
    index = make_index(model, str(folder), cache=str(tmp_path / "cache"))
    (folder / "001.png").unlink()
    client = testclient.TestClient(application.make_app(index, "x", {"localhost"}), base_url="http://localhost")
    answer = client.get("/thumbnail/1")
    assert answer.status_code == 400
    assert answer.json()["error"] == "The file of image 1, '001.png', can no longer be read."


def test_names_of_classes_and_of_files(model, tmp_path):
    for label in ("red_fox", "hen"):
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "set" / label / "0.png")
    source = open_images(str(tmp_path / "set"))
    columns = Embedded([0, 1], ["", ""], np.eye(2, dtype=np.float32))
    assert Index(model, source, columns).names == ["hen", "red fox"]
    assert Index(model, source, columns, ["cow"]).names == ["cow"]
    (tmp_path / "names.txt").write_text("fox\n\n hen \n")
    assert command.read_names(str(tmp_path / "names.txt")) == ["fox", "hen"] and command.read_names("") == []


def test_default_names_are_such_that_the_server_takes(model, client, pictures, tmp_path):
    """Captions in tars may have several lines, and be longer than a name may be."""
    source = open_images(str(pictures))
    texts = ["\n a fox \r\nin the snow", "x" * 1001, " \n", "a fox", "x" * 1000]
    columns = Embedded(list(range(5)), texts, np.eye(5, dtype=np.float32))
    names = Index(model, source, columns).names
    assert names == ["a fox", "x" * 1000] and name(client, 0, names).status_code == 200
    assert name(client, 0, ["x" * 1001]).status_code == 400
    (tmp_path / "names.txt").write_text("fox\n" + "x" * 1001)
    with pytest.raises(UserError, match=r"has a name of 1,001 letters, 'xxx.*; give at most 1,000"):
        command.read_names(str(tmp_path / "names.txt"))


def test_each_image_of_a_tar_has_its_own_thumbnail(model, tmp_path, monkeypatch):
    """Also samples of one key, the first of which is none, and tars that are named by another path."""
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    colors = [bad_tars.encode(Image.new("RGB", (20, 20), color)) for color in ("red", "lime", "blue")]
    samples = [("k", b"<html>"), ("k1", colors[0]), ("k", colors[1]), ("k2", b"<html>"), ("k", colors[2])]
    (tmp_path / "a").mkdir()
    bad_tars.shard(tmp_path / "a" / "0.tar", [(key, {"jpg": data, "txt": b"x"}) for key, data in samples])
    for pattern in ("a/*.tar", f"{tmp_path}/a/*.tar"):
        index = make_index(model, pattern)
        shown = [
            np.asarray(Image.open(io.BytesIO(application.thumbnail(index.content(i))))).mean((0, 1)).argmax()
            for i in range(3)
        ]
        assert len(index) == 3 and shown == [0, 1, 2]
        names = [match.name for match in sorted(index.by_text("x", 3))]
        assert names == ["0.tar#k1", "0.tar#k", "0.tar#k"]


# --- connections

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
    monkeypatch.setattr(application, "REQUEST_SECONDS", LIMIT)
    monkeypatch.setattr(application, "PER_ADDRESS", 4)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(slow_echo, http=application.Connection, ws="none", log_config=None, lifespan="off")
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
    monkeypatch.setattr(application, "REQUEST_SECONDS", 60)
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


def test_a_thumbnail_is_made_once_in_few_threads_and_failures_are_tried_again(client, monkeypatch):
    made, running, most = [], [], []

    def make(content):
        made.append(content)
        running.append(content)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        if len(made) == 1:
            raise UserError("not yet")
        return b"%d" % len(content)

    monkeypatch.setattr(application, "thumbnail", make)
    assert client.get("/thumbnail/7").json()["error"] == "not yet"
    with client, concurrent.futures.ThreadPoolExecutor(4) as clients:  # one event loop, as in a server
        answers = list(clients.map(lambda i: client.get(f"/thumbnail/{i}").content, [7, 1, 2, 3]))
    assert [client.get(f"/thumbnail/{i}").content for i in (7, 1, 2, 3)] == answers and b"" not in answers
    assert len(made) == 5 and max(most) <= 2


@needs_proc
def test_thumbnails_of_large_images_need_little_memory(run, tmp_path):
    _, growth = ask_for_thumbnails(run, tmp_path, n=12, side=4000)
    assert growth < 350 << 20  # an image has 64 MB; so two threads may have 256


@needs_proc
@pytest.mark.slow
def test_thumbnails_of_32_images_of_64_million_pixels_need_less_than_a_gigabyte(run, tmp_path):
    total, _ = ask_for_thumbnails(run, tmp_path, n=32, side=8000)
    assert total < 1 << 30
