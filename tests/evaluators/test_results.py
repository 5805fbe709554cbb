"""Results as records, evaluation.json, and what commands add to it."""

import dataclasses
import errno
import fcntl
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from etils import epath

from tests.demo.test_emoji_sets import small_demo  # noqa: F401
from tests.helpers.encoding import make_encoder, small_model
from tests.helpers.made_results import entry
from xclip_jax.commands import evaluate
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.evaluators import registry, results, tables
from xclip_jax.evaluators.results import SHIFTED, Provenance, Result, flat, from_json, to_json
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.report import card as model_card
from xclip_jax.report import collect

STEPS = 4


@pytest.fixture(scope="module")
def root(trained, tmp_path_factory):
    """A run with two checkpoints, and three folders of pictures in two classes."""
    root = tmp_path_factory.mktemp("results")
    shutil.copytree(trained, root / "run")
    rng = np.random.default_rng(0)
    for name in ("one", "two", "with, comma"):
        for label in ("cat", "dog"):
            (root / name / label).mkdir(parents=True)
            for i in range(5):
                image = PIL.Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
                image.save(root / name / label / f"{i}.png")
    return root


def entries(path):
    return {
        (entry["set"].rpartition("/")[2], entry["step"], entry["profile"], json.dumps(entry["changes"]))
        for entry in results.read(epath.Path(path))[0]
    }


def test_later_commands_add_to_the_file(root):
    run, one, two = str(root / "run"), f"folder:{root / 'one'}", f"folder:{root / 'two'}"
    file = root / "run" / "evaluation.json"
    file.unlink(missing_ok=True)
    evaluate.evaluate(run, one, step=2)
    evaluate.evaluate(run, one)
    evaluate.evaluate(run, two)
    written = json.loads(file.read_text())
    assert [r["set"] for r in written["results"]] == [one, two] and written["step"] == STEPS
    assert [r["step"] for r in written["other_results"]] == [2]
    # What shows the newest shows both, and nothing of the earlier step.
    assert flat(results.read_entries(written["results"])).keys() == {
        f"{r['name']}/{key}" for r in written["results"] for key in r["metrics"]
    }
    evaluate.evaluate(run, one, profile="slip")
    evaluate.evaluate(run, one, changes={"prefix": "a "})
    assert entries(file) == {
        ("one", 2, "openai", "{}"),
        ("one", 4, "openai", "{}"),
        ("two", 4, "openai", "{}"),
        ("one", 4, "slip", "{}"),
        ("one", 4, "openai", '{"prefix": "a "}'),
    }
    # A repeated one is replaced, and is the one to show again.
    again = evaluate.evaluate(run, one)
    entries_, items = results.read(epath.Path(file))
    shown = json.loads(file.read_text())["results"]
    assert len(entries_) == 5 and [r["set"] for r in shown] == [two, one]
    assert again["results"][0]["value"] == shown[1]["value"]
    # Every entry still has its items.
    for each in entries_:
        name = f"{each['name']}/{each['metric']}"
        assert items[each["items"]][name].value() == pytest.approx(each["value"])
    (measured,) = model_card.measured(RunReader(run), STEPS, 2)
    assert model_card.evaluations([measured])[0][0] == "`folder:one`"


def test_results_of_two_runs_in_one_file(root, tmp_path):
    one, file = f"folder:{root / 'one'}", tmp_path / "all.json"
    copy = root / "copy"
    copy.exists() or copy.symlink_to(root / "run")
    for run in ("run", "copy"):
        evaluate.evaluate(str(root / run), one, output=str(file))
    written = json.loads(file.read_text())
    assert written["checkpoint"] == str(copy) and len(written["results"]) == len(written["other_results"]) == 1


def test_a_run_that_was_moved_keeps_its_results(root):
    one, two = f"folder:{root / 'one'}", f"folder:{root / 'two'}"
    evaluate.evaluate(str(root / "run"), one)
    (root / "run").rename(root / "moved")
    try:
        evaluate.evaluate(str(root / "moved"), two)
        assert {one, two} <= {r["set"] for r in json.loads((root / "moved" / "evaluation.json").read_text())["results"]}
        rows = evaluate.compare(str(root / "moved"), str(root / "moved"))
        assert all(row["low"] == row["high"] == 0 for row in rows) and len(rows) >= 2
    finally:
        (root / "moved").rename(root / "run")


