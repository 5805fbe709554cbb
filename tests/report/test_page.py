"""Pages of reports in Chromium: scripts, layout on a phone and on a desk, light and dark, and accessibility."""

import dataclasses

import pytest

from tests.helpers import tiny
from tests.helpers.browser import SCHEMES, WIDTHS, browser, check_accessible, check_layout, opened  # noqa: F401
from tests.helpers.pages import page_of, written
from tests.report.test_collect import judged_results
from tests.report.test_health import collapsed, judged_at_once  # noqa: F401
from tests.report.test_sections import compared, predicted
from xclip_jax.report import examples, page

LONG = "a very long name of one class, which no card and no column of a table can show in one line without a cut"


def shown_examples():
    """Examples of every section, with long names."""
    made = predicted([("fox", ["fox", LONG]), (LONG, ["hen", LONG])])
    guesses, gallery = made.named[0].guesses, made.gallery
    clusters = [examples.Cluster(i, 2, 1, [0, 1], ["fox" if i % 2 else "hen", LONG]) for i in range(3)]
    found = [examples.SearchResult(LONG, [0, 1], [True, False], 1)]
    return dataclasses.replace(
        made,
        retrieved=examples.RetrievalExamples("pairs", ["a", "b"], "probability", gallery, found, guesses),
        clusters=examples.Clusters(64, 30, gallery, clusters),
        credits=["Images by their artists."],
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of a run's page with every section, of one of a run that has just begun, and of one of three runs."""
    root = tmp_path_factory.mktemp("pages")
    rows = [{"step": s, "loss": 1 / s, "lr": 1e-3} | collapsed("flat" if s == 3 else "") for s in (1, 2, 3)]
    run = written(root / "run", tiny.config("nclip"), rows)
    full = page_of(dataclasses.replace(run, results=judged_results()), shown_examples(), 1234)
    begun = page_of(written(root / "begun", tiny.config("clip"), []), examples.Examples(missing=["no checkpoint"]))
    runs = [dataclasses.replace(run, examples=shown_examples()) for run in compared(root)]
    for name, text in (("full", full), ("begun", begun), ("several", page.render(runs))):
        (root / f"{name}.html").write_text(text)
    return {name: f"file://{root}/{name}.html" for name in ("full", "begun", "several")}


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        *(("full", *shown) for shown in zip(WIDTHS, SCHEMES, strict=True)),
        ("begun", WIDTHS[0], "light"),
        *(("several", width, "light") for width in WIDTHS),
    ],
)
def test_nothing_fails_sticks_out_or_is_out_of_reach(name, width, scheme, browser, pages):  # noqa: F811
    with opened(browser, pages[name], width=width, scheme=scheme) as page:
        check_layout(page)
        check_accessible(page)


def test_charts_are_read_with_the_mouse_and_with_keys(browser, pages):  # noqa: F811
    width = WIDTHS[0]
    with opened(browser, pages["several"], width=width) as page:
        plot = page.locator(".plot").last
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 9)
        tip = page.locator(".tip")
        assert tip.locator("div").first.inner_text() == "step 3" and tip.locator("div").count() == 4
        inside = tip.bounding_box()
        assert inside["x"] >= 0 and inside["x"] + inside["width"] <= width
        page.mouse.move(0, 0)
        assert tip.count() == 0
        page.get_by_role("group", name="x, top-1").focus()
        page.keyboard.press("Home")
        assert tip.locator("div").first.inner_text() == "step 2"  # of the first evaluation
        page.keyboard.press("Escape")
        assert tip.count() == 0


def test_everything_is_reached_by_the_tab_key(browser, pages):  # noqa: F811
    with opened(browser, pages["full"]) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to content"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('main') !== null")
