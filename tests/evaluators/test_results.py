"""Results as records, evaluation.json, and what commands add to it."""

import concurrent.futures
import dataclasses
import fcntl
import json
import pathlib
import threading

import numpy as np
import pytest
from etils import epath

from tests.demo.test_emoji_sets import small_demo  # noqa: F401
from tests.evaluators.test_registry import folder
from tests.helpers.encoding import make_encoder, noise, small_model
from tests.helpers.made_results import entry
from xclip_jax.commands import evaluate
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import registry, results, tables
from xclip_jax.evaluators.results import SHIFTED, Provenance, Result, flat, from_json, to_json
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.report import collect


def added(path, *entries, own=True):
    for x in entries:
        results.add(epath.Path(path), x, {f"{x['name']}/top1": PerExample(np.full(2, x["value"]))}, {}, own=own)
    return results.read(epath.Path(path))


def test_later_commands_add_to_the_file(tmp_path):
    file = tmp_path / "x.json"
    one, two = entry(set="one", step=4), entry(set="two", step=4)
    changes = {"step": 2}, {"profile": "slip"}, {"changes": {"prefix": "a "}}, {"fingerprint": "2"}
    others = [one | change for change in changes]
    added(file, others[0], one, two)
    written = json.loads(file.read_text())
    assert [r["set"] for r in written["results"]] == ["one", "two"] and written["step"] == 4
    assert [r["step"] for r in written["other_results"]] == [2]
    # Other options for one set do not hide the other set.
    added(file, *others[1:3])
    written = json.loads(file.read_text())
    assert [(r["set"], r["changes"]) for r in written["results"]] == [("two", {}), ("one", {"prefix": "a "})]
    added(file, others[3])
    # A repeated one is replaced, and is the one to show again.
    entries, items = added(file, one | {"value": 25.0})
    written = json.loads(file.read_text())
    assert len(entries) == 6 and [(r["set"], r["value"]) for r in written["results"]] == [("two", 50.0), ("one", 25.0)]
    assert (written["step"], written["fingerprint"]) == (4, "1")
    # Every entry still has its items.
    assert [items[x["items"]][f"{x['name']}/top1"].values[0] for x in entries] == [x["value"] for x in entries]


def test_a_folder_may_be_moved(tmp_path):
    one, two = entry(set="one", checkpoint="run"), entry(set="two", checkpoint="moved")
    assert [x["checkpoint"] for x in added(tmp_path / "own.json", one, two)[0]] == ["moved", "moved"]
    added(tmp_path / "all.json", one, two, own=False)
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["checkpoint"] == "moved" and [r["set"] for r in written["results"]] == ["one", "two"]


def test_other_models_stay_in_a_file_of_several(tmp_path):
    one, two = entry(set="one", checkpoint="a"), entry(set="two", checkpoint="b", fingerprint="2")
    added(tmp_path / "all.json", one, two, own=False)
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["checkpoint"] == "b" and [r["set"] for r in written["other_results"]] == ["one"]


def test_another_spelling_of_the_path_is_the_same_model(tmp_path):
    same = [entry(set=name, checkpoint=path) for name, path in (("one", "a"), ("two", "a/"), ("one", "./a"))]
    entries, _ = added(tmp_path / "all.json", *same, own=False)
    assert [(x["set"], x["checkpoint"]) for x in entries] == [("two", "./a"), ("one", "./a")]
    added(tmp_path / "b.json", *(x | {"checkpoint": "b", "fingerprint": "2"} for x in same))
    rows = tables.compare(str(tmp_path / "all.json"), str(tmp_path / "b.json"))
    assert [row["set"] for row in rows] == ["two", "one"]


def test_all_sets_are_opened_before_the_first_is_evaluated(tmp_path):
    with pytest.raises(UserError) as error:
        registry.open_all([f"folder:{tmp_path}/none", "dtd", "birdsnap"], make_encoder(), str(tmp_path))
    expected = (f"folder:{tmp_path}/none", "'dtd:3.0.1'", "birdsnap")
    assert all(name in fault for fault, name in zip(str(error.value).splitlines()[1:], expected, strict=True))


def test_sets_with_one_name_in_results_are_refused():
    address = "retrieval/csv:https://host/export"
    with pytest.raises(UserError, match=f"^{address}: 2 sets differ only in the query") as error:
        registry.open_all([f"{address}?gid=1", "mnist", f"{address}?gid=2"], make_encoder())
    assert "gid" not in str(error.value)


