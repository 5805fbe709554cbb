"""The page of several runs."""

import dataclasses
import json
import re
from html import unescape

import numpy as np
import pytest
from PIL import Image

from examples import superclip as extension  # noqa: F401 the files of a run may name its term
from tests.helpers import tiny
from tests.helpers.made_results import retrieval, zero_shot
from tests.helpers.pages import HOSTILE, check, page_of, written
from xclip_jax.commands import report as command
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.evaluators import results as results_files
from xclip_jax.evaluators.results import Provenance, Result, from_json, to_json
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.report import collect, examples, page, sections
from xclip_jax.report.collect import Run

pytestmark = pytest.mark.long

SECTIONS = ("results", "differences", "names", "search", "curves", "settings")


def run(folder, color, right, *, objective="clip", split="1", **changes):
    """A run with logged steps, and an evaluation of 100 images of which the first `right` are."""
    rows = [
        {"step": s, "loss": right / s, f"{objective}/loss": right / s, "lr": 1e-3, "grad_norm": 1.0} for s in (1, 2, 3)
    ]
    evaluations = [(step, zero_shot("x", step * right / 3, None, n=100)) for step in (2, 3)]
    written(folder, tiny.config(objective, run=folder, **changes), rows, evaluations)
    values = np.repeat([1.0, 0.0], [right, 100 - right])
    result = Result("x", "zeroshot", "top1", float(right), n=100, chance=25.0, headline=True, evaluator="zeroshot")
    entry = {"set": "x", "name": "zeroshot/x", "metric": "top1", "value": float(right), "n": 100, "step": 3}
    entry |= {"records": to_json([result]), "metrics": {"top1": float(right)}, "checkpoint": folder.name}
    entry |= {"profile": "", "changes": {}, "split_hash": split, "fingerprint": folder.name}
    file = RunReader(folder).evaluation_file
    results_files.add(file, entry, {result.name: PerExample(values)}, {}, own=True)
    return Run(folder.name, color, collect.read(folder), examples.Examples())


def predicted(answers):
    """Examples with an image of each answer's right name, and the best names."""
    images = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(len(answers))]
    guesses = [
        examples.Prediction(image, name, 1 if best[0] == name else 2, [
            examples.ScoredLabel(label, 0.5, "50 %", label == name) for label in best
        ])
        for image, (name, best) in zip(images, answers, strict=True)
    ]  # fmt: skip
    gallery = examples.Gallery(images, images, [name for name, _ in answers])
    searched = [examples.SearchResult("red", [1, 0], [])]
    panel = examples.ZeroShotExamples("Animals", "Of 3 names.", 3, guesses)
    return examples.Examples(named=[panel], gallery=gallery, searches=searched)


def compared(folder):
    """Three runs, of which the second is the best and the third is not above chance."""
    of_each = enumerate((("a", 40), (HOSTILE[:9], 70), ("c", 26)))
    return [run(folder / name, i, right) for i, (name, right) in of_each]


