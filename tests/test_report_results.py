"""Results on the page, and whether they are above chance."""

import dataclasses
import json

import pytest
import scipy.stats

from tests import tiny
from tests.pages import Page, check, written
from xclip_jax.evaluators import flat_names, summary
from xclip_jax.report import chance, examples, html, record


def test_an_evaluation_is_shown_before_there_are_results(tmp_path):
    empty = written(tmp_path / "run", tiny.config("clip"), [])
    assert empty.results == [] and empty.steps == 0
    result = {"name": "zeroshot/x", "metrics": {"top1": 12.5, "top5": 50.0, "n": 8, "ways": 10}}
    result |= {"set": "x", "metric": "top1", "value": 12.5}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"results": [result]}))
    words = " ".join(Page(html.render(record.read(tmp_path / "run"), examples.Examples())).text)
    assert "From evaluation.json" in words and "12.5" in words and "(10.0)" in words


def test_results_are_tested_against_chance(tmp_path):
    """Of 10 names: 11 of 100 right are within the interval, 5.6 to 18.8 %, of 20 chance is below, of 1 above."""
    results = {}
    for name, top1 in (("a<b", 20.0), ("b", 11.0), ("c", 1.0)):
        results |= {f"zeroshot/{name}/top1": top1, f"zeroshot/{name}/top5": 50.0}
        results |= {f"zeroshot/{name}/n": 100.0, f"zeroshot/{name}/ways": 10.0}
    results |= {f"retrieval/r/{way}/r{k}": 9.0 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    results |= {"retrieval/r/images": 100.0, "retrieval/r/captions": 500.0}
    results |= {"visual/p/linear/top1": 55.0, "visual/p/n": 100.0, "visual/p/ways": 3.0, "visual/p/majority": 50.0}
    results |= {"textual/s/spearman_all": 50.0, "textual/s/spearman_mean": 50.0, "textual/s/pairs": 100.0}
    results = flat_names.read(results)
    judged = chance.verdicts(results)
    assert judged == {
        ("a<b", "top1"): "above chance", ("b", "top1"): "not distinguishable from chance",
        ("c", "top1"): "below chance", ("r", "image_to_text/r1"): "above chance",
        ("p", "linear/top1"): "not distinguishable from chance",
    }  # fmt: skip
    run = written(tmp_path / "run", tiny.config("clip"), [{"step": 1, "loss": 1.0, "clip/loss": 1.0}])
    words = " ".join(check(html.render(dataclasses.replace(run, results=results), examples.Examples())).text)
    assert "above chance (10.0\u00a0%)" in words  # the tile of zero-shot classification
    assert "Not distinguishable from chance: b (top-1), p (linear probe, top-1). By 95% binomial" in words


@pytest.mark.parametrize(
    ("n", "right", "low", "high"), [(40, 23, 0.4089, 0.7296), (100, 11, 0.0562, 0.1883), (8, 0, 0.0, 0.3694)]
)
def test_verdicts_change_where_the_exact_interval_ends(n, right, low, high):
    """Ends by the beta distribution's quantiles, of which chance is a hair to either side."""
    ends = scipy.stats.beta.ppf([0.025, 0.975], [max(right, 1e-12), right + 1], [n - right + 1, n - right])
    assert ends == pytest.approx([low, high], abs=1e-4)
    within = "not distinguishable from chance"
    for share, verdict in ((low - 1e-3, "above chance"), (low + 1e-3, within), (high - 1e-3, within),
                           (high + 1e-3, "below chance")):  # fmt: skip
        if share > 0:
            results = {"visual/x/linear/top1": 100 * right / n, "visual/x/n": float(n), "visual/x/ways": 2.0}
            results["visual/x/majority"] = 100 * share
            assert chance.verdicts(flat_names.read(results)) == {("x", "linear/top1"): verdict}


def test_tables_have_a_cell_for_each_column_and_the_content_of_their_text():
    results = {"zeroshot/a/top1": 50.0, "zeroshot/a/top5": 75.0, "zeroshot/a/n": 8.0, "zeroshot/a/ways": 10.0}
    results |= {"zeroshot/a/cosine/top1": 40.0, "zeroshot/a/cosine/top5": 60.0}
    results |= {f"retrieval/r/{way}/r{k}": 9.0 for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    results |= {"retrieval/r/images": 5.0, "retrieval/r/captions": 20.0}
    results = flat_names.read(results)
    tables = summary.tables(results)
    assert [t.title.split(",")[0] for t in tables] == ["zero-shot classification", "retrieval", "the families"]
    assert all(len(cells) == len(t.columns) for t in tables for _, cells in t.rows)
    assert tables[0].rows[0] == ("a", ["10", "8", "50.0", "(10.0)", "75.0", "(50.0)"])
    assert [row[0] for row in tables[2].rows] == ["zero-shot classification", "retrieval"]
    text = summary.render(results)
    assert all(cell in text for t in tables for _, cells in t.rows for cell in cells)
