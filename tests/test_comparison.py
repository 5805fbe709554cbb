"""Comparisons of two files of results."""

import re

import numpy as np
import pytest
from etils import epath

from tests.test_results import entry
from xclip_jax import evaluate
from xclip_jax.errors import UserError
from xclip_jax.evaluators import results, tables
from xclip_jax.evaluators.results import Result
from xclip_jax.evaluators.statistics import PerExample


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
    (row,) = evaluate.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"), profile="slip")
    assert row["profile"] == "slip"
    (row,) = evaluate.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"), step=3)
    assert row["difference"] == -50 and row["step_a"] == 3
    with pytest.raises(UserError, match="no results of step 4, only of 3, 9"):
        evaluate.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"), step=4)
    with pytest.raises(UserError, match="of step 9 and profile 'open_clip'"):
        evaluate.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"), profile="open_clip")
    assert "a.json, step 9" in tables.render_comparison([row | {"step_a": 9}], str(tmp_path / "a.json"), "b")


def test_profiles_that_resize_otherwise_are_not_compared_but_models_of_other_sizes_are(tmp_path):
    def made(how, size, shorter="", **fields):
        words = f"shorter side{shorter} {how}, central crop, {size} px, mean and deviation of 'clip'"
        return entry(preprocessing=words, **fields)

    assert compared(tmp_path, [made("bicubic", 224)], [made("bicubic", 336)])
    assert compared(tmp_path, [made("bicubic", 224)], [made("bicubic", 336, profile="open_clip")])
    assert compared(tmp_path, [made("bilinear", 224, " to 256", set="y")], [made("bilinear", 336, " to 384", set="y")])
    with pytest.raises(UserError, match=r"preprocessing is .*bicubic.* and .*bilinear"):
        compared(tmp_path, [made("bicubic", 224, set="z")], [made("bilinear", 224, set="z", profile="slip")])


def test_the_columns_of_a_comparison_are_as_wide_as_their_cells(tmp_path):
    names = [f"retrieval/folder:/data/{kind}/{'long' * 10}" for kind in ("one", "two")]
    names += ["retrieval/folder:/data/somewhere/else", "a_name_of_more_than_36_letters_of_its_own"]
    row = {"metric": "a/metric/of/more/than/24/letters", "unit": "x 100", "step_a": 1, "step_b": 2}
    rows = [row | {"set": name, "a": 1234567.5, "b": 1234568.5, "difference": 1.0} for name in names]
    rows.append(row | {"set": "short", "metric": "top1", "unit": "%", "a": 1.0, "b": 2.0, "difference": 1.0})
    rows[0] |= {"low": 0.5, "high": 1.5}
    _, _, head, *lines = tables.render_comparison(rows, "a", "b").splitlines()
    shown = [f"retrieval/folder:{kind}/{'long' * 10}" for kind in ("one", "two")] + ["retrieval/folder:else", names[3]]
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
    interval = f"{rank['low']:.2f} to {rank['high']:.2f} *"
    assert first.split() == [
        *("rank_gmean",) * 2,
        "rank",
        *(f"{rank[key]:.2f}" for key in "ab"),
        "x",
        f"{rank['ratio']:.2f}",
        *interval.split(),
    ]
    assert second.split()[2:6] == ["%", *(f"{of['top5'][key]:.1f}" for key in "ab"), f"{of['top5']['difference']:+.1f}"]
    assert " x 100 " in third and third.endswith(" *") and fourth.endswith("+0.0   +0.0 to +0.0")
    assert note == "x: B / A, of ranks from 1; less is better"
    assert "B / A" not in tables.render_comparison(rows[1:], "a", "b")