def test_results_are_written_as_soon_as_they_are_there(run, monkeypatch, tmp_path):
    suite = [f"folder:{folder(tmp_path / name, n=1)}" for name in ("one", "with, comma")]
    original = registry.measure

    def killed(evaluator, variables):
        if "comma" in evaluator.name:
            raise KeyboardInterrupt
        return original(evaluator, variables)

    monkeypatch.setattr(registry, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(str(run), suite, output=str(tmp_path / "x.json"))
    assert [r["set"] for r in json.loads((tmp_path / "x.json").read_text())["results"]] == suite[:1]
    assert registry.expand_suites([suite[1], "mnist"]) == (suite[1], "mnist")


# The file.


ITEMS = {
    "zeroshot/x/top1": PerExample(np.array([1.0, 0.0]), np.array([0.5, 2.0])),
    "zeroshot/x/rank": PerExample(np.array([1.0, 4.0, 2.0]), statistic="gmean", groups=np.array([3, 3, 0])),
    "zeroshot/a|b:c%7C d/ü/top1": PerExample(np.arange(3.0), other=np.array([1.0, 3, 2]), statistic="spearman"),
}


def test_items_survive_the_file(tmp_path):
    file = epath.Path(tmp_path / "x.json")
    results.add(file, entry(), ITEMS, {}, own=True)
    (read,), items = results.read(file)
    back = items[read["items"]]
    assert back.keys() == ITEMS.keys() and all(back[key].value() == ITEMS[key].value() for key in ITEMS)
    assert back["zeroshot/x/rank"].groups.tolist() == [3, 3, 0] and back["zeroshot/x/top1"].groups is None


@pytest.mark.parametrize("content", ["", "[]", '{"results": [{"set": "x"}]}'])
def test_damaged_files(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json is not"):
        results.read(epath.Path(tmp_path / "x.json"))


@pytest.mark.parametrize("change", [lambda x: x[: len(x) // 2], lambda x: x.replace(b"\x01", b"\x03")])
def test_damaged_items(change, tmp_path):
    results.add(epath.Path(tmp_path / "x.json"), entry(), ITEMS, {}, own=True)
    file = tmp_path / "x.json.items.npz"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=r"x\.json\.items\.npz is damaged"):
        results.read(epath.Path(tmp_path / "x.json"))


def test_two_commands_that_add_at_the_same_time_lose_nothing(tmp_path):
    both = threading.Barrier(2)  # a lock belongs to an open file, so threads exclude each other like processes

    def add(name):
        both.wait()
        for i in range(5):
            added(tmp_path / "x.json", entry(f"zeroshot/{name}{i}", set=f"{name}{i}"))

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(add, "ab"))
    entries, items = results.read(epath.Path(tmp_path / "x.json"))
    assert {x["set"] for x in entries} == {f"{name}{i}" for name in "ab" for i in range(5)} and len(items) == 10
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.json.items.npz"}


def test_a_lock_that_its_holder_removed_is_taken_again(tmp_path, monkeypatch):
    """Between opening the lock file and locking it another process may finish, and remove it."""
    lock, flock, locked = tmp_path / ".x.json.lock", fcntl.flock, []

    def late(file, how):
        if not locked:
            lock.unlink()
        locked.append(file.name)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    results.add(epath.Path(tmp_path / "x.json"), entry(), {}, {}, own=True)
    assert locked == [str(lock)] * 2 and not lock.exists()


def test_a_kill_between_the_two_files_pairs_no_result_with_items_of_other_data(tmp_path, monkeypatch):
    first = entry(split_hash="1", value=50.0)
    for file in ("a.json", "b.json"):
        added(tmp_path / file, first)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            added(tmp_path / "b.json", first | {"split_hash": "2", "value": 90.0})
    (row,) = tables.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert row["difference"] == 0 and "low" not in row


# Records: their names on disk, their JSON, and their tables


GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "results"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text()), (GOLDEN / f"{name}.txt").read_text()


def text(results):
    return f"{tables.render(results)}\n\n{tables.headlines(results)}\n"


def test_tables_of_records():
    records, expected = golden("others")
    assert text(from_json(records)) == expected


def test_the_demo_has_the_names_and_the_tables_that_it_had(small_demo):  # noqa: F811
    content, expected = golden("demo")
    values, results = content["results"], []
    for evaluator in registry.open_all(
        list(dict.fromkeys("/".join(x.split("/")[1:3]) for x in values)), make_encoder()
    ):
        results += registry.measure(evaluator, small_model()[1])
    assert sorted(flat(results)) == sorted(values)
    # With the values of the file, of which ties may be another matter on another machine.
    by_name = {result.name: result for result in results}
    known = [dataclasses.replace(by_name[name], value=value) for name, value in values.items()]
    assert text(known) == expected
    assert text(from_json(json.loads(json.dumps(to_json(known))))) == expected
    assert sum(result.headline for result in results) == len({(r.family, r.set) for r in results})


def test_a_record_has_its_name_and_survives_json():
    fields = {"task": "category", "score": "both", "group": "noto", "n": 3, "chance": 0.5, "headline": True}
    protocol = Provenance(role=SHIFTED, split_hash="1", protocol="the nearest class", templates="a {c} | {c}")
    result = Result("emoji/x", "zeroshot", "top1", 12.5, protocol=protocol, **fields)
    assert flat([result]) == {"zeroshot/emoji/x/category/both/noto/top1": 12.5}
    (back,) = from_json([{**record, "of a later version": 1} for record in to_json([result])])
    assert {key: getattr(back, key) for key in fields} == fields and back.protocol == protocol
    assert (back.set, back.family, back.metric, back.value, back.unit) == ("emoji/x", "zeroshot", "top1", 12.5, "%")


def test_precision_is_no_share_of_the_items():
    """A binomial interval over the images would be several times too narrow for a mean average precision."""
    labels = np.random.default_rng(0).random((40, 3)) < 0.3
    data = ZeroShotSet("voc", noise(40), labels, [["a"], ["b"], ["c"]], card=Provenance(metric="map"))
    measured = ZeroShot(make_encoder(8, 0), data).measure(small_model(8, 0)[1])
    assert {x.metric: x.unit for x in measured} == {"n": "", "ways": "", "map": "x 100", "map11": "x 100"}
    (without,) = from_json(to_json(measured[-1:]))  # results.json has no values of items
    assert str(collect.judge(measured[-1])) and str(collect.judge(without)) == ""


def test_results_of_a_family_without_a_layout_have_their_headline():
    results = [
        Result("a", "colour", "hue", 30.0, n=50, chance=10.0),
        Result("a", "colour", "lightness", 45.5, n=50, headline=True),
        Result("b", "colour", "hue", 1.2, unit="radians", n=5, headline=True),
    ]
    lines = [line.split() for line in tables.render(results).splitlines()[1:]]
    assert lines == [["a", "lightness", "45.5"], ["b", "hue,", "radians", "1.2"]]
