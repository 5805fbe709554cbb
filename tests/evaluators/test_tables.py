"""Tables of results, and comparisons of two files of results."""

import dataclasses
import math
import re

import numpy as np
import pytest
from etils import epath

from tests.evaluators.test_probe import images
from tests.helpers import tiny
from tests.helpers.encoding import make_encoder, small_model
from tests.helpers.made_results import entry, retrieval, zero_shot
from tests.helpers.pages import Page, page_of, written
from xclip_jax.commands import evaluate
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import registry, results, tables
from xclip_jax.evaluators.probe import Probe, ProbeSet, Sweep
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.report import collect, examples


def test_without_results_nothing_is_rendered():
    assert tables.render([]) == tables.headlines([]) == "" and tables.build([]) == []


def test_held_out_pairs_are_named_by_what_is_measured_on_them():
    results = retrieval("holdout") + zero_shot("holdout") + zero_shot("holdout@/a/run")
    assert tables.headlines(results) == (
        "retrieval i2t@1 61.0, i2t@5 65.0 | zero-shot top-1 57.5, top-5 100.0 | "
        "held-out pairs of run top-1 57.5, top-5 100.0"
    )
    named = {name for table in tables.build(results) for name, _ in table.rows}
    assert {"held-out pairs", "held-out pairs of run"} <= named


def test_long_names_do_not_shift_the_columns():
    long = "mnist_and_more_than_that@relative/path/of/a/set/that/is/long"
    results = zero_shot(long) + zero_shot("mnist") + retrieval("coco_retrieval@pictures/of/2017/dataset_coco.json")
    lines = tables.render(results).splitlines()
    blocks = {"zero-shot": lines[:3], "retrieval": lines[3:5]}
    assert long in blocks["zero-shot"][1] and len({line.index("57.5") for line in blocks["zero-shot"][1:]}) == 1
    assert blocks["retrieval"][0].index("i2t@1") + 1 == blocks["retrieval"][1].index("61.0")
    assert all("  " in line and " (25.0)" in line for line in blocks["zero-shot"][1:])
    assert "100.0 (100.0)" in blocks["zero-shot"][1]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["folder:/home/me/classes", "mnist"], ["folder:classes", "mnist"]),
        (["imagenet@/data/in/val/", "csv:~/a/b.csv"], ["imagenet@val", "csv:b.csv"]),
        (["folder:/a/x/val", "folder:/a/y/val", "imagenet@/a/val"], ["folder:x/val", "folder:y/val", "imagenet@val"]),
        (["tar:gs://bucket/pairs/000.tar"], ["tar:000.tar"]),
        (["tfds:mnist/test", "folder:own/classes"], ["tfds:mnist/test", "folder:own/classes"]),  # relative paths stay
    ],
)
def test_sets_of_own_files_have_short_names(names, short):
    results = [result for name in names for result in zero_shot(name)]
    classified, *_ = tables.build(results)
    assert [name for name, _ in classified.rows] == short
    assert tables.headlines(results).startswith(f"{short[0]} top-1 57.5")


# The metric that a set is reported by, where the table of its evaluator has no column for it.


def pets():
    """Results of `pets`: top-1 is not the number to report."""
    fields = {"n": 3669, "evaluator": "zeroshot"}
    values = {"top1": 90.1, "top5": 99.0, "mean_per_class": 71.2}
    results = []
    for key, x in values.items():
        own = key == "mean_per_class"
        results.append(Result("pets", "zeroshot", key, x, headline=own, dependent=own, **fields))
    return [*results, Result("pets", "zeroshot", "ways", 37, unit="", evaluator="zeroshot")]


def test_the_sets_own_metric_is_shown_first():
    assert tables.headlines(pets()) == "pets mean_per_class 71.2, top-1 90.1"
    ((title, columns, rows),) = tables.build(pets())
    assert title == "zero-shot classification, %" and rows == [
        ("pets", ["37", "", "90.1", "", "99.0", "", "mean_per_class", "71.2"])
    ]
    assert [name for name, _ in columns[-2:]] == ["own metric", "value"]
    head, line = tables.render(pets()).splitlines()  # without chance levels no legend
    assert head.split()[-3:] == ["own", "metric", "value"] and line.split()[-2:] == ["mean_per_class", "71.2"]
    assert head.index("value") + 5 == line.index("71.2") + 4


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
    assert first.metric == metric and shown.headline and shown.value == next(r for r in results if r.headline).value
    assert tables.build(results)[0].rows[0][1][-2:] == [metric, f"{shown.value:.1f}"]
    # What is first has a chance level where shares of items do, so that pages test it.
    levels = {"mean_per_class": 50, "linear/mean_per_class": 50, "top1_top5": 75}
    assert shown.chance == levels.get(metric)


