"""The checks of a run before it starts, which trainer and doctor share: each warning and FAIL."""

import dataclasses
import fcntl
import json
import pathlib
import shutil
import types

import jax
import pytest

from tests.helpers import checkpoints, tiny
from tests.helpers.findings import only
from xclip_jax.commands import doctor
from xclip_jax.config import schema
from xclip_jax.core.console import format_bytes
from xclip_jax.core.errors import UserError
from xclip_jax.train import build, checks, trainer
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.checkpoint_files import num_bytes
from xclip_jax.train.checks import FAIL, OK, WARNING
from xclip_jax.train.run_writer import RunWriter

saved = checkpoints.saved
SIZE = num_bytes(checkpoints.ABSTRACT)


@pytest.fixture
def saved_run(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def all_findings(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "CHEAP_FLOPS", 0.0)  # the step is not compiled
        return list(doctor.check_config(config))


def test_devices(monkeypatch):
    assert only([checks.check_devices()], "devices", OK).values["devices"] == jax.device_count()

    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "devices", none)
    assert "Unable to initialize backend 'tpu'" in only([checks.check_devices()], "devices", FAIL).text


def folder_finding(config, mark):
    return only(all_findings(config), "folder", mark)


def test_the_runs_folder(tmp_path, run):
    (tmp_path / "file").touch()
    finding = folder_finding(tiny.config(run=tmp_path / "file/run"), FAIL)
    assert "is not a folder; name another folder" in finding.text
    assert folder_finding(tiny.config(run=tmp_path / "new"), OK).text.endswith("starts at step 0")
    saved = json.loads((run / "config.json").read_text())["config"]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = schema.complete(saved | {"run": str(copy)})
    assert "resumes at step" in folder_finding(config, OK).text
    with (copy / ".lock").open("a+") as file:
        file.write("process 7 on a host\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use by process 7 on a host" in folder_finding(config, FAIL).text
    config.optim.lr = 0.5
    assert "optim.lr" in folder_finding(config, FAIL).text


def test_a_run_that_is_complete(tmp_path):
    config = tiny.config("clip", run=tmp_path, steps=2)
    experiment = build.build(config)
    folder = RunWriter(tmp_path)
    with folder.claimed(experiment.config, []):
        pass
    state = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), experiment.abstract)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(dataclasses.replace(state, step=jax.numpy.asarray(2)), {"samples": 32})
    folder.write_results(experiment.config, [])
    assert "nothing would be trained" in folder_finding(config, WARNING).text


def test_a_fault_is_reported_once_and_stops_the_trainer(tmp_path):
    """The sources are missing, and the checks end; nothing is written."""
    config = tiny.config("clip", run=tmp_path / "run", data__sources=("folder:/nowhere",), eval__sets=("folder:/no",))
    findings = all_findings(config)
    assert [x.check for x in findings if x.mark == FAIL] == ["data"], findings
    with pytest.raises(UserError, match="'/nowhere'"):
        trainer.run(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("check", "changes", "named"),
    [
        ("data", {"data__sources": ("folder:PAIRS", "folder:/no/1", "csv:/no/2")}, "/no/1"),
        ("data", {"data__batch": 48}, "data.batch=48 exceeds the 40 pairs"),
        ("evaluation", {"eval__sets": ("emoji/nothing",), "eval__sets_at_end": ("folder:/nowhere",)}, "emoji/nothing"),
    ],
)
def test_data_that_do_not_open(pairs, check, changes, named):
    changes = {"data__sources": ("folder:PAIRS",)} | changes
    changes["data__sources"] = tuple(spec.replace("PAIRS", str(pairs)) for spec in changes["data__sources"])
    assert named in only(all_findings(tiny.config("clip", **changes)), check, FAIL).text