def test_a_page_of_three_runs(tmp_path):
    best = [[("fox", ["fox", "hen"]), ("hen", ["fox", "hen"])], [("fox", ["hen", "fox"]), ("hen", ["hen", "fox"])]]
    shown = [
        dataclasses.replace(x, examples=predicted(p)) for x, p in zip(compared(tmp_path), (*best, best[0]), strict=True)
    ]
    text = page.render(shown)
    words = " ".join(check(text, SECTIONS).text)
    assert "3 runs side by side" in words
    # results: bold is the best, each with its verdict
    assert "<b>70.0</b>" in text and text.count("<b>40.0</b>") == 0
    row = re.search(r'<tr><th scope="row">x<br>.*?</tr>', text)[0]
    assert re.findall(r'pill([a-z ]*)">([a-z ]+)<', row) == [
        (" above", "above chance"), (" above", "above chance"), ("", "not distinguishable from chance"),
    ]  # fmt: skip
    # differences to the first: 30 more are right, 14 fewer
    bars = re.findall(r'<td>([+-][0-9.]+)</td><td class="bar"><svg class="forest([a-z ]*)"', text)
    assert bars == [("+30.0", " above"), ("-14.0", " below")]
    assert "better" in words and "worse" in words and "two seeds of one recipe may differ by more" in words
    # predictions of the same image beside one another
    card = re.search(r'<article class="card guess">.*?</article>', text)[0]
    assert card.count('class="run c') == 3 and card.count('class="bars"') == 3 and card.count('class="im ') == 1
    assert re.findall(r"<small[^>]*>(right|rank 2 of 3)</small>", card) == ["right", "rank 2 of 3", "right"]
    assert text.count('<q title="red">red</q>') == 1
    # curves over one another
    (loss,) = [json.loads(unescape(x)) for x in
               re.findall(r'<figure[^>]*data-chart="([^"]+)"[^>]*><figcaption><b>CLIP loss', text)]  # fmt: skip
    assert [line["name"] for line in loss["lines"]] == ["a", HOSTILE[:9], "c"]
    assert [line["color"] for line in loss["lines"]] == [0, 1, 2] and loss["lines"][1]["y"][0] == 70
    assert "<b>x, top-1</b>" in text and "All of" in words and "config keys are equal" in words


def test_what_differs_is_listed_and_what_cannot_be_compared_is_said(tmp_path):
    a = run(tmp_path / "a", 0, 40)
    b = run(tmp_path / "b", 1, 50, split="2", objective="siglip", data__batch=8, optim__lr=1.001e-3)
    text = page.render([a, dataclasses.replace(b, step=2, examples=predicted([("fox", ["fox"])]))])
    words = " ".join(check(text, SECTIONS).text)
    assert "x is not the same in" in words and "split_hash" in words and "forest" not in text.partition("<main")[2]
    rows = dict(re.findall(r'<tr><th scope="row">([^/]+?)</th>(.*?)</tr>', text))
    assert rows["optim.lr"] == "<td>0.001</td><td>0.001001</td>" and rows["data.batch"] == "<td>16</td><td>8</td>"
    assert "Predictions of b are by the checkpoint of step 2." in words and "Predictions of a" not in words
    assert "Batch sizes differ, so steps are not comparable: a 16, b 8." in words
    assert "No evaluation set has images and texts" in words
    RunReader(tmp_path / "b").evaluation_file.unlink()
    assert f"{tmp_path / 'b'}/evaluation.json does not exist; make it" in page.render([a, b])


def test_levels_that_differ_between_runs_are_left_out(tmp_path):
    """ln b of batches of 16 and of 8."""
    runs = [run(tmp_path / name, i, 40) for i, name in enumerate("ab")]
    for levels, shown in (((2.77, 2.77), 1), ((2.77, 2.08), 0)):
        for one, level in zip(runs, levels, strict=True):
            for row in one.record.training:
                row["clip/ln_b"] = level
        assert page.render(runs).count(">ln b</span>") == shown


def test_differences_of_earlier_steps_name_them(tmp_path):
    """Each was evaluated at step 3, after which the second went on."""
    runs = [run(tmp_path / name, i, right) for i, (name, right) in enumerate((("a", 40), ("b", 70)))]
    assert "<small>step 3</small>" not in page.render(runs).partition('id="differences"')[2].partition("</section>")[0]
    with RunReader(tmp_path / "b").metrics_file.open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 1.0, "clip/loss": 1.0}) + "\n")
    runs[1] = dataclasses.replace(runs[1], record=collect.read(tmp_path / "b"))
    row = page.render(runs).partition('id="differences"')[2].partition("</section>")[0]
    assert row.count("<br><small>step 3</small>") == 2


def test_differences_without_values_of_items_have_no_interval(tmp_path):
    runs = [run(tmp_path / name, i, right) for i, (name, right) in enumerate((("a", 40), ("b", 70)))]
    RunReader(tmp_path / "b").evaluation_file.with_name("evaluation.json.items.npz").unlink()
    text = page.render(runs)
    check(text, SECTIONS)
    row = text.partition('id="differences"')[2].partition("</section>")[0]
    assert "<td>+30.0</td>" in row and "<small>no per-item values</small>" in row and "pill" not in row


