"""The command `xclip-jax doctor`: its arguments, its output and its status."""

import json
import os
import subprocess
import sys

import pytest

from xclip_jax.commands import doctor
from xclip_jax.train.checks import FAIL

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
    arguments = ["--json", "--step=never", "--seconds", "0.2", "--config.data.batch=48", "--config.steps", "50"]
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
    done = run_command(tmp_path, pairs, "--samples=32", "--seconds=0.2")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    checks = [line[9:23].strip() for line in lines[:-1]]
    expected = ["devices", "versions", "folder", "model", "disk", "data", "memory", "step"]
    expected += ["samples", "texts", "reading"]
    assert checks[: len(expected)] == expected and set(checks[len(expected) :]) == {"settings"}
    assert lines[-1].startswith(f"{len(checks)} checks: 0 FAIL, ")
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.py", "__pycache__"}
    done = run_command(tmp_path, pairs, platforms="cuda")
    assert done.returncode == 1 and done.stdout.startswith("FAIL     devices        JAX has no device")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["--config", "demo", "--topology=v4:2x2"], "unknown argument '--topology=v4:2x2'"),
        (["runs/a", "runs/b"], "unknown argument 'runs/b'"),
        (["--checkpoint", "runs/a"], "unknown argument '--checkpoint'; see --help"),
        (["--config", "demo", "--samples=0"], "--samples must be at least 1"),
        (["--config", "demo", "--seconds=nan"], "--seconds at least 0"),
        (["/nowhere/run"], "'/nowhere/run' does not exist; name the folder of a run"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(SystemExit) as end:
        doctor.main(arguments)
    assert message in str(end.value) and str(end.value).startswith("error: ")
