"""The doctor: each warning and FAIL of training data and evaluation sets."""

import dataclasses
import json
import shutil

import pytest

from tests.helpers import tiny
from tests.helpers.findings import built, only
from xclip_jax.commands.doctor import reading
from xclip_jax.commands.doctor.finding import FAIL, OK, WARNING
from xclip_jax.train.training_folder import TrainingFolder


@pytest.fixture(scope="module")
def experiment(pairs):
    return built("clip", data__sources=(f"folder:{pairs}",))


def data_findings(experiment, tmp_path, *, step_seconds=None, **changes):
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **changes))
    folder = TrainingFolder(tmp_path / "run")
    return list(reading.check_data(experiment, folder, step_seconds=step_seconds, samples=32, seconds=0))


def test_sources_that_do_not_open(experiment, tmp_path, pairs):
    findings = data_findings(experiment, tmp_path, sources=("folder:/nowhere",))
    assert "'/nowhere' does not exist" in only(findings, "data", FAIL).text
    findings = data_findings(experiment, tmp_path, sources=(f"folder:{pairs}", "folder:/no/1", "csv:/no/2"))
    assert [(x.check, x.mark) for x in findings] == [("data", FAIL)] * 2
    assert "/no/1" in findings[0].text and "/no/2" in findings[1].text
    findings = data_findings(experiment, tmp_path, batch=48)
    assert "data.batch=48 exceeds the 40 pairs" in only(findings, "data", FAIL).text


def test_a_source_that_has_changed(tmp_path, pairs, run):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "data.json").write_text(json.dumps([{"samples": 9, "hash": "x"}]))
    experiment = built("xclip", run=copy, data__sources=(f"folder:{pairs}",))
    assert "has changed since" in only(data_findings(experiment, tmp_path), "data", FAIL).text


def test_reading_is_compared_with_the_step(experiment, tmp_path):
    assert "unknown without a step" in only(data_findings(experiment, tmp_path), "reading", OK).text
    findings = data_findings(experiment, tmp_path, step_seconds=60.0)
    assert only(findings, "reading", OK).values["needed_samples_per_second"] == pytest.approx(16 / 60)
    finding = only(data_findings(experiment, tmp_path, step_seconds=1e-7), "reading", WARNING)
    assert finding.values["wait_share"] > 0.9 and "data.workers" in finding.remedy
    assert only(data_findings(experiment, tmp_path, step_seconds=1e-7, cache=True), "reading", OK)
    assert not (tmp_path / "run").exists()


def test_bad_samples(experiment, tmp_path):
    pairs = tiny.folder(tmp_path / "pairs", n=60)
    for number in (1, 2, 3):
        (pairs / f"{number:03}.png").write_bytes(b"no image")
    changes = {"sources": (f"folder:{pairs}",), "batch": 60}
    findings = data_findings(experiment, tmp_path, **changes, max_bad_fraction=0.001)
    finding = only(findings, "samples", FAIL)
    assert finding.values["bad"] > 0 and "pairs/00" in finding.text and "the run stops" in finding.text
    assert only(data_findings(experiment, tmp_path, **changes, max_bad_fraction=0.9), "samples", OK)
    share = finding.values["bad_share"]
    findings = data_findings(experiment, tmp_path, **changes, max_bad_fraction=1.4 * share)
    assert only(findings, "samples", WARNING)
    for path in pairs.glob("*.png"):
        path.write_bytes(b"no image")
    findings = data_findings(experiment, tmp_path, **changes | {"batch": 4})
    assert "bad samples in a row" in only(findings, "samples", FAIL).text


def test_equal_captions_are_false_negatives(experiment, tmp_path):
    pairs = tiny.folder(tmp_path / "pairs", n=40)
    for path in pairs.glob("*.txt"):
        path.write_text("the same for all of them")
    changes = {"sources": (f"folder:{pairs}",)}
    finding = only(data_findings(experiment, tmp_path, **changes, spread_duplicate_captions=True), "texts", FAIL)
    assert "texts that were read are equal in their" in finding.text and "nothing to learn" in finding.text
    for path in list(pairs.glob("*.txt"))[::2]:
        path.write_text("but not for a half")
    finding = only(data_findings(experiment, tmp_path, **changes), "texts", WARNING)
    assert finding.values["duplicate_share"] == 1 and "spread_duplicate_captions" in finding.remedy
    assert "which makes them false negatives" in finding.text
    assert finding.values["full_share"] == 1
    assert only(data_findings(experiment, tmp_path, **changes, spread_duplicate_captions=True), "texts", OK)


@pytest.mark.parametrize(("every", "interval"), [(1, "step"), (2, "2 steps")])
def test_how_often_a_set_is_evaluated(every, interval, monkeypatch):
    monkeypatch.setattr(reading.registry, "open_all", lambda *_, **__: None)
    (finding,) = reading.check_sets(built("clip", eval__sets=("emoji/test_line",), eval__every=every))
    assert finding.mark == OK and finding.text == f"1 set opens; 1 of them every {interval}"


def test_evaluation_sets_that_do_not_open(pairs):
    experiment = built("clip", eval__sets=("emoji/nothing", "folder:/nowhere"), eval__final_sets=("folder:/nowhere",))
    findings = list(reading.check_sets(experiment))
    assert [(x.check, x.mark) for x in findings] == [("evaluation", FAIL)] * 2
    assert "emoji/nothing" in findings[0].text and "/nowhere" in findings[1].text
