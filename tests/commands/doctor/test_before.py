"""The doctor: each warning and FAIL of a config before its run."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import types

import jax
import pytest

from tests.helpers import tiny
from tests.helpers.findings import built, only
from xclip_jax.commands.doctor import __main__ as command
from xclip_jax.commands.doctor import machine, resources
from xclip_jax.commands.doctor.before import Options, check_config, check_weights
from xclip_jax.commands.doctor.finding import FAIL, OK, WARNING
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.demo import emoji
from xclip_jax.train import build, memory
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.training_folder import TrainingFolder

QUICK = Options(samples=32, seconds=0, step="never")


# --- devices and versions


def test_an_accelerator_that_jax_does_not_use(tmp_path):
    assert machine.accelerator(tmp_path) == ""
    card = tmp_path / "sys/bus/pci/devices/0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1ae0\n")
    (card / "device").write_text("0x0042\n")  # a network card of Google's
    assert machine.accelerator(tmp_path) == ""
    assert only(list(machine.check_devices(tmp_path)), "devices", OK).values["devices"] == jax.device_count()
    (card / "device").write_text("0x0063\n")
    finding = only(list(machine.check_devices(tmp_path)), "devices", WARNING)
    assert "JAX_PLATFORMS=cpu keeps JAX from this machine's TPU" in finding.text
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    platforms = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        finding = only(list(machine.check_devices(tmp_path)), "devices", FAIL)
    finally:
        jax.config.update("jax_platforms", platforms)
    assert "a NVIDIA GPU that JAX does not use" in finding.text and "xclip_jax[gpu]" in finding.remedy


@pytest.mark.parametrize("asked", ["cpu", None])
def test_commands_say_loudly_that_they_compute_on_the_cpu(asked, tmp_path, capsys, monkeypatch):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    platforms = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", asked)
        machine.warn_of_idle_accelerator(tmp_path)
    finally:
        jax.config.update("jax_platforms", platforms)
    out = capsys.readouterr().out
    assert out.count("WARNING: computing on the CPU. 8 x cpu, of 1 process; this machine has a NVIDIA GPU") == (
        not asked
    )

    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "devices", none)
    with pytest.raises(
        UserError, match=r"JAX has no device, .*Unable to initialize backend 'tpu'.*; unset JAX_PLATFORMS"
    ):
        machine.warn_of_idle_accelerator(tmp_path)


def installed(folder, **versions):
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name.replace('_', '-')}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_versions_that_are_not_those_that_are_needed(tmp_path, monkeypatch):
    assert only(list(machine.check_versions()), "versions", OK).values["jax"] == jax.__version__
    installed(tmp_path, optax="0.1.3", jaxlib="0.1.75", jax_cuda12_plugin="0.1.74")
    monkeypatch.syspath_prepend(tmp_path)
    findings = list(machine.check_versions())
    assert [(finding.mark, finding.text.partition(",")[0]) for finding in findings] == [
        (FAIL, "optax is 0.1.3"),
        (FAIL, "jax-cuda12-plugin is 0.1.74 and jaxlib 0.1.75"),
        (WARNING, f"jax is {jax.__version__} and jaxlib 0.1.75; they are released and tested as a pair"),
    ]
    assert findings[0].remedy == "pip install 'optax>=0.2.5'"
    assert findings[1].remedy == f"pip install -U 'jax[cuda12]=={jax.__version__}'"


def test_packages_and_a_python_that_are_missing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        assert "not installed" in only(list(machine.check_versions()), "versions", WARNING).text
    installed(tmp_path, xclip_jax="9.0")
    with (tmp_path / "xclip_jax-9.0.dist-info/METADATA").open("a") as file:
        file.write("Requires-Python: >=9\nRequires-Dist: of-nobody>=1; python_version > '3'\n")
        file.write("Requires-Dist: of-nobody-else; extra == 'test'\n")
    monkeypatch.syspath_prepend(tmp_path)
    findings = list(machine.check_versions())
    assert [(finding.mark, finding.text) for finding in findings] == [
        (FAIL, "of-nobody is not installed"),
        (FAIL, f"Python is {'.'.join(map(str, sys.version_info[:3]))}, and xclip_jax needs >=9"),
    ]


# --- config, folder, model


def test_faults_of_the_config_and_of_the_model_end_the_checks(tmp_path):
    config = tiny.config("clip", run=tmp_path / "run", optim__lr=-1.0, data__sources=("folder:x",))
    findings = list(check_config(config, QUICK))
    assert "optim.lr" in only(findings, "config", FAIL).text and findings[-1].check == "config"
    config.optim.lr, config.mesh.data = 1e-3, 3
    findings = list(check_config(config, QUICK))
    model = [finding for finding in findings if finding.check == "model"]
    assert [finding.mark for finding in model] == [FAIL, WARNING] and findings[-1] is model[-1]
    assert "does not fit 8 devices" in model[0].text
    config.mesh.data, config.data.tokenizer = -1, str(tmp_path / "no.json")
    findings = list(check_config(config, QUICK))
    assert any(x.mark == FAIL and x.check == "model" and "no.json" in x.text for x in findings)
    assert list(tmp_path.iterdir()) == []


def folder_finding(config, mark):
    """The line on the folder; the model is of no batch that could be built, so that nothing else is checked."""
    config.mesh.data = 3
    return only(list(check_config(config, QUICK)), "folder", mark)


def test_the_runs_folder(tmp_path, run):
    (tmp_path / "file").touch()
    finding = folder_finding(tiny.config(run=tmp_path / "file/run"), FAIL)
    assert "is not a folder; name another folder" in finding.text
    assert folder_finding(tiny.config(run=tmp_path / "new"), OK).text.endswith("starts at step 0")
    saved = json.loads((run / "config.json").read_text())["config"]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = schema.complete(saved | {"run": str(copy)})
    assert "resumes at step 0 of 10" in folder_finding(config, OK).text
    with (copy / ".lock").open("r+") as file:
        file.write("process 7 on a host\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use by process 7 on a host" in folder_finding(config, FAIL).text
    config.optim.lr = 0.5
    assert "optim.lr" in folder_finding(config, FAIL).text


def test_a_run_that_is_complete(tmp_path):
    config = tiny.config("clip", run=tmp_path, steps=2)
    experiment = build.build(config)
    folder = TrainingFolder(tmp_path)
    with folder.claimed(experiment.config, []):
        pass
    state = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), experiment.abstract)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(dataclasses.replace(state, step=jax.numpy.asarray(2)), {"samples": 32})
    folder.write_results(experiment.config, [])
    assert "nothing would be trained" in folder_finding(config, WARNING).text


# --- memory and disk


def test_a_state_that_is_larger_than_the_memory(tmp_path):
    changes = {"width": 2**15, "heads": 8, "depth": 64, "scan": True}
    config = tiny.config("clip")
    config.model.img.update(changes)
    step = resources.check_step(build.build(config), TrainingFolder(tmp_path))
    finding = only(step.findings, "memory", FAIL)
    assert step.seconds is None and finding.values["state_bytes"] > 1e12 and "fsdp" in finding.remedy


def test_a_step_that_does_not_fit(tmp_path, monkeypatch):
    """Microbatches need less; what does not fit is never run."""
    experiment = built("clip", data__batch=512)
    peak = memory.usage(experiment, memory.compile_for(experiment))["peak"]
    monkeypatch.setattr(memory, "capacity", lambda device: 0.9 * peak)
    monkeypatch.setattr(memory, "remedies", lambda config: [{"optim.microbatches": 16}])
    step = resources.check_step(experiment, TrainingFolder(tmp_path))
    finding = only(step.findings, "memory", FAIL)
    assert finding.remedy == "it fits with --config.optim.microbatches=16" and step.seconds is None
    monkeypatch.setattr(memory, "suggest", lambda *_: "")
    finding = only(resources.check_step(experiment, TrainingFolder(tmp_path)).findings, "memory", FAIL)
    assert "no change that was tried" in finding.remedy


def test_an_expensive_step_is_not_run_on_a_cpu(tmp_path):
    step = resources.check_step(built("clip", data__batch=2**21), TrainingFolder(tmp_path))
    finding = only(step.findings, "memory", OK)
    assert step.seconds is None and "TFLOP, is not compiled" in finding.text


def test_host_memory_is_some():
    assert 2**26 < memory.host_memory() < 2**50
    assert memory.capacity(jax.devices()[0]) == pytest.approx(memory.host_memory() / 8, rel=0.2)


def test_a_checkpoint_is_restored_before_the_step_is_timed(tmp_path):
    experiment = built("clip")
    folder = TrainingFolder(tmp_path / "run")
    findings = resources.check_step(experiment, folder).findings
    assert [x.check for x in findings] == ["memory", "step"]
    assert re.fullmatch(r"a step needs \S+ \S+ of \S+ \S+ \(\S+ \S+ for activations\)", findings[0].text)
    with Checkpointer(tmp_path / "run") as checkpointer:
        state = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), experiment.abstract)
        checkpointer.save(dataclasses.replace(state, step=jax.numpy.asarray(4)), {"samples": 64})
    step = resources.check_step(experiment, folder)
    assert only(step.findings, "resume", OK).text.startswith("the checkpoint of step 4 can be read")
    assert step.seconds > 0 and "the remaining 6 steps take" in only(step.findings, "step", OK).text
    for data in (tmp_path / "run/checkpoints/4/state").rglob("d/*"):
        data.unlink()
    step = resources.check_step(experiment, folder)
    finding = only(step.findings, "resume", FAIL)
    assert "checkpoints/4" in finding.text and step.seconds > 0, finding


def test_the_folder_whose_disk_is_checked_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finding = only(list(resources.check_disk(built("clip"), TrainingFolder("runs/x"))), "disk", OK)
    assert f"; {tmp_path} has " in finding.text


def test_checkpoints_that_the_disk_has_no_room_for(tmp_path):
    experiment = built("clip", steps=10**9, checkpoint__every=1, checkpoint__keep=10**9)
    finding = only(list(resources.check_disk(experiment, TrainingFolder(tmp_path / "a/b"))), "disk", FAIL)
    assert finding.values["checkpoints"] == 10**9 and "checkpoint.keep" in finding.remedy
    assert str(tmp_path) in finding.text
    experiment = built("clip", checkpoint__keep=1)
    finding = only(list(resources.check_disk(experiment, TrainingFolder(tmp_path))), "disk", OK)
    assert finding.values["checkpoints"] == 2
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(experiment.abstract))
    assert finding.values["needed_bytes"] == 2 * state and finding.text.startswith("2 checkpoints of ")
    (bucket,) = resources.check_disk(experiment, TrainingFolder("gs://bucket/run"))
    assert "in a bucket" in bucket.text


def test_one_checkpoint_takes_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(resources.disk_space, "most_added", lambda *_: 1)
    (finding,) = resources.check_disk(built("clip"), TrainingFolder("gs://bucket/run"))
    assert re.fullmatch(r"1 checkpoint of (\S+ \S+) takes \1 in a bucket", finding.text)


def test_checkpoints_that_are_kept_for_ever_need_space_too(tmp_path, monkeypatch):
    experiment = built("clip", steps=100, checkpoint__every=2, checkpoint__keep=3, checkpoint__keep_every=20)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(experiment.abstract))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=8.9 * state))
    finding = only(list(resources.check_disk(experiment, TrainingFolder(tmp_path))), "disk", FAIL)
    assert finding.values["checkpoints"] == 9 and "raise checkpoint.keep_every" in finding.remedy
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=9 * state))
    only(list(resources.check_disk(experiment, TrainingFolder(tmp_path))), "disk", OK)


# --- initial weights, the command


def test_initial_weights(tmp_path, run, pairs):
    changes = {"data__sources": (f"folder:{pairs}",), "init__weights": str(run)}
    config, folder = tiny.config("xclip", run=tmp_path / "new", **changes), TrainingFolder(tmp_path / "new")
    finding = only(list(check_weights(build.build(config), folder)), "weights", OK)
    assert finding.values["initial_values"] == finding.values["model_values"]
    config.model.embed = 24
    assert "has another architecture" in only(list(check_weights(build.build(config), folder)), "weights", FAIL).text
    assert list(check_weights(built("clip"), folder)) == []


RECIPE = """
from tests.helpers import tiny