def test_the_headline_is_shown_before_other_columns():
    parts = (
        {"metric": "accuracy", "value": 60.0, "n": 50},
        {"metric": "macro_accuracy", "value": 55.0, "headline": True, "dependent": True},
    )
    results = [Result(**{"set": "aro", "family": "choice", "evaluator": "choice", "n": 50} | part) for part in parts]
    (row,) = tables.rows(results)
    assert [column.metric for column, _ in row.shown] == ["macro_accuracy", "accuracy"]
    assert tables.build(results)[0].rows[0][1][-2:] == ["55.0", ""]  # columns stay where they are
    assert collect.judge(results[0]).low < 60 and math.isnan(collect.judge(results[1]).low)


def test_a_page_is_about_the_sets_own_metric(tmp_path):
    values, y = np.repeat([1.0, 0.0, 1.0], [80, 10, 10]), np.repeat([0, 1], [80, 20])
    items = PerExample(values, weights=1 / np.bincount(y)[y])
    results = [dataclasses.replace(r, chance=50.0, items=items) if r.headline else r for r in pets()]
    run = written(tmp_path / "run", tiny.config("clip"), [{"step": 1, "loss": 1.0, "clip/loss": 1.0}])
    text = Page(page_of(dataclasses.replace(run, results=results), examples.Examples())).text
    words = " ".join("|".join(text).split())
    (judged,) = (collect.judge(row.shown[0][1]) for row in tables.rows(results))
    assert judged.verdict == "above chance"
    assert f"|71.2 |chance 50.0|{judged}|above chance|" in words
    # Without values of items there is none: in a mean per class images of rare ones weigh more.
    assert [str(collect.judge(row.shown[0][1])) for row in tables.rows(pets())] == [""]


# Comparisons


def compared(tmp_path, lefts, rights, **choice):
    for name, side in (("a.json", lefts), ("b.json", rights)):
        for fields in side:
            item = PerExample(np.array([1.0, 0.0]) if fields["value"] == 50 else np.array([1.0, 1.0]))
            results.add(epath.Path(tmp_path / name), fields, {f"{fields['name']}/top1": item}, {}, own=True)
    return evaluate.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"), **choice)


def test_the_newest_steps_of_one_profile_are_compared(tmp_path):
    lefts = [entry(step=9, profile="slip"), entry(step=9), entry(step=3, value=100.0)]
    rights = [entry(step=5, value=100.0), entry(step=5, profile="slip", value=100.0), entry(step=3)]
    (row,) = compared(tmp_path, lefts, rights)
    assert (row["step_a"], row["step_b"], row["profile"], row["difference"]) == (9, 5, "openai", 50)
    assert row["low"] == 0 and row["high"] == 100
    files = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    (row,) = evaluate.compare(*files, profile="slip")
    assert row["profile"] == "slip"
    (row,) = evaluate.compare(*files, step=3)
    assert row["difference"] == -50 and row["step_a"] == 3
    with pytest.raises(UserError, match="step 4, only of step 3 with openai, step 9 with openai, step 9 with slip"):
        evaluate.compare(*files, step=4)
    with pytest.raises(UserError, match="of step 9 with profile open_clip"):
        evaluate.compare(*files, profile="open_clip")
    assert "a.json, step 9" in tables.render_comparison([row | {"step_a": 9}], *files)


def test_a_difference_in_preprocessing_is_stated(tmp_path):
    rows = compared(tmp_path, [entry(preprocessing="224 px")], [entry(preprocessing="336 px")])
    assert tables.render_comparison(rows, "a", "b").endswith("x: images in A: 224 px; in B: 336 px")


@pytest.mark.parametrize(
    ("key", "a", "b", "message"),
    [
        ("profile", "openai", "slip", "profile is 'openai' and 'slip'"),
        ("templates", "a", "b", "templates is 'a' and 'b'"),
        ("protocol", "of 4 px; p", "of 2 px; p", "protocol is 'of 4 px' and 'of 2 px'"),
    ],
)
def test_results_of_other_protocols_are_not_compared(key, a, b, message, tmp_path):
    with pytest.raises(UserError, match=message):
        compared(tmp_path, [entry(**{key: a})], [entry(**{key: b})])


