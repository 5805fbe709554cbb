"""The command that serves the search page, and its page in a browser."""

import functools
import socket
import sys

import pytest

from tests.helpers.browser import SCHEMES, WIDTHS, browser, check_accessible, check_layout, opened  # noqa: F401
from tests.helpers.serving import served
from xclip_jax.commands import serve as command
from xclip_jax.core.errors import UserError

testclient = pytest.importorskip("starlette.testclient")
uvicorn = pytest.importorskip("uvicorn")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_the_address_that_is_printed_is_answered(host, model, pictures, tmp_path, monkeypatch, capsys):
    try:
        command.listen(host, 0).close()
    except UserError:
        pytest.skip(f"this machine has no address {host}")
    answers = []

    def ask(server, sockets):
        printed = capsys.readouterr().out
        assert str(sockets[0].getsockname()[1]) in printed
        address = f"http://{printed.partition('http://')[2].split()[0]}"
        answers.append(testclient.TestClient(server.config.app, base_url=address).get("/").status_code)

    # Its configuration of logging closes streams of pytest.
    monkeypatch.setattr("uvicorn.Config", functools.partial(uvicorn.Config, log_config=None))
    monkeypatch.setattr("uvicorn.Server.run", ask)
    monkeypatch.setattr(command.inference, "load", lambda *_, **__: model)
    flags = ["--images", str(pictures), "--cache", str(tmp_path / "cache"), "--host", host, "--port", "0"]
    command.main(["a run", *flags])
    assert answers == [200]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{}", "--images", "none"], "'none' does not exist"),
        (["{}", "--images", "{}", "--names", "none"], "'none' cannot be read"),
        (["{}", "--images", "{}", "--port", "99999"], "--port is 99999; expected 0 to 65535"),
        (["{}", "--images", "{}", "--port", "{port}"], "set another --port, or 0"),
        (["{}", "--images", "{}", "--host", ""], "--host is empty; give an address, such as 127.0.0.1"),
        (["{}", "--images", "{}", "--host", "no.such.invalid"], "set another --host"),
        (["{}", "--images", "{}", "--names", sys.executable], "cannot be read"),
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
    with served(run, pictures, tmp_path_factory.mktemp("served") / "cache") as (found, _):
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
