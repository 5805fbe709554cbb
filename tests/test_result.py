"""Results as records: their names on disk, their JSON, and their tables."""

import dataclasses
import json
import pathlib

import numpy as np

from tests.encoding import make_encoder, small_model
from tests.test_sets import small_demo  # noqa: F401
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.base import unit_of
from xclip_jax.evaluators.results import SHIFTED, Provenance, Result, flat, from_json, items, to_json
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.report import chance

GOLDEN = pathlib.Path(__file__).parent / "golden" / "results"


def golden(name):
    """Results and their tables."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), (GOLDEN / f"{name}.txt").read_text()


def text(results):
    return f"{tables.render(results)}\n\n{tables.headlines(results)}\n"


def test_tables_of_records():
    records, expected = golden("others")
    assert text(from_json(records)) == expected


def test_the_demo_has_the_names_and_the_tables_that_it_had(small_demo):  # noqa: F811
    content, expected = golden("demo")
    values, results = content["results"], []
    for spec in dict.fromkeys("/".join(name.split("/")[1:3]) for name in values):
        results += registry.measure(registry.make(spec, make_encoder()), small_model()[1])
    assert sorted(flat(results)) == sorted(values)
    # With the values of the file, of which ties may be another matter on another machine.
    by_name = {result.name: result for result in results}
    known = [dataclasses.replace(by_name[name], value=value) for name, value in values.items()]
    assert text(known) == expected
    assert text(from_json(json.loads(json.dumps(to_json(known))))) == expected
    assert sum(result.headline for result in results) == len({(r.family, r.set) for r in results})


def test_a_record_has_its_name_and_survives_json():
    fields = {"task": "category", "score": "both", "group": "noto", "n": 3, "chance": 0.5, "headline": True}
    result = Result("emoji/x", "zeroshot", "top1", 12.5, protocol=Provenance(role=SHIFTED), **fields)
    assert flat([result]) == {"zeroshot/emoji/x/category/both/noto/top1": 12.5}
    (back,) = from_json([{**record, "of a later version": 1} for record in to_json([result])])
    assert {key: getattr(back, key) for key in fields} == fields and back.protocol.role == SHIFTED
    assert (back.set, back.family, back.metric, back.value, back.unit) == ("emoji/x", "zeroshot", "top1", 12.5, "%")


def test_precision_and_correlations_are_no_shares_of_the_items():
    """A binomial interval over the images would be several times too narrow for a mean average precision."""
    rng = np.random.default_rng(0)
    labels, pixels = rng.random((40, 3)) < 0.3, list(rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    data = ZeroShotSet("voc", pixels, labels, [["a"], ["b"], ["c"]], card=Provenance(metric="map"))
    results = ZeroShot(make_encoder(8, 0), data).measure(small_model(8, 0)[1])
    units = {result.metric: result.unit for result in results}
    assert units == {"n": "", "ways": "", "map": "x 100", "map11": "x 100"}
    first = next(result for result in results if result.metric == "map11")
    assert chance.judge(first).resampled and str(chance.judge(first))
    # results.json has no values of items.
    (without,) = from_json(to_json([first]))
    assert without.unit == "x 100" and str(chance.judge(without)) == ""
    assert [unit_of(metric) for metric in ("linear/matthews", "roc_auc", "top1_top5", "f1", "spearman_all")] == [
        "x 100", "x 100", "%", "%", "x 100"
    ]  # fmt: skip


def test_items_go_by_the_name_of_their_result():
    of = PerExample(np.ones(2))
    results = [Result("x", "zeroshot", "top1", 100, items=of), Result("x", "zeroshot", "n", 2, unit="")]
    assert items(results) == {"zeroshot/x/top1": of}


def test_results_of_a_family_without_a_layout_have_a_line_each():
    results = [
        Result("a", "colour", "hue", 30.0, n=50, chance=10.0),
        Result("a", "colour", "n", 50.0, unit=""),
        Result("a", "colour", "lightness", 45.5, n=50, headline=True),
        Result("b", "colour", "hue", 20.0, n=5),
    ]
    table, families = tables.build(results)[0], tables.families(results)
    assert table.rows == [
        ("a", ["50", "lightness", "45.5", ""]),
        ("  the same", ["", "hue", "30.0", "(10.0)"]),
        ("b", ["5", "hue", "20.0", ""]),
    ]
    assert families.rows == [("colour", ["a", "lightness", "45.5", ""])]
