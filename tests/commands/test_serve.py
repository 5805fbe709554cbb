"""The search page: answers, the command, and the page in a browser."""

import io
import socket

import numpy as np
import pytest
from PIL import Image

from tests.helpers import bad_tars, tiny
from tests.helpers.browser import SCHEMES, WIDTHS, browser, check_accessible, check_layout, opened  # noqa: F401
from tests.helpers.pages import Page, check_basics
from tests.helpers.serving import served
from xclip_jax.commands import embed
from xclip_jax.commands import serve as command
from xclip_jax.commands.serve import make_index

pytestmark = pytest.mark.long

testclient = pytest.importorskip("starlette.testclient")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight images with captions, one of them hostile, and a ninth that is none."""
    folder = tiny.folder(tmp_path_factory.mktemp("serve") / "<b>pictures", n=8)
    (folder / "003.txt").write_text("<img src=x onerror=alert(1)>")
    (folder / "bad.png").write_bytes(b"<html>")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))


def client_of(index):
    app = command.make_app(index)
    return testclient.TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(model, pictures, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        return client_of(make_index(model, str(pictures)))


def test_answers_are_those_of_the_model(client, model, pictures):
    files = sorted(pictures.glob("[0-9]*.png"))
    images, (text,) = model.encode_image(files), model.encode_text(["picture 3"])
    for address, query in (("/search?text=picture%203", text), ("/similar/2", images[2])):
        matches = client.get(address).json()["matches"]
        assert [match["score"] for match in matches] == pytest.approx(sorted(images @ query, reverse=True), abs=1e-5)
        assert [match["image"] for match in matches] == list(np.argsort(-(images @ query), kind="stable"))
        assert matches[0]["name"] == files[matches[0]["image"]].name
    assert (matches[0]["image"], matches[0]["text"]) == (2, "picture 2")


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/similar/99", 404),
        ("/similar/x", 404),
        ("/thumbnail/8", 404),
        ("/thumbnail/../../etc/passwd", 404),
        (f"/similar/{'9' * 5000}", 404),
        ("/similar/-1", 404),
    ],
)
def test_a_bad_question_is_refused(client, address, status):
    answer = client.get(address)
    assert answer.status_code == status and answer.json()["error"]


def test_the_page_and_its_pictures_load_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    check_basics(Page(answer.text))
    assert "8 images" in answer.text and "http" not in answer.text.replace("http-equiv", "")
    small = client.get("/thumbnail/1")
    assert small.headers["content-type"] == "image/webp" and len(small.content) < 20_000
    assert small.headers["cross-origin-resource-policy"] == "same-origin"  # other sites cannot show it


def test_only_this_machine_is_answered(client):
    for host, status in (("evil.example", 400), ("127.0.0.1.evil.example", 400), ("localhost:8000", 200)):
        assert client.get("/", headers={"host": host}).status_code == status


def test_images_are_embedded_again_only_if_they_change(model, tmp_path, monkeypatch):
    """A file that vanished while the page is open gives an error without its path."""
    folder, calls, original = tiny.folder(tmp_path / "images", n=3), [], embed.embed_images
    (folder / "0.png").write_bytes(b"<html>")
    monkeypatch.setattr(embed, "embed_images", lambda *args: calls.append(args) or original(*args))
    assert [len(make_index(model, str(folder))) for _ in range(2)] == [3, 3] and len(calls) == 1
    (folder / "002.png").rename(folder / "003.png")
    index = make_index(model, str(folder))
    assert len(index) == 3 and len(calls) == 2
    (folder / "003.png").unlink()
    answer = client_of(index).get("/thumbnail/2")
    assert answer.status_code == 400
    assert answer.json()["error"] == "The file of image 2, '003.png', can no longer be read."


@pytest.mark.parametrize("pattern", ["", "*.bmp", "x.csv", "x.tar"])
def test_files_of_the_same_names_and_sizes_in_another_folder_are_embedded(pattern, model, pictures, tmp_path):
    scores = []
    for i in (1, 2):
        part = tmp_path / str(i)
        part.mkdir()
        Image.open(pictures / f"00{i}.png").convert("RGB").resize((30, 20)).save(part / "0.bmp")
        if pattern == "x.csv":
            (part / "x.csv").write_text("image\n0.bmp\n")
        elif pattern == "x.tar":
            bad_tars.shard(part / "x.tar", [("0", {"bmp": (part / "0.bmp").read_bytes()})])
        scores.append(make_index(model, str(part / pattern)).by_text("a picture")[0].score)
    assert scores[0] != scores[1]


def test_each_image_of_a_tar_has_its_own_thumbnail(model, tmp_path):
    """Also samples with the same key, the first of which is damaged."""
    colors = [bad_tars.encode(Image.new("RGB", (20, 20), color)) for color in ("red", "lime", "blue")]
    samples = [("k", b"<html>"), ("k1", colors[0]), ("k", colors[1]), ("k2", b"<html>"), ("k", colors[2])]
    bad_tars.shard(tmp_path / "0.tar", [(key, {"jpg": data, "txt": b"x"}) for key, data in samples])
    index = make_index(model, f"{tmp_path}/*.tar")
    shown = [np.asarray(Image.open(io.BytesIO(index.thumbnail(i)))).mean((0, 1)).argmax() for i in range(3)]
    assert shown == [0, 1, 2]
    assert sorted(match.name for match in index.by_text("x")) == ["0.tar#k", "0.tar#k", "0.tar#k1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{}", "--images", "none"], "none"),
        (["{}", "--images", "{}", "--port", "{port}"], "--port"),
        (["{}", "--images", "{}", "--batch", "0"], "--batch is 0"),
    ],
)
def test_bad_arguments(flags, message, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = [flag.replace("{port}", port).replace("{}", str(run)) for flag in flags]
        line += [] if "--port" in line else ["--port", "0"]
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            command.main(line)


@pytest.fixture(scope="module")
def address(run, pictures, tmp_path_factory):
    with served(run, pictures, tmp_path_factory.mktemp("served")) as address:
        yield address


@pytest.mark.parametrize(("width", "scheme"), list(zip(WIDTHS, SCHEMES, strict=True)))
def test_a_person_searches(width, scheme, browser, address):  # noqa: F811
    with opened(browser, address, width=width, scheme=scheme) as page:
        check_accessible(page)
        page.get_by_label("What the images should show").fill("picture 3")
        page.get_by_role("button", name="Search").click()
        page.get_by_text("8 images like picture 3, best first").wait_for()
        matches = page.locator("#matches button")
        assert matches.count() == 8 and page.locator("#matches img").first.evaluate("i => i.decode().then(() => true)")
        title = matches.nth(1).locator("span").inner_text()
        matches.nth(1).click()
        page.locator("#found", has_text=f"8 images like {title}").wait_for()
        assert matches.first.locator("span").inner_text() == title
        check_layout(page)
        check_accessible(page)


def test_a_late_answer_replaces_no_later_one(browser, address):  # noqa: F811
    """Questions are held back, and answered in another order; a failed one leaves no answer of another."""
    with opened(browser, address, logged="400") as page:
        held = []
        page.route("**/search?*", lambda route: held.append(route))

        def ask(n):
            page.get_by_label("What the images should show").fill("picture 3")
            page.get_by_role("button", name="Search").click()
            for _ in range(500):
                if len(held) < n:
                    page.wait_for_timeout(10)
            return held[n - 1]

        def answer(n):
            return {"matches": [{"image": i, "name": f"/{i}.png", "text": "x", "score": 0.5} for i in range(n)]}

        first, second = ask(1), ask(2)
        second.fulfill(json=answer(2))
        page.get_by_text("2 images").wait_for()
        with page.expect_response("**/search?*"):
            first.fulfill(json=answer(7))
        page.wait_for_timeout(50)
        assert page.locator("#matches button").count() == 2
        ask(3).fulfill(status=400, json={"error": "no such picture"})
        page.locator("#found.error", has_text="no such picture").wait_for()
        assert page.locator("#matches button").count() == 0
