"""Callbacks and trackers of other packages: tests/extension/status_file.py, and no change inside xclip_jax."""

import json
import subprocess
import sys
from typing import ClassVar

import pytest

from tests.helpers import tiny
from xclip_jax.commands.doctor import check_config
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.train import callbacks, prepare, trainer
from xclip_jax.train.checks import FAIL

pytestmark = pytest.mark.long

STATUS = "tests.extension.status_file:StatusFile"
LIST = "tests.integration.test_extension_callback:List"


class List:
    """A tracker: lines in a list, of which those of a run are looked up by its folder."""

    runs: ClassVar[dict] = {}

    def __init__(self, folder, config, step, run_id):
        assert folder.trackers_file.exists() and len(run_id) == 8 and config.steps == 4
        self.lines = self.runs[str(folder.path)] = [("start", step)]

    def log(self, step, scalars):
        self.lines.append((step, scalars["loss"]))
        if step == 3:
            raise ConnectionError("no route to host")

    def close(self):
        self.lines.append("close")


class Failing(callbacks.Callback):
    """A callback that must not be made: checks import a class, and only a run makes one."""

    def __init__(self, *_):
        raise RuntimeError("made")


def test_a_run_calls_them(pairs, tmp_path, capsys):
    run = tmp_path / "run"
    config = tiny.short(pairs, run, log__callbacks=(STATUS,), log__trackers=(LIST,))
    config.eval.sets_at_end = (f"retrieval/folder:{pairs}",)
    results = trainer.run(config)
    status = json.loads((run / "status.json").read_text())
    losses = [(line["step"], line["loss"]) for line in tiny.lines(run) if "loss" in line]
    assert {key: status[key] for key in ("step", "steps", "loss", "done")} == {
        "step": 4, "steps": 4, "loss": losses[-1][1], "done": True
    }  # fmt: skip
    (headline,) = status.keys() - {"step", "steps", "loss", "done"}
    assert status[headline] == results[headline]
    # A tracker that fails is disabled, and the run goes on.
    assert List.runs[str(run)] == [("start", 0), *losses[:3]]
    printed = capsys.readouterr().out
    assert f"WARNING: {LIST} failed and is disabled (ConnectionError" in printed
    assert "parameters, 40 samples, 4 steps of 16 (1.6 epochs), in" in printed
    assert prepare.extras(schema.resolve(config)) == []


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("callbacks", "status_file", r"log\.callbacks is \('status_file',\)"),
        ("callbacks", LIST, r"List' is not a class derived from xclip_jax\.train\.callbacks\.Callback"),
        ("trackers", "no_such.module:Class", r"log\.trackers: .*cannot be imported"),
        ("trackers", STATUS, r"StatusFile' is not a class derived from xclip_jax\.train\.callbacks\.Tracker"),
    ],
)
def test_a_wrong_name_is_refused_before_the_folder(key, name, message, pairs, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer.run(tiny.short(pairs, tmp_path / "run", **{f"log__{key}": (name,)}))
    assert not (tmp_path / "run").exists()


def test_the_check_of_a_config_ends_with_what_it_did_not_look_at():
    """It imports the classes that a config names, and makes none."""
    command = [sys.executable, "-m", "xclip_jax.main", "--check", "--config", "pretrain", "--config.init.weights=no.pt"]
    command += ["--config.data.sources='folder:/x',", f"--config.log.callbacks='{__name__}:Failing',"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = "not checked: data, weights and disk; xclip-jax doctor does that"
    assert done.stdout.splitlines()[0].endswith(" are valid") and done.stdout.splitlines()[-1] == last


def test_the_doctor_imports_what_a_config_names_and_makes_nothing(tmp_path):
    names = {"log__callbacks": (f"{__name__}:Failing",), "log__trackers": (LIST, "no.such:Tracker")}
    findings = check_config(tiny.config(run=tmp_path / "run", **names))
    (finding,) = (finding for finding in findings if finding.check == "log")
    assert finding.text.startswith("log.trackers: 'no.such:Tracker' cannot be imported") and finding.mark == FAIL
