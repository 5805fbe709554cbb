"""Results on the page, and whether they are above chance."""

import dataclasses
import json
import math
import re
import shutil
from html import unescape

import numpy as np
import pytest
import scipy.stats

from tests.helpers import made_results, tiny
from tests.helpers.made_results import retrieval, zero_shot
from tests.helpers.pages import ENDED, check, page_of, written
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import write_json
from xclip_jax.evaluators import results as results_files
from xclip_jax.evaluators.results import Result, flat, from_json, to_json
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.report import collect, examples
from xclip_jax.train.run_writer import RunWriter


def add(run, result, step, *, items=None, **changes):
    """Add a result to a run's evaluation.json, as `xclip_jax.commands.evaluate` does."""
    entry = {"name": f"zeroshot/{result.set}", "metrics": {"top1": result.value}, "set": result.set, "metric": "top1"}
    entry |= {"value": result.value, "records": to_json([result]), "checkpoint": "run", "step": step}
    keys = dict.fromkeys(results_files.KEY, "") | entry | {"profile": "", "changes": {}} | changes
    results_files.add(RunReader(run).evaluation_file, keys, {result.name: items} if items else {}, {}, own=True)


def finish(run, results):
    """Write results.json."""
    content = {"results": flat(results), "records": to_json(results), "config": {}, "ended": ENDED}
    write_json(RunReader(run).results_file, content)


def judged_results():
    """Of 10 names: 11 of 100 right are within the interval, 5.6 to 18.8 %, of 20 chance is below, of 1 above."""
    results = []
    for name, top1 in (("a<b", 20.0), ("b", 11.0), ("c", 1.0)):
        results += zero_shot(name, top1, 50.0, n=100, ways=10)
    results += retrieval("r", (9.0,) * 4, (1.0, None, 1.0, None), images=100, captions=500)
    results.append(Result("p", "visual", "linear/top1", 55.0, n=100, chance=50.0, headline=True))
    for metric in ("spearman_all", "spearman_mean"):
        results.append(Result("s", "textual", metric, 50.0, unit="x 100", n=100, headline=metric == "spearman_all"))
    return results


def test_results_are_tested_against_chance(tmp_path):
    results = judged_results()
    assert collect.verdicts(results) == {
        ("a<b", "top1"): "above chance", ("b", "top1"): "not distinguishable from chance",
        ("c", "top1"): "below chance", ("r", "image_to_text/r1"): "above chance",
        ("p", "linear/top1"): "not distinguishable from chance",
    }  # fmt: skip
    run = written(tmp_path / "run", tiny.config("clip"), [{"step": 1, "loss": 1.0, "clip/loss": 1.0}])
    text = page_of(dataclasses.replace(run, results=results), examples.Examples())
    words = " ".join(check(text).text)
    assert "above chance chance 10.0\u00a0%, a" in words  # the tile of zero-shot classification
    rows = dict(re.findall(r'<th scope="row">([^ ]+?)<br>.*?<span class="pill([a-z ]*">[a-z -]+)</span>', text))
    assert rows["a&lt;b"] == ' above">above chance' and rows["c"] == ' below">below chance'
    assert rows["b"] == rows["p"] == '">not distinguishable from chance'
    assert "<small>5.6 to 18.8</small>" in text


def test_the_first_screen_says_what_to_do_now(tmp_path):
    run = written(tmp_path / "run", tiny.config("clip"), [{"step": 1, "loss": 1.0, "clip/loss": 1.0}])
    finetuned = written(tmp_path / "labelled", tiny.config("classify", objective__classify={"classes": 3}), [])
    for shown, sentence in (
        (run, "The run is not complete."),
        (dataclasses.replace(run, ended=run.began), f"xclip-jax serve {run.folder} --images FOLDER"),
        (dataclasses.replace(finetuned, ended=run.began), "To use it, load the model in Python by"),
    ):
        page = page_of(shown, examples.Examples())
        assert sentence in unescape(page.partition("What now")[2].partition("</div>")[0])


