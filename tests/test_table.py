import dataclasses

import numpy as np
import pytest

from tests import tiny
from tests.encoding import make_encoder, small_model
from tests.made_results import retrieval, zero_shot
from tests.pages import Page, written
from tests.test_probe import images
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.probe import Probe, ProbeSet, Sweep
from xclip_jax.evaluators.results import SHIFTED, Provenance, Result
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.report import chance, examples, html


def test_without_results_nothing_is_rendered():
    assert tables.render([]) == tables.headlines([]) == "" and tables.build([]) == []


def test_chance_levels_in_brackets_have_a_legend():
    lines = tables.render(retrieval("coco")).splitlines()
    assert lines[-1] == "in brackets: the chance level, what guessing gives"
    assert "bracket" not in tables.render(pets())


def test_held_out_pairs_are_named_by_what_is_measured_on_them():
    results = retrieval("holdout") + zero_shot("holdout") + zero_shot("holdout@/a/run")
    assert tables.headlines(results) == (
        "retrieval i2t R@1 61.0, R@5 65.0 | zero-shot top-1 57.5, top-5 100.0 | "
        "held-out pairs of run top-1 57.5, top-5 100.0"
    )
    named = {name for table in tables.build(results) for name, _ in table.rows}
    assert {"held-out pairs", "held-out pairs of run"} <= named and tables.build(results)[-1].title == "overview"


def test_chance_of_retrieval_counts_every_caption():
    results = retrieval("coco")
    (recalls,) = [t for t in tables.build(results) if t.title.startswith("retrieval")]
    cells = ["61.0", "(5.0)", "65.0", "(23.0)", "61.0", "(5.0)", "65.0", "(25.0)"]
    assert recalls.rows == [("coco", ["20", "100", *cells])]
    assert tables.families(results).rows == [("retrieval", ["coco", "image_to_text/r1", "61.0", "(5.0)"])]


def test_a_mean_average_precision_has_no_chance_level():
    results = [Result("voc", "zeroshot", "ways", 4, unit=""), Result("voc", "zeroshot", "map11", 51.0, unit="x 100")]
    assert tables.families(results).rows == [("zero-shot classification", ["voc", "map11", "51.0", ""])]


def test_long_names_do_not_shift_the_columns():
    long = "mnist_and_more_than_that@relative/path/of/a/set/that/is/long"
    results = zero_shot(long) + zero_shot("mnist") + retrieval("coco_retrieval@pictures/of/2017/dataset_coco.json")
    lines = tables.render(results).splitlines()
    blocks = {"zero-shot": lines[:3], "retrieval": lines[3:5], "families": lines[5:]}
    assert [len(block) for block in blocks.values()] == [3, 2, 4]
    assert long in blocks["zero-shot"][1] and len({line.index("57.5") for line in blocks["zero-shot"][1:]}) == 1
    assert blocks["retrieval"][0].index("i2t@1") + 1 == blocks["retrieval"][1].index("61.0")
    assert blocks["families"][1].index("top1") == blocks["families"][2].index("image_to_text/r1")
    assert all("  " in line and " (25.0)" in line for line in blocks["zero-shot"][1:])
    assert "100.0 (100.0)" in blocks["zero-shot"][1]


def test_short_names_have_the_usual_columns():
    lines = tables.render(zero_shot("mnist") + retrieval("coco")).splitlines()
    assert lines[1].index("4") == 42 + 7 and lines[5].index("mnist") == 26 and lines[5].index("top1") == 56


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["folder:/home/me/classes", "mnist"], ["folder:classes", "mnist"]),
        (["imagenet@/data/in/val/", "csv:~/a/b.csv"], ["imagenet@val", "csv:b.csv"]),
        (["folder:/a/x/val", "folder:/a/y/val", "imagenet@/a/val"], ["folder:x/val", "folder:y/val", "imagenet@val"]),
        (["folder:/val", "folder:/a/val"], ["folder:/val", "folder:a/val"]),
        (["tar:gs://bucket/pairs/000.tar"], ["tar:000.tar"]),
        # What is no absolute path is called as the user wrote it.
        (
            ["tfds:mnist/test", "folder:own/classes", "emoji/test_line"],
            ["tfds:mnist/test", "folder:own/classes", "emoji/test_line"],
        ),
    ],
)
def test_sets_of_own_files_have_short_names(names, short):
    results = [result for name in names for result in zero_shot(name)]
    classified, *_ = tables.build(results)
    assert [name for name, _ in classified.rows] == short
    assert tables.families(results).rows[0][1][0] == short[0]
    assert tables.headlines(results).startswith(f"{short[0]} top-1 57.5")


# The metric that a set is reported by, where the table of its evaluator has no column for it.


