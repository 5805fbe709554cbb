import math
import re
import xml.etree.ElementTree

from studies import page
from studies.declaration import Claim, ClaimPart
from studies.statistics import Estimate
from tests.studies import made


def test_tables():
    claim = Claim("xCLIP is better.", (ClaimPart("top-1 is higher", "top1", ["xclip"], ["clip"]),))
    matrix = made.matrix(values={"clip": {0: 4.0, 1: 6.0}, "xclip": {0: 8.0}}, claims=(claim,))
    assert page.arms(matrix, ["clip", "xclip"], made.MEASURES) == [
        "| arm | runs | top-1 | mean | rank |",
        "| --- | --- | --- | --- | --- |",
        "| clip | 2 | 5.0 (n = 2) | 7.5 (n = 2) | 9.80 (n = 2) |",
        "| xclip | 1 of 2 | 8.0 (n = 1) | 12.0 (n = 1) | 16.00 (n = 1) |",
        "",
    ]
    assert "| xclip | +4.0 (n = 1) | +6.0 (n = 1) | x 2.00 (n = 1) |" in page.differences(
        matrix, "minus clip", {"xclip": ("xclip", "clip")}, matrix.study.measures
    )
    more = made.matrix(values={name: {i: x + i for i in (0, 1)} for name, x in (("clip", 1.0), ("xclip", 5.0))})
    assert page.against_each(more, "xclip minus", "xclip", ["clip"], more.study.measures[:1])[2:] == [
        "| clip | +4.0 (n = 2) |",
        "",
    ]
    text = "\n".join(page.claims(matrix))
    assert "**Undecided.**" in text and "| top-1 is higher | +4.0 (n = 1) | +3.0 (n = 1) | 1 of 1 | 1.0000 |" in text
    assert "| xclip | `xclip` | 1 |" in page.missing(matrix)


def test_charts():
    few = Estimate(5.0, math.nan, math.nan, 1)
    groups = {"worse": {"xCLIP": Estimate(-1.0, -2.0, 0.0, 5), "other": few}, "more": {"xCLIP": Estimate(1.0, 0, 2, 5)}}
    svg = page.chart_of_differences("Difference & more", groups, "points")
    assert xml.etree.ElementTree.fromstring(svg).get("viewBox").startswith("0 0 720 ") and "nan" not in svg
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    _, (worse, first), (better, second) = (tuple(map(float, at)) for at in places)  # the first is the legend's
    zero = float(re.search(r'<polyline points="([\d.]+),[^"]*" fill="none" stroke="#888888"', svg)[1])
    assert worse < zero < better and first < second
    four = {f"measure {i}, long": groups["more"]["xCLIP"] for i in range(4)}
    svg = page.chart_of_differences("x", {"an arm with a long name, too": four, "unknown": {"other": few}}, "points")
    names = re.findall(r'<text x="([\d.]+)"[^>]*>(measure[^<]*)<', svg)
    assert len(names) == 4 and all(0 < float(x) < 720 - 6.5 * len(name) for x, name in names) and "unknown" not in svg
    svg = page.chart_of_curves("Loss", {"CLIP": [(1.0, 5.5), (100.0, 2.0)], "flat": [(100.0, 2.0)]}, "nats")
    assert svg.count("<circle") == 2 and ">100<" in svg
    assert page.chart_of_differences("x", {"a": {"b": few}}, "") is None and page.chart_of_curves("x", {}, "") is None
