"""The doctor before a run: samples, the time of a step; and the arguments, output and status of the command."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import tiny
from tests.helpers.findings import only
from tests.helpers.pages import written
from xclip_jax.commands import doctor
from xclip_jax.commands.diagnosis import check_run
from xclip_jax.commands.doctor import check_config
from xclip_jax.demo import emoji
from xclip_jax.train import build, cost
from xclip_jax.train.checks import FAIL, OK, WARNING

RECIPE = """
from tests.helpers import tiny

def get_config(arg=None):
    return tiny.config("clip", run={run!r}, data__sources=({source!r},), steps=100)
"""


def run_command(tmp_path, pairs, *arguments, platforms="cpu"):
    """The command as a user starts it, on a recipe of his own."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(run=str(tmp_path / "run"), source=f"folder:{pairs}"))
    line = [sys.executable, "-m", "xclip_jax.main", "doctor", "--config", str(recipe), *arguments]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": platforms}
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def test_the_command_prints_json_and_fails(tmp_path, pairs):
    arguments = ["--json", "--step=never", "--config.data.batch=48", "--config.steps", "50"]
    done = run_command(tmp_path, pairs, *arguments)
    content = json.loads(done.stdout)
    assert done.returncode == 1 and content["ok"] is False
    (fault,) = [row for row in content["findings"] if row["mark"] == FAIL]
    assert fault["check"] == "data" and "data.batch=48 exceeds the 40 pairs" in fault["text"]
    model = next(row for row in content["findings"] if row["check"] == "model")
    assert model["values"]["flops_per_step"] > 0
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.py", "__pycache__"}


@pytest.mark.slow
def test_all_checks_of_the_command(tmp_path, pairs):
    """bash launch/test.sh -m slow tests/commands/test_doctor.py: with a compiled step, and without a device."""
    done = run_command(tmp_path, pairs)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    checks = [line[9:23].strip() for line in lines[:-1]]
    expected = ["devices", "folder", "model", "disk", "data", "memory", "step"]
    assert checks == expected
    assert lines[-1].startswith(f"{len(checks)} checks: 0 FAIL, ")
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.py", "__pycache__"}
    done = run_command(tmp_path, pairs, platforms="cuda")
    assert done.returncode == 1 and done.stdout.startswith("FAIL     devices        JAX has no device")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["runs/a", "runs/b"], "unrecognized arguments: runs/b"),
        (["/nowhere/run"], "'/nowhere/run' does not exist; name the folder of a run"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(SystemExit) as end:
        doctor.main(arguments)
    assert message in str(end.value) and str(end.value).startswith("error: ")


def test_faults_of_the_config_and_of_the_model_end_the_checks(tmp_path):
    config = tiny.config("clip", run=tmp_path / "run", optim__lr=-1.0, data__sources=("folder:x",))
    findings = list(check_config(config, "never"))
    assert "optim.lr" in only(findings, "config", FAIL).text and findings[-1].check == "config"
    config.optim.lr, config.mesh.data = 1e-3, 3
    findings = list(check_config(config, "never"))
    model = [finding for finding in findings if finding.check == "model"]
    assert [finding.mark for finding in model] == [FAIL] and findings[-1] is model[-1]
    assert "does not fit 8 devices" in model[0].text
    config.mesh.data, config.data.tokenizer = -1, str(tmp_path / "no.json")
    findings = list(check_config(config, "never"))
    assert any(x.mark == FAIL and x.check == "model" and "no.json" in x.text for x in findings)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_of_the_run_is_one_finding(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    findings = list(check_config(tiny.config("clip", run=tmp_path), "never"))
    assert "config.json is damaged" in only(findings, "folder", FAIL).text
    assert [finding.check for finding in findings] == ["devices", "folder"]


def test_cluster_heads_that_outweigh_the_towers(pairs, tmp_path):
    """Before a run and in its folder; the count is that of kernels, norms and biases by hand."""
    changes = {"run": tmp_path / "run", "data__sources": (f"folder:{pairs}",)}
    large = tiny.config("xclip", **changes, model__cluster_head__clusters=4096, model__cluster_head__hidden=512)
    finding = only(check_config(large, "never"), "heads", WARNING)
    heads = 2 * (32 * 512 + 2 * 512 + 512 * 4096 + 4096)
    assert finding.values["cluster_heads"] == heads > 20 * finding.values["towers"]
    assert f"the cluster heads have {heads:,} parameters, and the towers" in finding.text
    assert finding.values["flops_share"] > 0.9 and "model.cluster_head.layers=0" in finding.remedy
    total = build.build(large).num_parameters
    assert total == heads + finding.values["towers"] + 2 * 32 * 16 + 1  # projections and the scale
    written(tmp_path / "run", large, [])
    assert only(check_run(str(tmp_path / "run")), "heads", WARNING).values == finding.values
    for small in (tiny.config("xclip", **changes), tiny.config("clip", **changes, model__cluster_head__hidden=4096)):
        assert not [x for x in check_config(small, "never") if x.check == "heads"]


def test_the_remaining_steps_are_timed():
    experiment = build.build(tiny.config("clip"))
    finding = doctor.time_step(experiment, cost.compile_for(experiment), 2)
    assert finding.check == "step" and finding.values["peak_bytes"] > finding.values["activations_bytes"] > 0
    assert f"{experiment.config.steps - 2} steps take" in finding.text


def test_a_step_that_does_not_fit_is_not_run(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "fits_by_far", lambda *_: False)
    monkeypatch.setattr(cost, "compile_if_fits", lambda _: (None, "it needs more"))
    monkeypatch.setattr(doctor, "time_step", lambda *_: pytest.fail("run"))
    config = tiny.config("clip", run=tmp_path / "run", data__sources=(f"folder:{pairs}",))
    findings = list(check_config(config, "always"))
    assert "optim.microbatches" in only(findings, "memory", FAIL).remedy


def test_an_expensive_step_is_not_compiled_on_a_cpu(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "compile_if_fits", lambda _: pytest.fail("compiled"))
    monkeypatch.setattr(doctor, "CHEAP_FLOPS", 1.0)
    config = tiny.config("clip", run=tmp_path / "run", data__sources=(f"folder:{pairs}",))
    findings = list(check_config(config, "auto"))
    assert "the step is not compiled here" in only(findings, "memory", OK).text
    assert not [x for x in findings if x.check == "step"]


def test_a_missing_extra_is_one_failure(tmp_path, monkeypatch, capfd):
    """Of the demo's training data and all of its evaluation sets; nothing is announced as downloading."""
    monkeypatch.setattr(emoji, "PACKAGES", ("not-installed",))
    sets = ("emoji/test_concepts", "emoji/test_rendering")
    config = tiny.config("clip", data__sources=("demo:train",), data__dir=str(tmp_path), eval__sets=sets)
    failures = [finding for finding in check_config(config, "never") if finding.mark == FAIL]
    assert [finding.text for finding in failures] == [
        "the demo data needs the package 'not-installed': pip install 'xclip_jax[demo]'"
    ]
    assert "ownload" not in "".join(capfd.readouterr())