def test_a_source_that_has_changed(tmp_path, pairs, run):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "data.json").write_text(json.dumps([{"samples": 9, "hash": "x"}]))
    config = tiny.config("xclip", run=copy, data__sources=(f"folder:{pairs}",))
    findings = [x for x in all_findings(config) if x.mark == FAIL]
    assert any("has changed since" in x.text for x in findings)


@pytest.mark.parametrize(
    ("sizes", "warns"), [({}, True), ({"fsdp": 8}, False), ({"strategy": "fsdp_tp", "model": 2}, False)]
)
def test_fsdp_that_splits_nothing(sizes, warns):
    mesh = {"data": -1, "fsdp": 1, "model": 1, "strategy": "fsdp"} | sizes
    _, *warnings = checks.check_model(build.build(tiny.config("clip", mesh=mesh)))
    assert [(finding.mark, "--config.mesh.fsdp=8" in finding.remedy) for finding in warnings] == [
        (WARNING, True)
    ] * warns


@pytest.mark.parametrize(("every", "interval"), [(1, "step"), (2, "2 steps")])
def test_how_often_a_set_is_evaluated(every, interval):
    experiment = build.build(tiny.config("clip", eval__sets=("retrieval/folder:x",), eval__every=every))
    (finding,) = checks.check_sets(experiment, 1, before=True)
    assert finding.text == f"1 set opens; 1 of them every {interval}, and all before the first step"


def test_initial_weights(tmp_path, run, pairs):
    changes = {"data__sources": (f"folder:{pairs}",), "init__weights": str(run)}
    config = tiny.config("xclip", run=tmp_path / "new", **changes)
    finding = only(all_findings(config), "weights", OK)
    assert finding.values["initial_values"] == finding.values["model_values"]
    config.model.embed = 24
    assert "has another architecture" in only(all_findings(config), "weights", FAIL).text


def space(monkeypatch, run, number, *, keep=3, every=2, steps=100):
    """Check a run on a disk with free space for so many checkpoints."""
    usage = types.SimpleNamespace(free=int(number * SIZE))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    config = schema.resolve({"steps": steps, "optim": {"warmup": 1}, "checkpoint": {"every": every, "keep": keep}})
    experiment = types.SimpleNamespace(config=config, abstract=checkpoints.ABSTRACT)
    (finding,) = checks.check_disk(experiment, RunWriter(run))
    return finding


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({}, 2, 4),
        ({"keep": 1}, 2, 2),
        ({"every": 0}, 1, 1),  # one, at the end
        ({"steps": 3}, 2, 2),
    ],
)
def test_space_for_the_checkpoints(monkeypatch, tmp_path, options, least, most):
    finding = space(monkeypatch, tmp_path / "new", least - 0.01, **options)
    assert finding.mark == FAIL and f"checkpoints need up to {format_bytes(most * SIZE)} more" in finding.text
    assert finding.remedy.startswith("make room")
    assert not (tmp_path / "new").exists()
    if most > least:
        finding = space(monkeypatch, tmp_path / "new", most - 0.01, **options)
        assert finding.mark == WARNING and f"need up to {format_bytes(most * SIZE)} more" in finding.text
    assert space(monkeypatch, tmp_path / "new", most, **options).mark == OK


def test_what_is_saved_already_needs_no_space_again(monkeypatch, saved_run):
    assert space(monkeypatch, saved_run, 0.9).mark == FAIL
    assert space(monkeypatch, saved_run, 1).mark == WARNING
    assert space(monkeypatch, saved_run, 2).mark == OK


def test_a_bucket_has_room():
    config = schema.resolve(tiny.config("clip", checkpoint__keep=1))
    experiment = types.SimpleNamespace(config=config, abstract=checkpoints.ABSTRACT)
    (finding,) = checks.check_disk(experiment, RunWriter("gs://bucket/run"))
    assert finding.mark == OK and finding.text.startswith("the run's checkpoints need up to ")
    assert "free_bytes" not in finding.values and finding.values["checkpoints"] == 2
