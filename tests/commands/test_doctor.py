"""The doctor before a run: the time of a step; and the arguments, output and status of the command."""

import os
import subprocess
import sys

import pytest

from tests.helpers import tiny
from tests.helpers.findings import only
from xclip_jax.commands import doctor, report
from xclip_jax.commands.doctor import check_config
from xclip_jax.train import build, cost
from xclip_jax.train.checks import FAIL, OK

RECIPE = """
from tests.helpers import tiny

def get_config(arg=None):
    return tiny.config("clip", run={run!r}, data__sources=({source!r},), steps=100)
"""


def test_the_command_prints_findings_and_fails(tmp_path, pairs):
    """As a user starts it, on a recipe of his own."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(run=str(tmp_path / "run"), source=f"folder:{pairs}"))
    line = [sys.executable, "-m", "xclip_jax.main", "doctor", "--config", str(recipe), "--config.data.batch=48"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[-1] == "5 checks: 1 FAIL, 0 warnings"
    assert lines[-2].startswith("FAIL     data") and "data.batch=48" in lines[-2]
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.py", "__pycache__"}


@pytest.mark.parametrize(
    ("arguments", "named"), [([], "RUN"), (["runs/a", "runs/b"], "runs/b"), (["/nowhere/run"], "'/nowhere/run'")]
)
def test_arguments(arguments, named):
    with pytest.raises(SystemExit, match=f"^error: .*{named}"):
        doctor.main(arguments)


@pytest.mark.parametrize("command", [doctor.main, report.main])
def test_a_folder_of_weights_is_no_run(command, tmp_path):
    """Its config.json is sound, so nothing is to be deleted."""
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path} is not a run's folder: .* name another folder\.$"):
        command([str(tmp_path)])


def test_faults_of_the_config_and_of_the_model_end_the_checks(tmp_path):
    config = tiny.config("clip", run=tmp_path / "run", optim__lr=-1.0, data__sources=("folder:x",))
    findings = list(check_config(config))
    assert "optim.lr" in only(findings, "config", FAIL).text and findings[-1].check == "config"
    config.optim.lr, config.mesh.data = 1e-3, 3
    findings = list(check_config(config))
    assert "does not fit 8 devices" in only(findings, "model", FAIL).text and findings[-1].check == "model"
    config.mesh.data, config.data.tokenizer = -1, str(tmp_path / "no.json")
    assert "no.json" in only(check_config(config), "model", FAIL).text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.json").write_text("{")
    config.run, config.data.tokenizer = str(tmp_path), "bytes"
    assert "config.json is damaged" in only(check_config(config), "folder", FAIL).text


def test_the_remaining_steps_are_timed():
    experiment = build.build(tiny.config("clip"))
    finding = doctor.time_step(experiment, cost.compile_if_fits(experiment)[0], 2, 1e6)
    assert finding.check == "step" and "TFLOP/s" in finding.text
    assert f"{experiment.config.steps - 2} steps take" in finding.text


def test_a_step_that_does_not_fit_is_not_run(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "fits_by_far", lambda *_: False)
    monkeypatch.setattr(cost, "compile_if_fits", lambda _: (None, "it needs more"))
    monkeypatch.setattr(doctor, "time_step", lambda *_: pytest.fail("run"))
    config = tiny.config("clip", run=tmp_path / "run", data__sources=(f"folder:{pairs}",))
    assert "optim.microbatches" in only(check_config(config), "memory", FAIL).remedy


def test_an_expensive_step_is_not_compiled_on_a_cpu(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "compile_if_fits", lambda _: pytest.fail("compiled"))
    monkeypatch.setattr(doctor, "CHEAP_FLOPS", 1.0)
    findings = list(check_config(tiny.config("clip", run=tmp_path / "run", data__sources=(f"folder:{pairs}",))))
    assert "the step is not compiled here" in only(findings, "memory", OK).text
    assert not [x for x in findings if x.check == "step"]