def pets():
    """Results of `pets`: top-1 is not the number to report."""
    fields = {"n": 3669, "evaluator": "zeroshot"}
    values = {"top1": 90.1, "top5": 99.0, "mean_per_class": 71.2}
    results = [
        Result("pets", "zeroshot", key, x, headline=key == "mean_per_class", **fields) for key, x in values.items()
    ]
    return [*results, Result("pets", "zeroshot", "ways", 37, unit="", evaluator="zeroshot")]


def test_the_sets_own_metric_is_shown_first():
    assert tables.headlines(pets()) == "pets mean_per_class 71.2, top-1 90.1"
    ((title, columns, rows),) = tables.build(pets())
    assert title == "zero-shot classification, %" and rows == [
        ("pets", ["37", "", "90.1", "", "99.0", "", "mean_per_class", "71.2"])
    ]
    assert [name for name, _ in columns[-2:]] == ["own metric", "value"]
    assert tables.families(pets()).rows == [("zero-shot classification", ["pets", "mean_per_class", "71.2", ""])]
    head, line = tables.render(pets()).splitlines()
    assert head.split()[-3:] == ["own", "metric", "value"] and line.split()[-2:] == ["mean_per_class", "71.2"]
    assert head.index("value") + 5 == line.index("71.2") + 4


def test_a_table_with_other_sets_shows_theirs_as_before():
    others = zero_shot("imagenet") + zero_shot("imagenet_r", role=SHIFTED)
    alone = tables.render(others).splitlines()
    head, *rows = tables.render([*others, *pets()]).splitlines()
    assert head.startswith(alone[0]) and rows[:3] == alone[1:4]
    assert rows[2].startswith("  less than imagenet") and rows[3].startswith("pets ")


@pytest.mark.parametrize(
    "metric", ["mean_per_class", "roc_auc", "top1_top5", "linear/mean_per_class", "linear/matthews"]
)
def test_metrics_of_published_sets_are_shown(metric):
    """Those that docs/protocols.md names, as they are measured."""
    labels, card = np.arange(30) % 2, Provenance(metric=metric)
    if metric.startswith("linear/"):
        sides = [images(labels), [], images(labels)]
        data = ProbeSet("set", *sides, {"": (labels, labels[:0], labels)}, sweep=Sweep((1.0,), 0), card=card)
        evaluator = Probe(make_encoder(), data)
    else:
        evaluator = ZeroShot(make_encoder(), ZeroShotSet("set", images(labels), labels, [["a"], ["b"]], card=card))
    results = registry.measure(evaluator, small_model()[1])
    (row,) = tables.rows(results)
    (first, shown), *_ = row.shown
    assert first.name == metric and shown.headline and shown.value == next(r for r in results if r.headline).value
    assert tables.build(results)[0].rows[0][1][-2:] == [metric, f"{shown.value:.1f}"]
    # What is first has a chance level where shares of items do, so that pages test it.
    levels = {"mean_per_class": 50, "linear/mean_per_class": 50, "top1_top5": 75}
    assert shown.chance == levels.get(metric)


def test_a_page_is_about_the_sets_own_metric(tmp_path):
    values, y = np.repeat([1.0, 0.0, 1.0], [80, 10, 10]), np.repeat([0, 1], [80, 20])
    results = [
        dataclasses.replace(r, chance=50.0, items=PerExample(values, weights=1 / np.bincount(y)[y]))
        if r.headline
        else r
        for r in pets()
    ]
    run = written(tmp_path / "run", tiny.config("clip"), [{"step": 1, "loss": 1.0, "clip/loss": 1.0}])
    text = Page(html.render(dataclasses.replace(run, results=results), examples.Examples())).text
    words = " ".join("|".join(text).split())
    (judged,) = chance.judgements(results).values()
    assert judged.resampled and judged.verdict == "above chance"
    assert f"|mean_|per_|class|71.2|{judged}|above chance|" in words and "|own metric|value|95% interval|" in words
    assert "Intervals are of the first metric of a row, or of the own metric that it names, at 95%" in words
    # Without values of items there is none: a mean per class is no share of the images.
    assert [str(j) for j in chance.judgements(pets()).values()] == [""]


def test_an_own_metric_that_is_no_percentage_has_its_unit():
    results = [
        Result("x", "own", "gap", 1.2, unit="radians", n=9, headline=True),
        Result("y", "own", "share", 50.0, n=9),
    ]
    results.append(Result("z", "zeroshot", "top1", 50.0, n=9))
    lines = tables.render(results).splitlines()
    assert any(line.split()[:5] == ["x", "9", "gap,", "radians", "1.2"] for line in lines)
    assert any(line.split()[:4] == ["y", "9", "share", "50.0"] for line in lines)
    assert sum("gap, radians" in line for line in lines) == 2  # in the table of families too
