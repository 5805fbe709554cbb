"""Tables of results, and comparisons of two files of results."""

import math
import re

import numpy as np
import pytest
from etils import epath

from tests.evaluators.test_probe import images
from tests.helpers.encoding import make_encoder, small_model
from tests.helpers.made_results import entry, retrieval, zero_shot
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import registry, results, tables
from xclip_jax.evaluators.probe import ProbeSet, Sweep
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.evaluators.zeroshot import ZeroShotSet
from xclip_jax.report import collect


def test_without_results_nothing_is_rendered():
    assert tables.render([]) == tables.headlines([]) == ""


def test_held_out_pairs_are_named():
    results = retrieval("holdout") + zero_shot("mnist") + retrieval("holdout@/a/run")
    assert tables.headlines(results) == (
        "held-out pairs i2t@1 61.0, i2t@5 65.0 | mnist top-1 57.5, top-5 100.0 | "
        "held-out pairs of run i2t@1 61.0, i2t@5 65.0"
    )


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["folder:/home/me/classes", "mnist"], ["folder:classes", "mnist"]),
        (["imagenet@/data/in/val/", "csv:~/a/b.csv"], ["imagenet@val", "csv:b.csv"]),
        (["folder:/a/x/val", "folder:/a/y/val"], ["folder:x/val", "folder:y/val"]),
        (["tar:gs://bucket/pairs/000.tar", "folder:own/classes"], ["tar:000.tar", "folder:own/classes"]),
    ],
)
def test_sets_of_files_have_short_names(names, short):
    assert tables.shorten(names) == dict(zip(names, short, strict=True))
    assert tables.headlines(zero_shot(names[0]) + zero_shot(names[1])).startswith(f"{short[0]} top-1 57.5")


# The metric that a set is reported by, where the table of its evaluator has no column for it.


def pets():
    fields = {"n": 3669, "evaluator": "zeroshot"}
    values = {"top1": 90.1, "top5": 99.0, "mean_per_class": 71.2}
    results = []
    for key, x in values.items():
        own = key == "mean_per_class"
        results.append(Result("pets", "zeroshot", key, x, headline=own, dependent=own, **fields))
    return [*results, Result("pets", "zeroshot", "ways", 37, unit="", evaluator="zeroshot")]


def test_the_sets_own_metric_is_shown_first():
    assert tables.headlines(pets()) == "pets mean_per_class 71.2, top-1 90.1"
    head, line = tables.render(pets()).splitlines()  # without chance levels no legend
    assert head.startswith("zero-shot classification, %") and head.split()[-3:] == ["own", "metric", "value"]
    assert line.split() == ["pets", "37", "90.1", "99.0", "mean_per_class", "71.2"]
    assert head.index("value") + 5 == line.index("71.2") + 4


@pytest.mark.parametrize(
    ("metric", "chance"),
    [
        ("mean_per_class", 50),
        ("roc_auc", None),
        ("top1_top5", 75),
        ("linear/mean_per_class", 50),
        ("linear/matthews", None),
    ],
)
def test_metrics_of_published_sets_are_shown(metric, chance):
    """Those that docs/protocols.md names, as they are measured."""
    labels, card = np.arange(30) % 2, Provenance(metric=metric)
    if metric.startswith("linear/"):
        sides = [images(labels), [], images(labels)]
        data = ProbeSet("set", *sides, {"": (labels, labels[:0], labels)}, sweep=Sweep((1.0,), 0), card=card)
    else:
        data = ZeroShotSet("set", images(labels), labels, [["a"], ["b"]], card=card)
    results = registry.measure(registry.evaluator(make_encoder(), data), small_model()[1])
    (row,) = tables.rows(results)
    (first, shown), *_ = row.shown
    assert first.metric == metric and shown == next(r for r in results if r.headline) and shown.chance == chance
    assert tables.render(results).splitlines()[1].split()[-2:] == [metric, f"{shown.value:.1f}"]


def test_the_headline_is_shown_before_other_columns():
    parts = (
        {"metric": "accuracy", "value": 60.0, "n": 50},
        {"metric": "macro_accuracy", "value": 55.0, "headline": True, "dependent": True},
    )
    results = [Result(**{"set": "aro", "family": "choice", "evaluator": "choice", "n": 50} | part) for part in parts]
    (row,) = tables.rows(results)
    assert [column.metric for column, _ in row.shown] == ["macro_accuracy", "accuracy"]
    assert tables.render(results).splitlines()[1].split() == ["aro", "60.0", "55.0"]  # columns stay where they are
    assert collect.judge(results[0]).low < 60 and math.isnan(collect.judge(results[1]).low)


