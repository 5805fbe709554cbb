"""Chromium for the tests of pages: $CHROMIUM, or else one that is installed."""

import contextlib
import os
import pathlib
import shutil

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (360, 1400)  # a narrow phone, and a desk
SCHEMES = ("light", "dark")


@contextlib.contextmanager
def chromium():
    """Chromium without a window; without any a test is skipped."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        path = path or playwright.chromium.executable_path
        if not pathlib.Path(path).exists():
            pytest.skip("Chromium is missing: apt install chromium, or CHROMIUM=/path/to/chromium")
        # As root, as in containers, Chromium has no sandbox.
        started = playwright.chromium.launch(executable_path=path, chromium_sandbox=False)
        yield started
        started.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@contextlib.contextmanager
def opened(browser, address, *, width=1400, scheme="light", allowed=(), logged="no such error"):
    """A page at `address`; errors of its scripts and requests to other addresses are failures.

    But for addresses that begin with one of `allowed`, and errors that have `logged` in them.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:", *allowed)) else errors.append(request.url),
    )
    page.goto(address)
    yield page
    context.close()
    unexpected = [error for error in errors if logged not in error]
    assert not unexpected, unexpected


def check_layout(page):
    """Nothing is wider than the window, and no line of text is cut but where an ellipsis says so."""
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1], widths
    cut = page.evaluate("""() => [...document.querySelectorAll("main *, header *, footer *")].filter(node => {
        const style = getComputedStyle(node), dots = style.textOverflow === "ellipsis" || style.webkitLineClamp > 0;
        return node.clientWidth > 0 && node.scrollWidth > node.clientWidth + 1 && style.overflowX === "hidden" && !dots;
    }).map(node => node.outerHTML.slice(0, 120))""")
    assert not cut, cut


def check_accessible(page):
    """axe-core has no objection."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    violations = axe.run(page).response["violations"]
    faults = [(v["id"], v["impact"], [n["html"][:160] for n in v["nodes"][:4]]) for v in violations]
    assert not faults, faults
