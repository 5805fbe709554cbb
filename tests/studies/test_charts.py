"""Charts of a study: where values are, and nothing where there are none."""

import math
import re
import xml.etree.ElementTree

from studies import charts
from studies.statistics import Estimate


def circles(svg):
    assert xml.etree.ElementTree.fromstring(svg).get("viewBox").startswith("0 0 720 ")
    return [tuple(map(float, at)) for at in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_means_over_levels():
    lines = {
        "CLIP": [Estimate(1.0, 0.5, 1.5, 3), None],
        "xCLIP": [Estimate(2.0, 1.9, 2.1, 3), Estimate(3.0, math.nan, math.nan, 1)],
    }
    svg = charts.over_levels("Batch & steps", "batch", ["64", "256"], lines, "top-1")
    legend, points = circles(svg)[:2], circles(svg)[2:]
    assert len(legend) == 2 and len(points) == 3
    (_, one), (_, two), (_, three) = points
    assert abs((one - two) - (two - three)) < 0.11 and one > two > three  # up is more
    assert svg.count("<polyline") >= 4 and "Batch &amp; steps" in svg and "nan" not in svg


def test_curves_have_a_level():
    svg = charts.over_steps("Loss", {"CLIP": [(1.0, 5.5), (100.0, 2.0)]}, "nats", ("ln b", 5.545))
    assert "stroke-dasharray" in svg and ">ln b<" in svg and ">100<" in svg


def test_differences_are_beside_zero():
    groups = {"worse": {"xCLIP": Estimate(-1.0, -2.0, 0.0, 5)}, "better": {"xCLIP": Estimate(1.0, 0.5, 1.5, 5)}}
    svg = charts.in_groups("Difference", groups)
    _, (worse, first), (better, second) = circles(svg)  # the first is the legend's
    zero = float(re.search(r'<polyline points="([\d.]+),[^"]*" fill="none" stroke="#888888"', svg)[1])
    assert worse < zero < better and first < second


def test_without_values_there_is_no_chart():
    assert charts.over_levels("x", "x", ["1"], {"a": [None]}) is None
    assert charts.over_steps("x", {}, level=("ln b", 5.5)) is None
    assert charts.in_groups("x", {}) is None


def test_an_interval_of_two_runs_is_not_drawn():
    """Nor does it widen the axis, as that of three does."""

    def lines(n):
        svg = charts.over_levels(
            "x", "x", ["1", "2"], {"a": [Estimate(1.0, -90.0, 92.0, n), Estimate(2.0, 1.9, 2.1, 3)]}
        )
        ticks = {float(text) for text in re.findall(r'text-anchor="end"[^>]*>(-?[\d.]+)<', svg)}
        return svg.count('stroke="#0072b2"'), max(ticks)

    (two, low), (three, high) = lines(2), lines(3)
    assert three == two + 1 and low < 3 and high > 50
