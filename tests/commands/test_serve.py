"""The search page: answers, the command, and the page in a browser."""

import asyncio
import io
import socket

import numpy as np
import pytest
from PIL import Image

from tests.helpers import bad_tars, tiny
from tests.helpers.browser import SCHEMES, WIDTHS, browser, check_accessible, check_layout, opened  # noqa: F401
from tests.helpers.pages import Page, check_basics
from tests.helpers.serving import served
from xclip_jax.commands import serve as command
from xclip_jax.commands.serve import make_index

pytestmark = pytest.mark.long

testclient = pytest.importorskip("starlette.testclient")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def index(model, pictures, tmp_path_factory):
    return make_index(model, str(pictures), cache=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def client(index):
    return testclient.TestClient(
        command.make_app(index), base_url="http://127.0.0.1:8000", raise_server_exceptions=False
    )


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
    matches = client.get("/search", params={"text": "picture 3"}).json()["matches"]
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


@pytest.mark.parametrize(
    ("address", "body", "status", "message"),
    [
        ("/names", b"fox\n\nno image", 400, "not an image"),
        ("/names?image=99", b"", 404, "99"),
        ("/names?image=-1", b"", 404, "-1"),
        ("/names?image=x", b"", 400, "x"),
        ("/names", bytes((20 << 20) + 1), 413, "too large"),
        ("/names", [b"of unknown length"], 413, "too large"),
        ("/names?image=0", b"\n".join(b"%d" % i for i in range(10_001)), 413, "10,001 labels are too many"),
        ("/nothing", b"", 404, "Not Found"),
        ("/thumbnail/1", b"", 405, "Not Allowed"),
    ],
)
def test_a_bad_question_is_one_sentence(client, address, body, status, message):
    answer = client.post(address, content=body)
    assert answer.status_code == status and message in answer.json()["error"]


def test_thumbnails(client):
    answer = client.get("/thumbnail/1")
    assert answer.headers["content-type"] == "image/webp" and len(answer.content) < 20_000
    assert client.get("/thumbnail/8").status_code == client.get("/thumbnail/../../etc/passwd").status_code == 404
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"  # other sites cannot show it


def test_the_page_escapes_names_and_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "<img src=x" not in answer.text and "&lt;img src=x" in answer.text
    check_basics(Page(answer.text))
    assert "8 images" in answer.text and "http" not in answer.text.replace("http-equiv", "")


def test_pages_of_other_sites_are_not_answered(client):
    for origin, status in (("http://evil.example", 403), ("null", 403), (str(client.base_url), 200)):
        assert client.post("/names?image=0", content=b"fox", headers={"origin": origin}).status_code == status


def test_browser_that_leaves_during_an_upload_is_no_error(index):
    """Without a handler the server would print a traceback for it."""
    parts = iter([{"type": "http.request", "body": b"fox", "more_body": True}, {"type": "http.disconnect"}])
    headers = [(b"host", b"localhost"), (b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": "/names", "query_string": b"", "headers": headers}

    async def receive():
        return next(parts)

    async def send(message):
        pass

    asyncio.run(command.make_app(index)(scope, receive, send))
    assert not list(parts)


def test_only_this_machine_is_answered(client):
    for host, status in (("evil.example", 400), ("127.0.0.1.evil.example", 400), ("localhost:8000", 200)):
        assert client.get("/", headers={"host": host}).status_code == status


def test_a_file_that_vanished_is_one_sentence_without_its_path(model, tmp_path):
    folder = tiny.folder(tmp_path / "images", n=2)
    index = make_index(model, str(folder), cache=str(tmp_path / "cache"))
    (folder / "001.png").unlink()
    client = testclient.TestClient(command.make_app(index), base_url="http://localhost")
    answer = client.get("/thumbnail/1")
    assert answer.status_code == 400
    assert answer.json()["error"] == "The file of image 1, '001.png', can no longer be read."


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
            np.asarray(Image.open(io.BytesIO(command.shrink(index.content(i))))).mean((0, 1)).argmax() for i in range(3)
        ]
        assert len(index) == 3 and shown == [0, 1, 2]
        names = [match.name for match in sorted(index.by_text("x", 3))]
        assert names == ["0.tar#k1", "0.tar#k", "0.tar#k"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{}", "--images", "none"], "no file or folder"),
        (["{}", "--images", "{}", "--port", "99999"], "set another --port, or 0"),
        (["{}", "--images", "{}", "--port", "{port}"], "set another --port, or 0"),
        (["{}", "--images", "{}", "--batch", "0"], "--batch is 0"),
        (["{}"], "required: --images"),
        (["none", "--images", "{}", "--port", "0"], "none"),
    ],
)
def test_bad_arguments_are_one_sentence(flags, message, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = [flag.replace("{port}", port).replace("{}", str(run)) for flag in flags]
        line += [] if "--port" in line else ["--port", "0"]
        with pytest.raises(SystemExit) as stopped:
            command.main(line)
    assert message in str(stopped.value) and str(stopped.value).startswith("error: ")


@pytest.fixture(scope="module")
def address(run, pictures, tmp_path_factory):
    with served(run, pictures, tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.mark.parametrize(("width", "scheme"), list(zip(WIDTHS, SCHEMES, strict=True)))
def test_a_person_searches_and_names(width, scheme, browser, address, pictures):  # noqa: F811
    with opened(browser, address, width=width, scheme=scheme, allowed=["blob:"]) as page:
        check_accessible(page)
        page.get_by_label("What the images should show").fill("picture 3")
        page.get_by_role("button", name="Search").click()
        page.get_by_text("8 images, best first").wait_for()
        matches = page.locator("#matches button")
        assert matches.count() == 8 and page.locator("#matches img").first.evaluate("i => i.decode().then(() => true)")
        matches.first.click()
        page.locator("#best li").nth(7).wait_for()
        assert page.locator("#like li").count() == 7
        page.get_by_label("Labels to choose from").fill("fox\nhen")
        page.get_by_label("Image", exact=True).set_input_files(pictures / "001.png")
        page.locator("#best li").nth(2).wait_for(state="detached")
        page.get_by_text("001.png: ").wait_for()
        assert sorted(page.locator("#best li span").all_inner_texts()) == ["fox", "hen"]
        check_layout(page)
        check_accessible(page)


def test_a_bad_picture_is_said_on_the_page(browser, address, pictures):  # noqa: F811
    with opened(browser, address, logged="400", allowed=["blob:"]) as page:
        page.get_by_label("Image", exact=True).set_input_files(pictures / "bad.png")
        page.get_by_text("not an image").wait_for()


def test_bars_show_differences_within_the_list(browser, address):  # noqa: F811
    """Cosines of 0.19 to 0.17 differ to the eye, and those that are equal but for rounding do not."""
    with opened(browser, address) as page:
        page.get_by_label("What the images should show").fill("picture 3")
        page.get_by_role("button", name="Search").click()
        for scores, expected in [([0.19, 0.18, 0.17], [1, 0.525, 0.05]), ([0.1, 0.1 - 1e-7], [1, 1])]:
            names = [{"name": f"{score}", "score": score} for score in scores]
            page.route("**/names*", lambda route, _, names=names: route.fulfill(json={"names": names, "matches": []}))
            page.locator("#matches button").first.click()
            page.locator("#named", has_text=f": {scores[0]}").wait_for()
            bars = page.locator("#best li").evaluate_all("bars => bars.map(x => +x.style.getPropertyValue('--v'))")
            assert bars == pytest.approx(expected, abs=1e-3)


def test_a_late_answer_replaces_no_later_one(browser, address):  # noqa: F811
    """Questions are held back, and answered in another order."""
    with opened(browser, address, logged="400", allowed=["blob:"]) as page:
        page.get_by_label("What the images should show").fill("picture 3")
        search, matches = page.get_by_role("button", name="Search"), page.locator("#matches button")
        search.click()
        page.get_by_text("8 images, best first").wait_for()
        held = []
        for pattern in ("**/search?*", "**/names*"):
            page.route(pattern, lambda route: held.append(route))

        def ask(button):
            n = len(held)
            button.click()
            for _ in range(500):
                if len(held) == n:
                    page.wait_for_timeout(10)
            return held[n]

        def answer(best, n):
            return {"names": [{"name": best, "score": 0.5}], "matches": [
                {"image": i, "name": f"/{i}.png", "text": best, "score": 0.5} for i in range(n)
            ]}  # fmt: skip

        # A search and a picture wait for their own answers.
        searched, named = ask(search), ask(matches.first)
        named.fulfill(json=answer("fox", 3))
        page.locator("#named", has_text=": fox").wait_for()
        searched.fulfill(json=answer("hen", 5))
        page.get_by_text("5 images, best first").wait_for()
        assert page.locator("#like li").count() == 3 and matches.count() == 5
        # The first question's answer comes last.
        first, second = ask(matches.nth(0)), ask(matches.nth(1))
        second.fulfill(json=answer("cow", 2))
        page.locator("#named", has_text=": cow").wait_for()
        with page.expect_response("**/names*"):
            first.fulfill(json=answer("late", 7))
        page.wait_for_timeout(50)
        assert page.locator("#best span").all_inner_texts() == ["cow"] and page.locator("#like li").count() == 2
        # One that fails leaves no answer of another picture.
        ask(matches.nth(2)).fulfill(status=400, json={"error": "no such picture"})
        page.locator("#named.error", has_text="no such picture").wait_for()
        assert page.locator("#best li, #like li").count() == 0 and matches.count() == 5