def test_sets_of_two_families_that_share_a_name_have_a_row_and_a_chart_each(tmp_path):
    """`retrieval/holdout` and `zeroshot/holdout` are both called holdout, as are those of `retrieval/folder:X`."""
    shared = {"unit": "%", "n": 100, "chance": 1.0}
    names, runs = ("holdout", "folder:/data/x"), []
    for color, name in enumerate("ab"):
        one = run(tmp_path / name, color, 40)
        results = [Result(of, "zeroshot", "top1", 60.0 + color, evaluator="zeroshot", **shared) for of in names]
        results += [
            Result(of, "retrieval", f"{way}/r{k}", 20.0 + color, evaluator="retrieval", **shared)
            for of in names for way in ("image_to_text", "text_to_image") for k in (1, 5)
        ]  # fmt: skip
        changed = dataclasses.replace(one.record, results=results, evaluations=[(step, results) for step in (2, 3)])
        runs.append(dataclasses.replace(one, record=changed))
    text = page.render(runs)
    check(text, SECTIONS)
    table = text.replace("<wbr>", "").partition('<table class="several">')[2].partition("</table>")[0]
    rows = re.findall(r'<tr><th scope="row">(.*?)<br>.*?<b>([0-9.]+)</b>', table)
    assert rows == [
        ("held-out pairs (zero-shot classification)", "61.0"), ("folder:x (zero-shot classification)", "61.0"),
        ("held-out pairs (retrieval)", "21.0"), ("folder:x (retrieval)", "21.0"),
    ]  # fmt: skip
    charts = re.findall(r"<figcaption><b>((?:held-out pairs|folder:x) \([a-z -]+\)),", text)
    assert charts == [name for name, _ in rows]


def test_what_the_given_weights_could_do_is_beside_the_result(tmp_path):
    """Evaluated before the first step: 30, and at the end: 50; the other set only at the end."""
    evaluations = [(0, zero_shot("x", 30.0)), (9, [*zero_shot("x", 50.0), *retrieval("y")])]
    rows = [{"step": 9, "loss": 1.0, "clip/loss": 1.0}]
    record = written(tmp_path / "run", tiny.config("clip", steps=9), rows, evaluations)
    text = page_of(record, examples.Examples())
    table = text.partition('<table class="several">')[2].partition("</table>")[0] or text
    assert re.findall(r"<small>before training ([0-9.]+)</small>", table) == ["30.0"]
    assert "before training 30.0" in text.partition("<table")[0]
    # A run that only has the results before its first step has no others to compare.
    first = written(tmp_path / "first", tiny.config("clip", steps=9), [], evaluations[:1])
    assert "before training" not in page_of(first, examples.Examples())


def test_a_result_that_is_not_a_number_is_not_the_best(tmp_path, monkeypatch):
    a, b = (run(tmp_path / name, i, 40) for i, name in enumerate("ab"))
    undefined = [dataclasses.replace(b.record.results[0], value=float("nan"), items=None)]
    row = {"set": "x", "metric": "top1", "unit": "%", "a": 40.0, "b": float("nan"), "difference": float("nan")}
    row |= {"step_a": 3, "step_b": 3}
    monkeypatch.setattr(sections.tables, "compare", lambda *_, **__: [row])
    text = page.render([a, dataclasses.replace(b, record=dataclasses.replace(b.record, results=undefined))])
    table = text.partition('<table class="several">')[2].partition("</table>")[0]
    assert "<td>not a number" in table and "nan<" not in table and "<td>40.0" in table
    differences = text.partition('id="differences"')[2].partition("</section>")[0]
    assert "<td>40.0</td><td>not a number</td><td>not a number</td>" in differences and "nan" not in differences


