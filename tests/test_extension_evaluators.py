"""A kind of set and a kind of evaluator of somebody else's: this file, and no change inside xclip_jax."""

import json

import numpy as np
import pytest

from tests import tiny
from xclip_jax import evaluate
from xclip_jax.errors import UserError
from xclip_jax.evaluators import registry, results, summary
from xclip_jax.evaluators.base import Evaluator, SetKind
from xclip_jax.evaluators.provenance import Provenance
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.report import __main__ as report
from xclip_jax.train import trainer

SPEC = "tests.test_extension_evaluators:Greys"

# --8<-- [start:extension]
# A kind of sets: pairs of grey images, the first of which is darker.


class GreyPairs:
    evaluator = "tests.test_extension_evaluators:SameSide"
    card = Provenance(
        "greys", split_hash="1", protocol="two images of one text are nearer than two of others", metric="same"
    )

    def __init__(self, name, images):
        self.name, self.images = name, images


class Greys(SetKind):
    @classmethod
    def load(cls, spec, prepare, data_dir, profile):
        levels = np.linspace(0, 255, 20).astype(np.uint8)
        return GreyPairs(spec, [np.full((prepare.size, prepare.size, 3), level) for level in levels])


# A kind of evaluators: whether an image is nearer to the next one than to the one after.


class SameSide(Evaluator):
    family = "similarity of images"

    def measure(self, variables):
        z = self.encoder.images(variables, self.data.images, ("embedding",))["embedding"]
        near, far = (np.einsum("ne,ne->n", z[:-2], z[step : len(z) - 2 + step]) for step in (1, 2))
        items = PerExample((near > far).astype(float))
        return [
            self.result("same", items.value(), n=len(near), chance=50.0, items=items),
            self.count("images", len(self.data.images)),
        ]


# --8<-- [end:extension]
# What becomes of them.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("extension")
    sources = (f"folder:{tiny.folder(root / 'pairs')}",)
    trainer.run(tiny.config(run=root / "run", steps=2, data__sources=sources, eval__sets=(SPEC,), eval__every=1))
    return root / "run"


def test_a_run_evaluates_the_set_by_its_name(run):
    record = json.loads((run / "results.json").read_text())
    name = f"similarity of images/{SPEC}"
    assert record["results"].keys() == {f"{name}/same", f"{name}/images"} and record["results"][f"{name}/images"] == 20
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if f"{name}/same" in line] == [1, 2]
    table = summary.render(results.of_run(record)).splitlines()
    assert table[0].split() == ["similarity", "of", "images", "items", "metric", "%"]
    assert table[1].split()[:3] == [SPEC, "18", "same"] and table[1].endswith("(50.0)")


def test_the_command_adds_it_to_its_file_and_compares_it(run, capsys):
    (entry,) = evaluate.evaluate(str(run), SPEC)["results"]
    assert (entry["set"], entry["metric"], entry["n"]) == (SPEC, "same", 18) and entry["protocol"]
    assert 0 <= entry["value"] <= 100 and SPEC in capsys.readouterr().out
    evaluate.evaluate(str(run), SPEC, step=2)
    evaluate.main(["--compare", str(run), str(run)])
    out = capsys.readouterr().out
    assert SPEC in out and "+0.0 to +0.0" in out


def test_the_report_shows_it(run):
    report.main([str(run)])
    page = (run / "report.html").read_text().replace("<wbr>", "")
    assert page.count(SPEC) >= 2 and "similarity of images" in page and "chance (50.0\u00a0%)" in page


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_package.evals:Mine", "module 'no_such_package.evals' cannot be imported"),
        ("tests.test_extension_evaluators:Nothing", "Nothing is not a subclass of .*SetKind"),
        ("tests.test_extension_evaluators:SameSide", "SameSide is not a subclass of .*SetKind"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence(spec, message):
    with pytest.raises(UserError, match=message):
        registry.check(spec)


def test_an_evaluator_that_leads_nowhere_is_one_sentence():
    data = GreyPairs("x", [])
    data.evaluator = "zeroshott"
    with pytest.raises(UserError, match="x: unknown evaluator 'zeroshott'; expected zeroshot, retrieval"):
        registry.evaluator(None, data)
