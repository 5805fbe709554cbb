import fcntl
import json
import re
import shutil
import types

import jax
import pytest

from tests.helpers import checkpoints, tiny
from tests.helpers.findings import only
from xclip_jax.commands import doctor
from xclip_jax.config import schema
from xclip_jax.core.console import format_bytes
from xclip_jax.train import checks
from xclip_jax.train.checkpoint_files import num_bytes
from xclip_jax.train.checks import FAIL, OK
from xclip_jax.train.run_writer import RunWriter

saved = checkpoints.saved
SIZE = num_bytes(checkpoints.ABSTRACT)


def all_findings(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "CHEAP_FLOPS", 0.0)  # the step is not compiled
        return list(doctor.check_config(config))


def test_devices(monkeypatch):
    assert only([checks.check_devices()], "devices", OK).text.startswith(f"{jax.device_count()} x ")

    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "devices", none)
    assert "Unable to initialize backend 'tpu'" in only([checks.check_devices()], "devices", FAIL).text


def folder_finding(config, mark):
    return only(all_findings(config), "folder", mark)


def test_the_runs_folder(tmp_path, run):
    assert "starts at step 0 of 10" in folder_finding(tiny.config(run=tmp_path / "new"), OK).text
    saved = json.loads((run / "config.json").read_text())["config"]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = schema.complete(saved | {"run": str(copy)})
    with (copy / ".lock").open("a+") as file:
        file.write("process 7 on a host\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use by process 7 on a host" in folder_finding(config, FAIL).text
    config.optim.lr = 0.5
    assert "optim.lr" in folder_finding(config, FAIL).text


def test_a_fault_is_reported_once(tmp_path):
    config = tiny.config("clip", run=tmp_path / "run", data__sources=("folder:/nowhere",), eval__sets=("folder:/no",))
    findings = all_findings(config)
    assert [x.check for x in findings if x.mark == FAIL] == ["data"], findings


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


def test_initial_weights(tmp_path, run, pairs):
    changes = {"data__sources": (f"folder:{pairs}",), "init__weights": str(run)}
    config = tiny.config("xclip", run=tmp_path / "new", **changes)
    assert re.search(r" has (\d\d+) of the model's \1 tensors$", only(all_findings(config), "weights", OK).text)


def space(monkeypatch, run, number, *, keep=3, every=2, steps=100):
    usage = types.SimpleNamespace(free=int(number * SIZE))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    config = schema.resolve({"steps": steps, "optim": {"warmup": 1}, "checkpoint": {"every": every, "keep": keep}})
    experiment = types.SimpleNamespace(config=config, abstract=checkpoints.ABSTRACT)
    (finding,) = checks.check_disk(experiment, RunWriter(run))
    return finding


@pytest.mark.parametrize(("options", "needed"), [({}, 4), ({"keep": 1}, 2), ({"every": 0}, 1), ({"steps": 3}, 2)])
def test_space_for_the_checkpoints(monkeypatch, tmp_path, options, needed):
    finding = space(monkeypatch, tmp_path / "new", needed - 0.01, **options)
    assert finding.mark == FAIL and f"checkpoints need up to {format_bytes(needed * SIZE)} more" in finding.text
    assert space(monkeypatch, tmp_path / "new", needed, **options).mark == OK
    assert not (tmp_path / "new").exists()


def test_what_is_saved_already_needs_no_space_again(monkeypatch, saved, tmp_path):
    saved_run = shutil.copytree(saved, tmp_path / "run")
    assert space(monkeypatch, saved_run, 1.99).mark == FAIL
    assert space(monkeypatch, saved_run, 2).mark == OK
