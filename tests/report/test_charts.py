"""Charts: numbers, ticks, what is drawn, and the charts of every term."""

import json
import math
import pathlib
import re

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.pages import Page, check, page_of, written
from xclip_jax.report import charts, examples, page


def test_numbers_and_ticks():
    values = (0, 7.5, 103.25, 1234.5, 1e-5, 0.00075, -0.0312, math.nan)
    numbers = ["0", "7.5", "103.2", "1,234", "1e-5", "7.5e-4", "-0.0312", "not a number"]
    assert list(map(charts.number, values)) == numbers
    assert charts.ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(-0.3, 0.35, 5) == pytest.approx([-0.2, 0, 0.2])


def test_a_chart_keeps_to_what_is_finite_and_short():
    steps = range(5000)
    line = charts.Line("a<b", steps, [math.nan if s % 7 == 0 else s for s in steps], 0)
    chart = charts.chart("T", [line], [charts.Level("alarm", -100.0, below=True)], unit="nats")
    source = "{% from 'elements.html' import chart %}{{ chart(c) }}"
    text = page.environment().from_string(source).render(c=chart)
    Page(text)
    data = json.loads(chart.data)
    (drawn,) = data["lines"]
    assert drawn["name"] == "a<b" and len(drawn["x"]) == charts.POINTS
    assert drawn["y"] == pytest.approx(drawn["x"], abs=1) and "a&lt;b" in text
    points = np.array([p.split(",") for p in re.search(r'points="([^"]+)"', text)[1].split()], float)
    assert points[0, 0] == 0 and points[-1, 0] == 1000 and (np.diff(points[:, 1]) < 0).all()
    assert charts.chart("T", [charts.Line("none", [1], [math.nan], 0)]) is None


def test_equal_values_are_a_straight_line():
    """Means of three are rounded, here up for 0.1."""
    chart = charts.chart("T", [charts.Line("constant", range(1000), [0.1] * 1000, 0)])
    assert len({p.split(",")[1] for p in chart.points(chart.lines[0], 1000, 400).split()}) == 1


@pytest.mark.parametrize("name", ["siglip", "xclip", "classify-img"])
def test_every_chart_of_a_term_is_on_the_page(name, tmp_path):
    """With the metrics of real steps, recorded in the golden file of the objectives."""
    golden = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "objectives.json").read_text())[name]["metrics"]
    rows = [{"step": step} | metrics for step, metrics in enumerate(golden, 1)]
    config = tiny.config(name.split("-")[0], objective__classify__classes=3)
    run = written(tmp_path / "run", config, rows)
    text = page_of(run, examples.Examples())
    parsed = check(text)
    titles = set(re.findall(r"<figcaption><b>([^<]+)</b>", text))
    for name_of_term, term in run.objective.terms.items():
        assert {curve.title for curve in term.curves()} <= titles
        health = term.health(run.objective.metrics_of(name_of_term, rows[-1]))
        if health.checks:
            assert health.summary in " ".join(parsed.text)
            assert {curve.title for curve in health.curves} <= titles
            assert text.count('class="card light') == len(health.checks) or len(run.objective.terms) > 1