def test_the_columns_of_a_comparison_are_as_wide_as_their_cells(tmp_path):
    names = [f"retrieval/folder:/data/{kind}{'long' * 10}" for kind in ("one", "two")]
    names += ["retrieval/folder:/data/somewhere/else", "a_name_of_more_than_36_letters_of_its_own"]
    row = {"metric": "a/metric/of/more/than/24/letters", "unit": "x 100", "step_a": 1, "step_b": 2}
    rows = [row | {"set": name, "a": 1234567.5, "b": 1234568.5, "difference": 1.0} for name in names]
    rows.append(row | {"set": "short", "metric": "top1", "unit": "%", "a": 1.0, "b": 2.0, "difference": 1.0})
    rows[0] |= {"low": 0.5, "high": 1.5}
    _, _, head, *lines = tables.render_comparison(rows, "a", "b").splitlines()
    shown = [f"retrieval/folder:{kind}{'long' * 10}" for kind in ("one", "two")] + ["retrieval/folder:else", names[3]]
    for name, line in zip(shown, lines, strict=False):
        assert re.split(r" {2,}", line)[:6] == [name, row["metric"], "x 100", "1234567.5", "1234568.5", "+1.0"]
        assert line.index("1234568.5") + 9 == head.index(" B ") + 2
    assert re.split(r" {2,}", lines[4]) == ["short", "top1", "%", "1.0", "2.0", "+1.0"]
    assert lines[0].endswith("   +0.5 to +1.5 *") and lines[0].index("+0.5") == head.index("95 %")


def test_each_metric_is_compared_in_its_own_unit(tmp_path):
    """Percent and correlations by their difference, ranks by their ratio."""
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 100, 60).astype(float)
    kinds = {
        "rank_gmean": ("rank", [PerExample(x, statistic="gmean") for x in (ranks, np.ceil(ranks / 2))]),
        "top5": ("%", [PerExample((x < 20).astype(float)) for x in (ranks, ranks / 2)]),
        "spearman": ("x 100", [PerExample(x, other=-ranks, statistic="spearman") for x in (ranks, rng.random(60))]),
        "top1": ("%", [PerExample(np.ones(4)), PerExample(np.ones(4))]),
    }
    for side, file in enumerate("ab"):
        for metric, (unit, items) in kinds.items():
            value = items[side].value()
            result = Result(metric, "zeroshot", metric, value, unit=unit, headline=True)
            fields = entry(f"zeroshot/{metric}", set=metric, metric=metric, value=value)
            fields |= {"records": results.to_json([result])}
            name = f"zeroshot/{metric}/{metric}"
            results.add(epath.Path(tmp_path / file), fields, {name: items[side]}, {}, own=True)
    rows = evaluate.compare(str(tmp_path / "a"), str(tmp_path / "b"))
    of = {row["metric"]: row for row in rows}
    assert [row["unit"] for row in rows] == ["rank", "%", "x 100", "%"]
    rank = of["rank_gmean"]
    assert rank["ratio"] == pytest.approx(rank["b"] / rank["a"]) and "difference" not in rank
    draws = np.random.default_rng(0)
    logs = np.log(np.ceil(ranks / 2) / ranks)
    means = [logs[draws.integers(0, 60, 60)].mean() for _ in range(2000)]
    assert (rank["low"], rank["high"]) == pytest.approx(tuple(np.exp(np.percentile(means, [2.5, 97.5]))))
    assert 0.4 < rank["low"] < rank["ratio"] < rank["high"] < 0.6
    for metric in ("top5", "spearman", "top1"):
        row = of[metric]
        assert row["difference"] == row["b"] - row["a"] and row["low"] <= row["difference"] <= row["high"]
    *_, first, second, third, fourth, note = tables.render_comparison(rows, "a", "b").splitlines()
    numbers = [f"{rank[key]:.2f}" for key in ("a", "b", "ratio", "low", "high")]
    assert first.split() == "rank_gmean rank_gmean rank {} {} x {} {} to {} *".format(*numbers).split()
    assert second.split()[2:6] == ["%", *(f"{of['top5'][key]:.1f}" for key in "ab"), f"{of['top5']['difference']:+.1f}"]
    assert " x 100 " in third and third.endswith(" *") and fourth.endswith("+0.0   +0.0 to +0.0")
    assert note == "x: B / A, of ranks from 1; less is better"
    assert "B / A" not in tables.render_comparison(rows[1:], "a", "b")
