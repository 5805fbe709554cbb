"""The page of several runs."""

import dataclasses
import json
import re
import resource
from html import unescape

import numpy as np
import pytest

from examples import superclip as extension  # noqa: F401 the files of a run may name its term
from tests.helpers import tiny
from tests.helpers.made_results import zero_shot
from tests.helpers.pages import HOSTILE, check, written
from tests.report.test_collect import add
from xclip_jax.commands import report as command
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.report import collect, examples, page, sections
from xclip_jax.report.collect import Run
from xclip_jax.report.page import MARK

pytestmark = pytest.mark.long

SECTIONS = ("results", "differences", "names", "search", "curves", "settings")


def run(folder, color, right, *, objective="clip", split="1", **changes):
    """A run with logged steps, and an evaluation of 100 images of which the first `right` are."""
    rows = [
        {"step": s, "loss": right / s, f"{objective}/loss": right / s, "lr": 1e-3, "grad_norm": 1.0} for s in (1, 2, 3)
    ]
    evaluations = [(step, zero_shot("x", step * right / 3, None, n=100)) for step in (2, 3)]
    of_data = Provenance(split_hash=split)
    evaluations = [(step, [dataclasses.replace(x, protocol=of_data) for x in found]) for step, found in evaluations]
    written(folder, tiny.config(objective, run=folder, **changes), rows, evaluations)
    values = np.repeat([1.0, 0.0], [right, 100 - right])
    result = Result("x", "zeroshot", "top1", float(right), n=100, chance=25.0, headline=True, evaluator="zeroshot")
    add(folder, result, 3, items=PerExample(values), n=100, split_hash=split, fingerprint=folder.name)
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
    # results, each with its verdict
    row = re.search(r'<tr><th scope="row">x<br>.*?</tr>', text)[0]
    assert re.findall(r"<td>([0-9.]+) <small>chance 25.0<", row) == ["40.0", "70.0", "26.0"]
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
    assert [(line["name"], line["color"], line["y"][0]) for line in loss["lines"]] == [
        ("a", 0, 40), (HOSTILE[:9], 1, 70), ("c", 2, 26)
    ]  # fmt: skip
    assert "<b>x, top-1</b>" in text and "0 of" in words and "config keys differ" in words


def test_what_differs_is_listed_and_what_cannot_be_compared_is_said(tmp_path):
    a = run(tmp_path / "a", 0, 40)
    b = run(tmp_path / "b", 1, 50, split="2", objective="siglip", data__batch=8, optim__lr=1.001e-3)
    text = page.render([a, dataclasses.replace(b, step=2, examples=predicted([("fox", ["fox"])]))])
    words = " ".join(check(text, SECTIONS).text)
    assert "x is not the same in" in words and "split_hash" in words and "forest" not in text.partition("<main")[2]
    rows = dict(re.findall(r'<tr><th scope="row">([^/]+?)</th>(.*?)</tr>', text))
    assert rows["optim.lr"] == "<td>0.001</td><td>0.001001</td>" and rows["data.batch"] == "<td>16</td><td>8</td>"
    assert "Predictions of b are by the checkpoint of step 2." in words and "Predictions of a" not in words
    assert "No evaluation set has images and texts" in words
    assert "; the runs&#39; data differ" in text
    RunReader(tmp_path / "b").evaluation_file.unlink()
    assert "make it with xclip-jax evaluate --checkpoint RUN --suite NAME" in page.render([a, b])


def differences(runs):
    return page.render(runs).partition('id="differences"')[2].partition("</section>")[0]


def test_differences_of_earlier_steps_and_without_values_of_items(tmp_path):
    """Each was evaluated at step 3, after which the second went on."""
    runs = [run(tmp_path / name, i, right) for i, (name, right) in enumerate((("a", 40), ("b", 70)))]
    assert "<small>step 3</small>" not in differences(runs)
    with RunReader(tmp_path / "b").metrics_file.open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 1.0, "clip/loss": 1.0}) + "\n")
    runs[1] = dataclasses.replace(runs[1], record=collect.read(tmp_path / "b"))
    assert differences(runs).count("<br><small>step 3</small>") == 2
    RunReader(tmp_path / "b").evaluation_file.with_name("evaluation.json.items.npz").unlink()
    row = differences(runs)
    assert "<td>+30.0</td>" in row and "<small>no per-item values</small>" in row and "pill" not in row