def test_all_sets_are_opened_before_the_first_is_evaluated(root, monkeypatch, tmp_path):
    suite = [f"folder:{root / 'one'}", f"folder:{root / 'none'}", "dtd", "birdsnap"]
    monkeypatch.setattr(registry, "measure", None)
    with pytest.raises(UserError) as error:
        evaluate.evaluate(str(root / "run"), suite, data_dir=str(tmp_path), output=str(tmp_path / "x.json"))
    faults = str(error.value).splitlines()[1:]
    expected = (f"folder:{root / 'none'}: ", "'dtd:3.0.1'", "birdsnap is not in TFDS")
    assert all(words in fault for fault, words in zip(faults, expected, strict=True))
    assert not (tmp_path / "x.json").exists()


def test_results_are_written_as_soon_as_they_are_there(root, monkeypatch, tmp_path):
    one, two = f"folder:{root / 'one'}", f"folder:{root / 'two'}"
    original = registry.measure

    def killed(evaluator, variables):
        if "two" in evaluator.name:
            raise KeyboardInterrupt
        return original(evaluator, variables)

    monkeypatch.setattr(registry, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(str(root / "run"), [one, two], output=str(tmp_path / "x.json"))
    assert [r["set"] for r in json.loads((tmp_path / "x.json").read_text())["results"]] == [one]


def test_a_name_with_commas_is_one_of_a_list(root, tmp_path):
    comma, one, two = (f"folder:{root / name}" for name in ("with, comma", "one", "two"))
    assert registry.expand_suites(f"{one},{one}, mnist") == (one, "mnist")
    assert registry.expand_suites([comma, "mnist", one]) == (comma, "mnist", one)
    output = str(tmp_path / "deep" / "x.json")
    evaluate.main(["--checkpoint", str(root / "run"), "--suite", two, "--suite", one, "--output", output])
    assert [r["set"] for r in json.loads(pathlib.Path(output).read_text())["results"]] == [two, one]


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


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"results": [{"set": "x"}]}', '{"results": 3}'])
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


ADDING = """
import pathlib, sys, time
from tests.evaluators import test_results as t
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(folder / name).touch()
until = time.monotonic() + 60
while len(list(folder.glob("adds*"))) < 2 and time.monotonic() < until:
    time.sleep(0.01)
for i in range(10):
    items = {f"zeroshot/{name}{i}/top1": t.PerExample(t.np.ones(2))}
    t.results.add(t.epath.Path(folder / "x.json"), t.entry(set=f"{name}{i}"), items, {}, own=True)
"""


def test_two_commands_that_add_at_the_same_time_lose_nothing(tmp_path):
    names = ("adds_a", "adds_b")
    commands = [subprocess.Popen([sys.executable, "-c", ADDING, str(tmp_path), name]) for name in names]
    assert [command.wait(100) for command in commands] == [0, 0]
    entries_, items = results.read(epath.Path(tmp_path / "x.json"))
    assert {e["set"] for e in entries_} == {f"{name}{i}" for name in names for i in range(10)} and len(items) == 20
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.json.items.npz", *names}


def test_a_file_system_without_locks_is_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for name in ("x", "y"):
        results.add(epath.Path(tmp_path / "x.json"), entry(set=name), {}, {}, own=True)
    assert [e["set"] for e in results.read(epath.Path(tmp_path / "x.json"))[0]] == ["x", "y"]
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


# Records: their names on disk, their JSON, and their tables


GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "results"


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
    assert str(collect.judge(first))
    # results.json has no values of items.
    (without,) = from_json(to_json([first]))
    assert without.unit == "x 100" and str(collect.judge(without)) == ""


def test_results_of_a_family_without_a_layout_have_their_headline():
    results = [
        Result("a", "colour", "hue", 30.0, n=50, chance=10.0),
        Result("a", "colour", "lightness", 45.5, n=50, headline=True),
        Result("b", "colour", "hue", 1.2, unit="radians", n=5, headline=True),
    ]
    (table,) = tables.build(results)
    assert table.rows == [("a", ["lightness", "45.5"]), ("b", ["hue, radians", "1.2"])]