# Comparisons


def compared(tmp_path, lefts, rights):
    for name, side in (("a.json", lefts), ("b.json", rights)):
        for fields in side:
            item = PerExample(np.array([1.0, 0.0]) if fields["value"] == 50 else np.array([1.0, 1.0]))
            results.add(epath.Path(tmp_path / name), fields, {f"{fields['name']}/top1": item}, {}, own=True)
    return tables.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"))


def test_the_newest_steps_of_one_profile_are_compared(tmp_path):
    lefts = [entry(step=9, profile="slip"), entry(step=9), entry(step=3, value=100.0)]
    rights = [entry(step=5, value=100.0), entry(step=5, profile="slip"), entry(step=3)]
    (row,) = compared(tmp_path, lefts, rights)
    assert (row["step_a"], row["step_b"], row["profile"], row["difference"]) == (9, 5, "openai", 50)
    assert row["low"] == 0 and row["high"] == 100
    files = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    (row,) = tables.compare(*files, step=3)
    assert row["difference"] == -50 and row["step_a"] == 3
    with pytest.raises(UserError, match=r"a\.json has results of the steps \[3, 9\], not of 4"):
        tables.compare(*files, step=4)
    assert "a.json, step 9" in tables.render_comparison([row | {"step_a": 9}], *files)


def test_a_difference_in_preprocessing_is_stated(tmp_path):
    rows = compared(tmp_path, [entry(preprocessing="224 px")], [entry(preprocessing="336 px")])
    assert tables.render_comparison(rows, "a", "b").endswith("x: images in A: 224 px; in B: 336 px")


def test_results_of_other_protocols_are_not_compared(tmp_path):
    with pytest.raises(UserError, match="profile is 'p' and 'q'"):
        compared(tmp_path, [entry(profile="p")], [entry(profile="q")])
    refused = []
    files = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert tables.compare(*files, refused=refused) == [] and len(refused) == 1
    with pytest.raises(UserError, match=r"x is not the same in .*: n is 3 and 4"):
        compared(tmp_path, [entry(n=3)], [entry(n=4)])


def test_the_columns_of_a_comparison_are_as_wide_as_their_cells():
    row = {"metric": "a/metric/of/more/than/24/letters", "unit": "x 100", "step_a": 1, "step_b": 2}
    row |= {"preprocessing_a": "", "preprocessing_b": ""}
    wide = row | {"set": "a_name_of_more_than_36_letters_of_its_own", "a": 1234567.5, "b": 1234568.5, "difference": 1.0}
    short = row | {"set": "short", "metric": "top1", "unit": "%", "a": 1.0, "b": 2.0, "difference": 1.0}
    *_, head, first, second = tables.render_comparison([wide | {"low": 0.5, "high": 1.5}, short], "a", "b").splitlines()
    cells = [wide["set"], row["metric"], "x 100", "1234567.5", "1234568.5", "+1.0", "+0.5 to +1.5 *"]
    assert re.split(r" {2,}", first) == cells and first.index("1234568.5") + 9 == head.index(" B ") + 2
    assert re.split(r" {2,}", second) == ["short", "top1", "%", "1.0", "2.0", "+1.0"]
    assert first.index("+0.5") == head.index("95 %")


def test_each_metric_is_compared_in_its_own_unit(tmp_path):
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 100, 60).astype(float)
    kinds = {
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
    rows = tables.compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [row["unit"] for row in rows] == ["%", "x 100", "%"]
    for row in rows:
        assert row["difference"] == row["b"] - row["a"] and row["low"] <= row["difference"] <= row["high"]
    lines = tables.render_comparison(rows, "a", "b").splitlines()[-3:]
    assert lines[0].split()[2:6] == ["%", *(f"{rows[0][key]:.1f}" for key in "ab"), f"{rows[0]['difference']:+.1f}"]
    assert " x 100 " in lines[1] and lines[1].endswith(" *") and lines[2].endswith("+0.0   +0.0 to +0.0")
