"""Reading of report pages, and runs as files alone."""

import itertools
import json
import re
from html.parser import HTMLParser

from tests.helpers import made_results
from xclip_jax.report import collect, page
from xclip_jax.report.collect import Run

HOSTILE = "<script>alert(1)</script>\" onload='alert(2)' &amp; <b>"
SECTIONS = ("names", "search", "results", "curves", "health", "run")


class Page(HTMLParser):
    """Tags, ids, loaded addresses, attributes and text of a page; unbalanced tags are an error."""

    VOID = frozenset(("meta", "input", "img", "br", "wbr", "line", "rect", "polyline", "link", "circle"))

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text, self.open, self.elements, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.tags = [tag for tag, _ in self.elements]
        self.ids = [value for key, value in self.attributes if key == "id"]
        loading = ("src", "href", "srcset", "action", "data", "poster")
        self.loads = [value for key, value in self.attributes if key in loading]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)


def check(text, sections=SECTIONS):
    """Assert what holds for every page with these sections; return it parsed."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and set(sections) <= set(page.ids)
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert {load for load in page.loads if load.startswith("#")} <= {f"#{i}" for i in page.ids}
    assert not re.search(r"url\((?!data:image/webp;base64,)|@import|\bfetch\(|XMLHttpRequest|import\(", text)
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert "default-src 'none'" in text and len(text) < 10e6
    check_basics(page)
    return page


def check_basics(page):
    """Assert what a person who does not see a page needs at least: a language, a title, headings in order, labels."""
    (language,) = [attributes.get("lang") for tag, attributes in page.elements if tag == "html"]
    assert language == "en" and page.tags.count("title") == page.tags.count("h1") == page.tags.count("main") == 1
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(below - above <= 1 for above, below in itertools.pairwise(levels)), levels
    labelled = {attributes.get("for") for tag, attributes in page.elements if tag == "label"}
    for tag, attributes in page.elements:
        if tag == "img":
            assert "alt" in attributes, attributes
        if attributes.get("role") in ("img", "region", "group") or tag == "nav":
            assert attributes.get("aria-label"), (tag, attributes)
        if tag in ("input", "textarea", "select"):
            assert attributes.get("aria-label") or attributes.get("id") in labelled, attributes


ENDED = "2026-01-02T04:04:05+00:00"  # of results.json


def written(folder, config, rows, evaluations=()):
    """The record of a run directory with `config`, lines `rows` of metrics.jsonl, and evaluations, (step, results)."""
    folder.mkdir()
    config = config if isinstance(config, dict) else config.to_dict()
    facts = {"environment": {"python": "3"}, "started": "2026-01-02T03:04:05+00:00"}
    (folder / "config.json").write_text(json.dumps({"config": config} | facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.jsonl").write_text(made_results.lines(evaluations))
    return collect.read(folder)


def page_of(record, examples, parameters=None):
    """The page of one run."""
    return page.render([Run(record.folder.name, 0, record, examples, parameters)])