def test_held_out_pairs_are_those_of_the_first_run(tmp_path, monkeypatch):
    pairs = tiny.folder(tmp_path / "pairs", 40)
    changes = {"data__sources": (f"folder:{pairs}",), "data__holdout": 0.25, "eval__sets": ("retrieval/holdout",)}
    tiny.untrained(tmp_path / "a", "clip", **changes)
    tiny.untrained(tmp_path / "b", "clip", **changes | {"data__holdout": 0.5})
    shares = []
    monkeypatch.setattr(page, "collect_examples", lambda *args, **options: shares.append(
        options["data"].holdout) or examples.collect_examples(*args, **options))  # fmt: skip
    command.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "x.html")])
    words = " ".join(check((tmp_path / "x.html").read_text(), SECTIONS).text)
    assert shares == [0.25, 0.25]
    assert "holds out no pairs" not in words and "Captions of held-out pairs" in words
    assert "come from a; b learned from data" in words


def test_images_that_differ_are_not_put_side_by_side(tmp_path):
    one, other = run(tmp_path / "a", 0, 40), run(tmp_path / "b", 1, 40)
    one = dataclasses.replace(one, examples=predicted([("fox", ["fox"])]))
    other = dataclasses.replace(other, examples=predicted([("hen", ["hen"])]))
    ((_, _, ((block,),), _),) = sections.names([one, other]).content
    assert block[0] is one and block[1].name == "fox"


def test_names_of_runs():
    assert command.short_names(["runs/a/", "runs/b"]) == ["a", "b"]
    assert command.short_names(["x/1/run", "y/1/run", "z"]) == ["x/1/run", "y/1/run", "z"]
    with pytest.raises(UserError, match="run 'a/' is named twice"):
        command.short_names(["a", "a/"])
    with pytest.raises(UserError, match="9 runs are named; a page shows at most 8"):
        command.short_names(list("abcdefghi"))


def test_the_command_writes_a_page_of_trained_runs(tmp_path, monkeypatch, capsys):
    """Of untrained models: predictions on a set that both name, where one has no checkpoint a sentence."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"set/{label}/{i}.png")
    sets = {"eval__sets": (f"folder:{tmp_path / 'set'}",)}
    tiny.untrained(tmp_path / "a", "clip", **sets)
    tiny.untrained(tmp_path / "b", "nclip", **sets)
    monkeypatch.chdir(tmp_path)
    command.main(["a", "b"])
    assert "report: comparison.html" in capsys.readouterr().out
    text = (tmp_path / "comparison.html").read_text()
    words = " ".join(check(text, SECTIONS).text)
    assert text.count('<div class="by">') == 2 * 2 and "None yet; evaluate with" in words
    assert "objective.terms" in words.replace("\u200b", "")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    command.main(["a", "c", "--output", "x.html"])
    assert "holds no checkpoint" in " ".join(check((tmp_path / "x.html").read_text(), SECTIONS).text)


def test_results_of_other_data_are_neither_ranked_nor_under_the_chance_of_the_first(tmp_path):
    def result(value, n, chance, split_hash):
        card = Provenance(split_hash=split_hash)
        return Result("holdout", "retrieval", "image_to_text/r1", value, n=n, chance=chance, protocol=card)

    runs = [run(tmp_path / name, i, 40) for i, name in enumerate("ab")]

    def cells(*results):
        records = [dataclasses.replace(one.record, results=[own]) for one, own in zip(runs, results, strict=True)]
        text = page.render([dataclasses.replace(one, record=own) for one, own in zip(runs, records, strict=True)])
        return text.partition('<table class="several">')[2].partition("</table>")[0].split("<td>")[2:]

    a, b = cells(result(2.4, 166, 0.6, "x"), result(5.6, 18, 5.6, "y"))
    assert "<b>" not in a + b and "other data, chance 5.6" in b and "other data" not in a
    a, b = cells(result(2.4, 166, 0.6, "x"), result(5.6, 166, 0.6, "x"))
    assert "<b>5.6</b>" in b and "other data" not in a + b
    a, b = cells(result(2.4, 166, 0.6, "x"), result(5.6, 166, 0.6, "y"))
    assert "<b>" not in a + b and "other data" in b
    (back,) = from_json(to_json([result(2.4, 166, 0.6, "x")]))
    assert back.protocol.split_hash == "x"