@pytest.mark.parametrize(("n", "right", "low", "high"), [(40, 23, 0.4089, 0.7296), (8, 0, 0.0, 0.3694)])
def test_verdicts_change_where_the_exact_interval_ends(n, right, low, high):
    """Ends by the beta distribution's quantiles, of which chance is a hair to either side."""
    ends = scipy.stats.beta.ppf([0.025, 0.975], [max(right, 1e-12), right + 1], [n - right + 1, n - right])
    assert ends == pytest.approx([low, high], abs=1e-4)
    within = "not distinguishable from chance"
    for share, verdict in ((low - 1e-3, "above chance"), (low + 1e-3, within), (high - 1e-3, within),
                           (high + 1e-3, "below chance")):  # fmt: skip
        if share > 0:
            result = Result("x", "visual", "linear/top1", 100 * right / n, n=n, chance=100 * share)
            assert collect.verdicts([result]) == {("x", "linear/top1"): verdict}


def test_weighted_and_grouped_values_are_resampled():
    """Of 100 images of 4 concepts, 2 of which are right throughout: the interval is that of 4 items and not of 100."""
    values, concepts = np.repeat([1.0, 1.0, 0.0, 0.0], 25), np.repeat(np.arange(4), 25)
    plain = Result("x", "zeroshot", "top1", 50.0, n=100, chance=25.0)
    within = "not distinguishable from chance"
    for items, verdict, interval, of_record in (
        (PerExample(values), "above chance", "39.8 to 60.2", "39.8 to 60.2"),
        (PerExample(values, groups=concepts), within, "0.0 to 100.0", ""),
        (PerExample(np.array([1.0, 0.0]), weights=np.array([3.0, 1.0])), within, "0.0 to 100.0", ""),
    ):
        result = dataclasses.replace(plain, items=items)
        judged = collect.judge(result)
        assert (judged.verdict, str(judged)) == (verdict, interval)
        # Its record, without the values, says whether the binomial interval holds.
        (record,) = from_json(to_json([result]))
        assert record.items is None and str(collect.judge(record)) == of_record
    correlation = collect.judge(Result("s", "textual", "spearman_all", 50.0, "x 100", n=9))
    assert str(correlation) == correlation.verdict == ""


@pytest.mark.parametrize("right", [False, True])
def test_values_that_are_all_equal_have_the_interval_of_their_effective_number(right):
    """A resample of them cannot differ: 0 of 56 images right of 291 names is what a random answer gives as well."""
    chance = 100 * (1 - 1 / 291 if right else 1 / 291)
    weights = np.repeat([3.0, 1, 1, 1], 2)  # 36 / 12 = 3 items, each twice
    for trials, n, fields in (
        (56, 56, {"weights": np.full(56, 1 / 56)}),
        (14, 56, {"groups": np.repeat(np.arange(14), 4)}),
        (3, 8, {"weights": weights, "groups": np.repeat(np.arange(4), 2)}),
    ):
        items = PerExample(np.full(n, float(right)), **fields)
        judged = collect.judge(Result("x", "zeroshot", "top1", 100.0 * right, n=n, chance=chance, items=items))
        # Of 0 right of n the upper end is 1 - (alpha / 2)^(1 / n).
        away = 100 * (1 - 0.025 ** (1 / trials))
        assert [judged.low, judged.high] == pytest.approx([100 - away, 100] if right else [0, away])
        assert judged.verdict == "not distinguishable from chance"


def test_per_example_values_of_an_evaluation_serve_the_results_of_the_run(tmp_path):
    run = written(tmp_path / "run", tiny.config("clip"), []).folder
    result = Result("x", "zeroshot", "top1", 50.0, n=4, chance=25.0, headline=True, evaluator="zeroshot")
    add(run, result, 4, items=PerExample(np.array([1.0, 1.0, 0.0, 0.0]), groups=np.array([0, 0, 1, 1])))
    (read,) = collect.read(run).results
    assert read.items.groups.tolist() == [0, 0, 1, 1]
    for value in (75.0, 50.0):
        finish(run, [dataclasses.replace(result, value=value)])
        assert (collect.read(run).results[0].items is None) == (value == 75.0)  # of another step


def test_the_last_evaluation_of_a_run_leaves_its_per_example_values(tmp_path):
    config = schema.complete(tiny.config("clip").to_dict())
    written(tmp_path / "run", config.to_dict(), [])
    items = PerExample(np.array([1.0, 1.0, 0.0, 0.0]), groups=np.array([0, 0, 1, 1]))
    result = Result("x", "zeroshot", "top1", 50.0, n=4, chance=25.0, headline=True, items=items)
    RunWriter(tmp_path / "run").write_results(schema.resolve(config), [result])
    read = collect.read(tmp_path / "run")
    assert read.results[0].items.groups.tolist() == [0, 0, 1, 1] and read.steps == read.config.steps
    assert read.complete