def get_config(arg=None):
    return tiny.config("clip", run={run!r}, data__sources=({source!r},), steps=100)
"""


def start(tmp_path, pairs, *arguments, platforms="cpu"):
    """The command as a user starts it, on a recipe of his own."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(run=str(tmp_path / "run"), source=f"folder:{pairs}"))
    line = [sys.executable, "-m", "xclip_jax.__main__", "doctor", "--config", str(recipe), *arguments]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": platforms}
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def test_the_command_prints_json_and_fails(tmp_path, pairs):
    arguments = ["--json", "--step=never", "--seconds", "0.2", "--config.data.batch=48", "--config.steps", "50"]
    done = start(tmp_path, pairs, *arguments)
    content = json.loads(done.stdout)
    assert done.returncode == 1 and content["ok"] is False
    (fault,) = [row for row in content["findings"] if row["mark"] == FAIL]
    assert fault["check"] == "data" and "data.batch=48 exceeds the 40 pairs" in fault["text"]
    memory = next(row for row in content["findings"] if row["check"] == "memory")
    assert memory["values"]["flops_per_step"] > 0
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.py", "__pycache__"}


@pytest.mark.slow
def test_all_checks_of_the_command(tmp_path, pairs):
    """bash launch/test.sh -m slow tests/commands/doctor/test_before.py: with a compiled step, and without a device."""
    done = start(tmp_path, pairs, "--samples=32", "--seconds=0.2")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    checks = [line[9:23].strip() for line in lines[:-1]]
    expected = ["devices", "versions", "folder", "model", "memory", "step", "disk"]
    expected += ["data", "samples", "texts", "reading"]
    assert checks[: len(expected)] == expected and set(checks[len(expected) :]) == {"settings"}
    assert lines[-1].startswith(f"{len(checks)} checks: 0 FAIL, ")
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.py", "__pycache__"}
    done = start(tmp_path, pairs, platforms="cuda")
    assert done.returncode == 1 and done.stdout.startswith("FAIL     devices        JAX has no device")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["--config", "demo", "--topology=v4:2x2"], "unknown argument '--topology=v4:2x2'"),
        (["runs/a", "runs/b"], "unknown argument 'runs/b'"),
        (["--checkpoint", "runs/a"], "unknown argument '--checkpoint'; write RUN without --checkpoint; see --help"),
        (["--config", "demo", "--samples=0"], "--samples must be at least 1"),
        (["--config", "demo", "--seconds=nan"], "--seconds at least 0"),
        (["/nowhere/run"], "'/nowhere/run' does not exist; name the folder of a run"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert message in str(end.value) and str(end.value).startswith("error: ")


def test_a_missing_extra_is_one_failure(tmp_path, monkeypatch, capfd):
    """Of the demo's training data and all of its evaluation sets; nothing is announced as downloading."""
    monkeypatch.setattr(emoji, "PACKAGES", ("not-installed",))
    sets = ("emoji/test_concepts", "emoji/test_rendering")
    config = tiny.config("clip", data__sources=("demo:train",), data__dir=str(tmp_path), eval__sets=sets)
    failures = [finding for finding in check_config(config, QUICK) if finding.mark == FAIL]
    assert [finding.text for finding in failures] == [
        "the demo data needs the package 'not-installed': pip install 'xclip_jax[demo]'"
    ]
    assert "ownload" not in "".join(capfd.readouterr())