def test_a_result_that_is_not_a_number(tmp_path, monkeypatch):
    a, b = (run(tmp_path / name, i, 40) for i, name in enumerate("ab"))
    undefined = [dataclasses.replace(b.record.results[0], value=float("nan"), items=None)]
    row = {"set": "x", "metric": "top1", "unit": "%", "a": 40.0, "b": float("nan"), "difference": float("nan")}
    row |= {"step_a": 3, "step_b": 3}
    monkeypatch.setattr(sections.tables, "compare", lambda *_, **__: [row])
    runs = [a, dataclasses.replace(b, record=dataclasses.replace(b.record, results=undefined))]
    table = page.render(runs).partition('<table class="several">')[2].partition("</table>")[0]
    assert "<td>not a number" in table and "nan<" not in table and "<td>40.0" in table
    assert "<td>40.0</td><td>not a number</td><td>not a number</td>" in differences(runs)


def test_the_command_writes_a_page_of_runs(tmp_path, monkeypatch, capsys):
    """Of untrained models on held-out pairs, templates and names of the first; one has no checkpoint."""
    pairs, sets = tmp_path / "pairs", ("retrieval/holdout", "zeroshot/holdout")
    for seed, label in enumerate(("fox", "hen")):
        tiny.folder(pairs / label, 20, seed=seed)
    changes = {"data__sources": (f"folder:{pairs}",), "data__holdout": 0.25, "eval__sets": sets}
    (tmp_path / "names.json").write_text('{"fox": "a red fox"}')
    own = {"eval__templates": ("art of {c}",), "eval__class_names": str(tmp_path / "names.json")}
    tiny.untrained(tmp_path / "a", "clip", **changes, **own)
    tiny.untrained(tmp_path / "b", "nclip", **changes | {"data__holdout": 0.5})
    (tmp_path / "names.json").unlink()  # the run has a copy
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    prompts = []
    monkeypatch.setattr(command, "collect_examples", lambda *args, **options: prompts.append(
        registry.load("zeroshot/holdout", 16, profile=options["profile"], data=options["data"]).prompts
    ) or examples.collect_examples(*args, **options))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command.main(["a", "b", "c"])
    assert capsys.readouterr().out.endswith("comparison.html\n")
    text = (tmp_path / "comparison.html").read_text()
    words = " ".join(check(text, SECTIONS).text)
    assert prompts == [[["art of a red fox"], ["art of hen"]]] * 2
    assert "holds out no pairs" not in words and "holds no checkpoint" in words
    cards = re.findall(r'<article class="card guess">.*?</article>', text)
    assert cards and all(card.count('<div class="by">') == 2 for card in cards)
    assert "None yet; evaluate with" in words and "objective.terms" in words.replace("\u200b", "")


def test_a_page_that_the_disk_refuses_leaves_the_former_one(tmp_path):
    folder, page = run(tmp_path / "a", 0, 40).record.folder, tmp_path / "page.html"
    former = f"{MARK} former"
    page.write_text(former)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"^error: '.*page\.html': File too large"):
            command.main([str(folder), "--output", str(page)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert page.read_text() == former and list(tmp_path.glob(".*")) == []


def test_images_that_differ_are_not_put_side_by_side(tmp_path):
    one, other = run(tmp_path / "a", 0, 40), run(tmp_path / "b", 1, 40)
    one = dataclasses.replace(one, examples=predicted([("fox", ["fox"])]))
    other = dataclasses.replace(other, examples=predicted([("hen", ["hen"])]))
    ((_, _, ((block,),), _),) = sections.names([one, other]).content
    assert block[0] is one and block[1].name == "fox"


def test_names_of_runs():
    assert command.short_names(["runs/a/", "runs/b"]) == ["a", "b"]
    assert command.short_names(["x/1/run", "y/1/run", "z"]) == ["x/1/run", "y/1/run", "z"]
    for runs in (["a", "a/"], list("abcdefghi")):
        with pytest.raises(UserError):
            command.short_names(runs)