def test_sets_that_are_evaluated_after_a_run_are_beside_its_own(tmp_path):
    run = written(tmp_path / "run", tiny.config("clip", steps=4), []).folder
    files = RunReader(run)

    def result(name, value, family="zeroshot"):
        return Result(name, family, "top1", value, n=4, chance=25.0, headline=True, evaluator="zeroshot")

    finish(run, [result("x", 50.0)])
    for step, evaluated in ((2, result("before", 25.0)), (4, result("y", 75.0)), (4, result("x", 25.0))):
        add(run, evaluated, step, profile="openai")
    read = collect.read(run)
    assert [(r.set, r.value) for r in read.results] == [("x", 50.0), ("y", 75.0)]
    assert ">y<br>" in page_of(read, examples.Examples())
    assert [read.step_of(r) for r in read.results] == [None, None]
    content = json.loads(files.config_file.read_text())
    content["config"]["steps"] = 8
    files.config_file.write_text(json.dumps(content))
    read = collect.read(run)
    assert {r.set: (r.value, read.step_of(r)) for r in read.results} == {"x": (50.0, None), "y": (75.0, 4)}


def test_other_options_for_one_set_hide_no_other_set(tmp_path):
    run = written(tmp_path / "run", tiny.config("clip", steps=4), [{"step": 4, "loss": 1.0}], []).folder
    values = {"x": 50.0, "y": 75.0, "z": 25.0}
    for (name, value), changes in zip(values.items(), ({}, {"lower": True}, {"captions": 5}), strict=True):
        result = Result(name, "zeroshot", "top1", value, n=4, chance=25.0, headline=True, evaluator="zeroshot")
        add(run, result, 4, changes=changes)
    read = collect.read(run)
    assert {r.set: r.value for r in read.results} == values
    add(run, dataclasses.replace(read.results[0], value=100.0), 4, profile="slip")
    assert {r.set: r.value for r in collect.read(run).results} == values | {read.results[0].set: 100.0}


# --- evaluations during training


def numbers(name, top1):
    """Results of a set of 10 classes."""
    return zero_shot(name, top1, None, n=100, ways=10)


def evaluate(run, name, top1, step, items=None):
    """Add a result of 100 items to evaluation.json."""
    result = Result(name, "zeroshot", "top1", top1, n=100, chance=10.0, headline=True, evaluator="zeroshot")
    add(run, result, step, items=items)


def tiles(text):
    """{family: number and small print} of the tiles."""
    found = re.findall(r'<div class="card tile"><span class="name">(.*?)</span><b>(.*?)</b>(.*?)</div>', text)
    return {family: (number, unescape(re.sub("<.*?>", " ", rest))) for family, number, rest in found}


def test_a_run_that_is_not_complete_shows_the_newest_result_of_each_set_and_its_step(tmp_path):
    rows = [{"step": step, "loss": 1.0, "clip/loss": 1.0} for step in (10, 20, 40)]
    evaluations = [(step, numbers("x", top1)) for step, top1 in ((20, 2.0), (40, 3.7))]
    run = written(tmp_path / "run", tiny.config("clip", steps=80), rows, evaluations).folder
    for name, top1 in (("x", 1.0), ("y", 55.0)):
        evaluate(run, name, top1, 10, PerExample(np.repeat([1.0, 0.0], [round(top1), 100 - round(top1)])))
    read = collect.read(run)
    text = page_of(read, examples.Examples())
    words = " ".join(check(text).text)
    ((number, details),) = tiles(text).values()
    assert number.startswith("3.7") and details.endswith("x, at step 40 ")
    assert "the newest of its set, with its step" in words
    table = text.partition('id="results"')[2].partition("</section>")[0]
    shown = dict(re.findall(r'<th scope="row">([xy])<br>.*?<small>step ([0-9]+)</small>', table))
    assert shown == {"x": "40", "y": "10"}
    assert [(r.name, r.value, read.step_of(r)) for r in read.results if r.unit] == [
        ("zeroshot/x/top1", 3.7, 40), ("zeroshot/y/top1", 55.0, 10),
    ]  # fmt: skip
    assert [r.items is None for r in read.results if r.unit] == [True, False]  # those of x are of step 10
    evaluate(run, "x", 9.0, 40)  # of equal steps the run's own
    assert [(r.value, collect.read(run).step_of(r)) for r in collect.read(run).results if r.unit] == [(3.7, 40)]


