"""Evaluation of a checkpoint and comparison of two, by functions and by the command."""

import dataclasses
import json
import re
import shutil
import types

import numpy as np
import pytest

from tests.helpers import tiny
from xclip_jax.commands import evaluate
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.processes import runtime

pytestmark = pytest.mark.long

STEPS = 4


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Two runs, and a folder of pictures in two classes."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(trained, root / "a")
    tiny.untrained(root / "b", seed=1)
    tiny.classes(root / "set")
    return root


def timeless(value):
    """Without what takes time."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key != "seconds"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_the_results_say_what_they_are_and_are_the_same_twice(runs, capsys):
    suite = f"folder:{runs / 'set'}"
    first = evaluate.evaluate(str(runs / "a"), suite)
    written = json.loads((runs / "a" / "evaluation.json").read_text())
    again = evaluate.evaluate(str(runs / "a"), suite, output=str(runs / "elsewhere" / "x.json"))
    assert timeless(first) == timeless(again)
    assert timeless(written) == timeless(json.loads((runs / "elsewhere" / "x.json").read_text()))
    assert written["step"] == STEPS and written["profile"] == "openai" and "commit" in written["environment"]
    assert written["config"]["seed"] == 0 and written["seconds"] > 0
    (result,) = written["results"]
    assert result["set"] == suite and result["metric"] == "top1" and result["n"] == 20
    assert result["value"] == result["metrics"]["top1"] and 0 <= result["value"] <= 100
    for key in ("protocol", "templates", "preprocessing", "split_hash", "tokenizer", "seconds"):
        assert result[key], key
    assert f"{tiny.SIZE} px" in result["preprocessing"] and "'imagenet'" in result["preprocessing"]
    assert "zero-shot classification" in capsys.readouterr().out


def test_an_earlier_step_can_be_evaluated(runs):
    found = evaluate.evaluate(str(runs / "a"), f"folder:{runs / 'set'}", step=2, output=str(runs / "one.json"))
    assert found["step"] == 2


def test_processes_compare_what_they_evaluate(runs, tmp_path, monkeypatch):
    """Before the first set: with other weights in one of them the results would be a mixture."""

    def facts(run, suite, **options):
        compared = {}

        def check_same(round_, remedy):
            compared.update(round_)
            if "fingerprint" in round_:
                raise UserError(remedy)

        monkeypatch.setattr(runtime, "peers", lambda: types.SimpleNamespace(check_same=check_same))
        with pytest.raises(UserError, match="start all processes with the same command, code and packages"):
            evaluate.evaluate(str(runs / run), suite, output=str(tmp_path / "x.json"), **options)
        return compared

    fewer = shutil.copytree(runs / "set", tmp_path / "set")
    (fewer / "cat" / "3.png").unlink()
    suite, other = f"folder:{runs / 'set'}", f"folder:{fewer}"
    first = facts("a", suite)
    hashes = {f"evaluation set 0, zeroshot/{name}" for name in (suite, other)}
    assert first.keys() >= {"version of jax", "code's commit"} and not (tmp_path / "x.json").exists()
    for differing, found in (
        (set(), facts("a", suite)),
        ({"fingerprint", "step"}, facts("b", suite)),
        ({"fingerprint", "step"}, facts("a", suite, step=2)),
        ({"profile"}, facts("a", suite, profile="slip")),
        ({"changes"}, facts("a", suite, changes={"templates": ["{c}"]})),
        ({"set 0", *hashes}, facts("a", other)),
    ):
        assert {key for key in first | found if first.get(key) != found.get(key)} >= differing
        assert bool(differing) == (first != found)


def test_a_set_that_fails_does_not_keep_others_from_their_results(runs, tmp_path, capsys):
    broken = shutil.copytree(runs / "set", tmp_path / "broken")
    for i in range(2):
        (broken / "cat" / f"{i}.png").write_bytes(b"<html>")
    sets = [f"folder:{broken}", f"folder:{runs / 'set'}"]
    with pytest.raises(UserError, match=r"x\.json .*\n  folder:.*broken: at least 2 of"):
        evaluate.evaluate(str(runs / "a"), ",".join(sets), output=str(tmp_path / "x.json"))
    (result,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert result["set"] == sets[1] and "broken failed: TooManyUnreadable: at least 2 of 20" in capsys.readouterr().out


def test_results_that_cannot_be_recorded_do_not_keep_others_from_theirs(runs, tmp_path, monkeypatch):
    other = f"folder:{shutil.copytree(runs / 'set', tmp_path / 'other')}"
    original = registry.measure

    def measure(evaluator, variables):
        of_set = original(evaluator, variables)
        if "other" in evaluator.name:
            items = PerExample(np.ones(2), weights=np.ones(3))
            return [dataclasses.replace(result, items=items) for result in of_set]
        return of_set

    monkeypatch.setattr(registry, "measure", measure)
    sets = [other, f"folder:{runs / 'set'}"]
    with pytest.raises(UserError, match=r"1 of 2 evaluation sets failed"):
        evaluate.evaluate(str(runs / "a"), sets, output=str(tmp_path / "x.json"))
    (result,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert result["set"] == sets[1]


def test_class_names_of_some_sets(runs, tmp_path, capsys):
    other = f"folder:{tiny.classes(tmp_path / 'other', 3, ('oak', 'elm'))}"
    sets = [f"folder:{runs / 'set'}", other]
    output = {"output": str(tmp_path / "x.json")}
    first, second = evaluate.evaluate(str(runs / "a"), sets, changes={"names": {"cat": "kitten"}}, **output)["results"]
    assert "own names" in first["templates"] and "own names" not in second["templates"]
    assert "other: none of the class names, such as 'cat'" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the class names, such as 'cat', is among the classes of the sets"):
        evaluate.evaluate(str(runs / "a"), other, changes={"names": {"cat": "kitten"}}, **output)
    (tmp_path / "names.json").write_text('{"cat": "kitten"}')
    run = tiny.untrained(tmp_path / "named", eval__class_names=str(tmp_path / "names.json"))
    (entry,) = evaluate.evaluate(str(run), other, **output)["results"]
    assert "own names" not in entry["templates"]


def test_runs_side_by_side(runs, capsys):
    suite = f"folder:{runs / 'set'}"
    values = [evaluate.evaluate(str(runs / name), suite)["results"][0]["value"] for name in ("a", "b")]
    (row,) = evaluate.compare(str(runs / "a"), str(runs / "b" / "evaluation.json"))
    assert (row["a"], row["b"]) == tuple(values) and row["difference"] == values[1] - values[0]
    assert row["low"] <= row["difference"] <= row["high"]
    evaluate.main(["--compare", str(runs / "a"), str(runs / "b")])
    assert f"{row['difference']:+.1f}" in capsys.readouterr().out
    (same,) = evaluate.compare(str(runs / "a"), str(runs / "a"))
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)


@pytest.fixture(scope="module")
def other_results(runs):
    """Results of both runs; called with changes of the first of the second run, writes them and compares the two."""
    files = [str(runs / "changed" / f"{name}.json") for name in ("a", "b")]
    for name, file in zip(("a", "b"), files, strict=True):
        evaluate.evaluate(str(runs / name), f"folder:{runs / 'set'}", profile="openai", output=file)
    content = json.loads((runs / "changed" / "b.json").read_text())

    def compare(**changes):
        results = [content["results"][0] | changes]
        (runs / "changed" / "b.json").write_text(json.dumps(content | {"results": results}))
        return evaluate.compare(*files)

    return compare


def test_results_that_differ_are_not_compared(other_results, runs, tmp_path):
    for key in ("split_hash", "version", "metric", "templates", "protocol"):
        with pytest.raises(UserError, match=rf"is not the same in .*: {key} is .* and 'other'"):
            other_results(**{key: "other"})
    with pytest.raises(UserError, match="no set in common"):
        other_results(set="other")
    assert len(other_results()) == 1
    (runs / "changed.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    for other in (runs / "changed.json", tmp_path / "zzz", tmp_path / "mine"):
        with pytest.raises(UserError, match=str(other)):
            evaluate.compare(str(runs / "changed" / "a.json"), str(other))


def test_weights_are_compared_by_their_evaluation(runs, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match=r"model\.pt is not a file of results; .*--checkpoint .*model\.pt") as error:
        evaluate.compare(str(runs / "a"), str(path))
    assert "delete" not in str(error.value)
    for end in ("", ".items.npz"):
        shutil.copy(runs / "b" / f"evaluation.json{end}", tmp_path / f"model.pt.evaluation.json{end}")
    rows = evaluate.compare(str(runs / "a"), str(runs / "b"))
    assert evaluate.compare(str(runs / "a"), str(path)) == rows
    monkeypatch.chdir(tmp_path)  # where results of the Hub's weights are
    for end in ("", ".items.npz"):
        shutil.copy(runs / "b" / f"evaluation.json{end}", tmp_path / f"lab--b.evaluation.json{end}")
    assert evaluate.compare(str(runs / "a"), "hf:lab/b") == rows


def test_a_suite_is_a_name_or_names():
    assert len(registry.expand_suites("demo")) == 7 and "imagenet_a" in registry.expand_suites("paper")
    assert registry.expand_suites("imagenet, emoji/test_line,imagenet") == ("imagenet", "emoji/test_line")
    demo = registry.all_suites()["demo"]
    for names in ("demo,imagenet", ["demo", "imagenet"]):
        assert registry.expand_suites(names) == (*demo, "imagenet")
    assert registry.expand_suites(f"mnist, demo,{demo[0]}") == ("mnist", *demo)


def test_a_comma_may_be_part_of_a_name(runs, capsys):
    names = "folder:a,b", "parquet:{c,mnist}.parquet?label=x", "retrieval/csv:https://host/a.csv?columns=a,b", "mnist"
    assert registry.expand_suites(",".join(names)) == names
    assert registry.expand_suites("folder:a, mnist,,") == ("folder:a", "mnist")
    with pytest.raises(UserError, match="unknown evaluation set 'imagenett'"):
        registry.expand_suites("mnist,imagenett")
    with pytest.raises(UserError, match="no_such_module"):
        registry.expand_suites("folder:a,no_such_module.sets:Own/3")
    shutil.copytree(runs / "set", runs / "my,set")
    suites = [f"--suite=folder:{runs / name}" for name in ("my,set", "set")]
    evaluate.main(["--checkpoint", str(runs / "a"), *suites, "--output", str(runs / "commas.json")])
    (first, second) = json.loads((runs / "commas.json").read_text())["results"]
    assert first["set"] == f"folder:{runs / 'my,set'}" and first["value"] == second["value"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "{}/none"], "none' does not exist"),
        (["--checkpoint", "{}/set"], "has no file of weights"),
        (["--checkpoint", "{}/a", "--suite", "imagenett"], "unknown evaluation set 'imagenett'"),
        (["--checkpoint", "{}/a", "--suite", ","], "--suite is empty"),
        (["--checkpoint", "{}/a", "--profile", "google"], "--profile is 'google'"),
        (["--checkpoint", "{}/a", "--output", "{}/a/config.json/x"], "--output"),
        (["--checkpoint", "{}/a", "--step", "9"], "step 9"),
        (["--checkpoint", "{}/bare"], "holds no checkpoint"),
        (["--checkpoint", "{}/a", "--captions", "-1"], "--captions is -1"),
        (["--checkpoint", "{}/a", "--compare", "{}/a", "{}/b"], "--checkpoint"),
        ([], "--checkpoint --compare"),
        (["--compare", "{}/a", "{}/b", "--suite", "imagenet"], "--compare reads results and takes only --step"),
        (["--compare", "{}/a", "{}/b", "--captions", "0"], "--compare reads results and takes only --step"),
    ],
)
def test_bad_input(flags, message, runs):
    (runs / "bare").mkdir(exist_ok=True)
    shutil.copy(runs / "a" / "config.json", runs / "bare")
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}"):
        evaluate.main([flag.format(runs) for flag in flags])
