"""Sets and an evaluator of another package, `tests.extension.greys`, without a change inside xclip_jax."""

import dataclasses
import json

import pytest

from tests.extension import greys
from tests.helpers import tiny
from xclip_jax.commands import evaluate, report
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import registry, results, tables
from xclip_jax.train import trainer

pytestmark = pytest.mark.long

SPEC = "tests.extension.greys:Greys/20"
NAME = f"order of images/{SPEC}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("extension")
    sources = (f"folder:{tiny.folder(root / 'pairs')}",)
    trainer.run(tiny.config(run=root / "run", steps=2, data__sources=sources, eval__sets=(SPEC,), eval__every=1))
    return root / "run"


def check_table(shown):
    """The table of the evaluator's own layout."""
    head, row = tables.render(shown).splitlines()[:2]
    assert head.split() == ["order", "of", "images,", "%", "images", "nearer"]
    assert row.split()[:2] == [SPEC, "20"] and row.endswith("(50.0)")
    assert tables.headlines(shown).startswith(f"{SPEC} nearer ")


def test_a_run_evaluates_the_set_by_its_name(run):
    record = json.loads((run / "results.json").read_text())
    assert record["results"].keys() == {f"{NAME}/nearer", f"{NAME}/images"}
    assert record["results"][f"{NAME}/images"] == 20
    assert [line["step"] for line in tiny.lines(run) if f"{NAME}/nearer" in line] == [1, 2]
    check_table(results.from_json(record["records"]))


def test_the_command_adds_it_to_its_file_and_compares_it(run, capsys):
    (entry,) = evaluate.evaluate(str(run), SPEC)["results"]
    assert (entry["set"], entry["metric"], entry["n"]) == (SPEC, "nearer", 18) and entry["protocol"]
    assert 0 <= entry["value"] <= 100 and "order of images, %" in capsys.readouterr().out
    evaluate.evaluate(str(run), SPEC, step=2)
    check_table(results.read_entries(json.loads((run / "evaluation.json").read_text())["results"]))
    evaluate.main(["--compare", str(run), str(run)])
    out = capsys.readouterr().out
    assert SPEC in out and "+0.0 to +0.0" in out


def test_the_report_shows_it(run):
    report.main([str(run)])
    page = (run / "report.html").read_text().replace("<wbr>", "")
    assert page.count(SPEC) >= 2 and "order of images, %" in page and "next one nearer" in page
    assert "chance 50.0\u00a0%" in page and '<span class="pill' in page


def test_results_without_their_evaluator_have_their_headline(run):
    record = json.loads((run / "results.json").read_text())
    records = results.from_json(record["records"])
    shown = [dataclasses.replace(result, evaluator="not_installed.here:Neighbours") for result in records]
    head, row = tables.render(shown).splitlines()[:2]
    assert head.split() == ["order", "of", "images", "own", "metric", "value"]
    assert row.split()[:2] == [SPEC, "nearer"]


def test_an_unknown_kind_of_sets_and_an_unknown_evaluator_are_one_sentence():
    with pytest.raises(UserError, match=r"greys:Neighbours' is not a class derived from .*SetKind"):
        registry.check("tests.extension.greys:Neighbours")
    data = greys.GreyImages("x", [])
    for name, message in (("zeroshott", "name of a class"), ("tests.extension.greys:Greys", "derived .*Evaluator")):
        data.evaluator = name
        with pytest.raises(UserError, match=rf"evaluator .*{name}' is not .*{message}"):
            registry.evaluator(None, data)