@pytest.mark.parametrize("named", [False, True])
def test_retrieval_alone_does_not_show_how_well_images_are_named(tmp_path, named):
    results = retrieval("r", (50.0,) * 4, (1.0, None, 1.0, None), images=100, captions=100)
    results += zero_shot("z", 50.0, 60.0, n=100, ways=10) if named else []
    run = written(tmp_path / "run", tiny.config("clip", steps=4), [{"step": 4, "loss": 1.0}], [(4, results)]).folder
    assert ("does not show how well images are named" in page_of(collect.read(run), examples.Examples())) != named


def lines_of(text):
    """{name: (steps, values)} of the chart of evaluations."""
    (data,) = re.findall(r'data-chart="([^"]+)"[^>]*><figcaption><b>Evaluation during training', text)
    return {line["name"]: (line["x"], line["y"]) for line in json.loads(unescape(data))["lines"]}


def test_each_step_of_an_evaluation_is_one_point(tmp_path):
    """Also the last, which results.jsonl and results.json have; a set that is evaluated only then has no line."""
    sets = {"folder:/data/a/val": 1.0, "folder:/data/b/val": 50.0}
    rows = [{"step": step, "loss": 1.0, "clip/loss": 1.0} for step in (1, 2, 3)]  # log.every may not divide the steps
    evaluations = [(2, [result for name, top1 in sets.items() for result in numbers(name, top1)])]
    final = {name: top1 + 3 for name, top1 in sets.items()} | {"only_at_the_end": 7.0}
    last = [(4, numbers(name, top1)) for name, top1 in final.items()]
    run = written(tmp_path / "run", tiny.config("clip", steps=4), rows, evaluations + last).folder
    finish(run, [result for _, of_set in last for result in of_set])
    drawn = lines_of(page_of(collect.read(run), examples.Examples()))
    assert drawn == {"folder:a/val, top-1": ([2, 4], [1, 4]), "folder:b/val, top-1": ([2, 4], [50, 53])}
    RunReader(run).results_log_file.write_text(made_results.lines(evaluations))  # results.json has the last
    assert lines_of(page_of(collect.read(run), examples.Examples())) == drawn


def test_a_metric_that_is_not_a_number_is_shown_as_such(tmp_path):
    """JSON has null in its place."""
    rows = [{"step": step, "loss": 1.0, "clip/loss": 1.0} for step in (1, 2)]
    evaluations = [(1, numbers("x", 20.0)), (2, numbers("x", 20.0)), (4, numbers("x", math.nan))]
    run = written(tmp_path / "run", tiny.config("clip", steps=4), rows, evaluations).folder
    finish(run, numbers("x", math.nan) + numbers("y", 40.0))
    assert '"value": null' in RunReader(run).results_file.read_text()
    text = page_of(collect.read(run), examples.Examples())
    check(text)
    shown = re.sub("<pre.*?</pre>", "", text.partition("<main")[2].partition("<script")[0], flags=re.DOTALL)
    assert not re.search(r"\bnan\b", shown)
    assert tiles(text)["zero-shot classification"][0] == "<small>not a number</small>"
    assert re.search(r'<th scope="row">x<br>.*?<td>not a number.*?<th scope="row">y<br>.*?<td>40\.0', shown)
    assert lines_of(text) == {"x, top-1": ([1, 2], [20, 20])}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("data.json", lambda content: [3], r"data\.json is damaged"),
        ("evaluation.json", lambda content: 3, r"evaluation\.json"),
        ("config.json", lambda content: content | {"started": 7}, r"a file of run .* is damaged"),
    ],
)
def test_facts_of_another_type_are_one_sentence(name, change, message, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    file = tmp_path / "run" / name
    file.write_text(json.dumps(change(json.loads(file.read_text()) if file.exists() else None)))
    with pytest.raises(UserError, match=message):
        collect.read(tmp_path / "run")
