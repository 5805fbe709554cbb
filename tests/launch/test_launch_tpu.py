"""The scripts for TPUs, against a cloud that is made of shell scripts."""

import os
import shlex
import signal
import sys
import time

import pytest

from tests.helpers.fake_cloud import REQUIRED
from tests.helpers.launching import COMMAND, ROOT, RUN, TRAINING, commands, launch, read, untouched

WANDB = "--config.log.trackers=('wandb',)"
FIRST_STEP = 'echo "clip: 1,234 parameters, 56 pairs"'


def remote(call):
    """The command that a call of `gcloud ... ssh` carries, as words."""
    return shlex.split(next(word for word in call if word.startswith("--command=")).removeprefix("--command="))


RECIPE = ["--config", "configs/pretrain.py:objective=xclip"]


@pytest.mark.parametrize(
    ("script", "env", "args", "message"),
    [
        ("tpu_vm.sh", {"ZONE": "z"}, TRAINING, "error: PROJECT is not set"),
        ("tpu_vm.sh", REQUIRED | {"TYPE": "v9-8"}, TRAINING, "error: RUNTIME is not set, and none is known for TYPE"),
        ("tpu_pod.sh", REQUIRED | {"TYPE": "tpu7x-8"}, TRAINING, "error: TYPE=tpu7x-8: the Cloud TPU API"),
        ("tpu_vm.sh", REQUIRED | {"EXTRAS": "wandb"}, TRAINING, "error: EXTRAS=wandb lacks tpu"),
        ("tpu_vm.sh", REQUIRED, TRAINING, "error: gcloud is missing"),
        ("tpu_pod.sh", REQUIRED, [*RECIPE, "--config.run=runs/mine"], "error: --config.run=runs/mine would be lost"),
        ("slurm.sh", REQUIRED, [*RECIPE, "--config.run="], "error: --config.run is missing"),
    ],
)
def test_what_is_missing_is_one_sentence(script, env, args, message):
    done = launch(script, *args, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "env", "flags", "runtime"),
    [
        ("tpu_vm.sh", {"TYPE": "v5p-8"}, {"--accelerator-type=v5p-8"}, "v2-alpha-tpuv5"),
        ("tpu_pod.sh", {"TYPE": "v6e-8", "SPOT": "1"}, {"--accelerator-type=v6e-8", "--spot"}, "v2-alpha-tpuv6e"),
        ("tpu_pod.sh", {"TYPE": "v4", "TOPOLOGY": "2x2x4"}, {"--type=v4", "--topology=2x2x4"}, "tpu-ubuntu2204-base"),
        ("tpu_vm.sh", {"RUNTIME": "next", "CREATE_FLAGS": "--reserved"}, {"--reserved"}, "next"),
    ],
)
def test_dry_run_creates_what_was_asked_for(script, env, flags, runtime, checkout, tmp_path):
    with untouched(tmp_path) as path:
        done = launch(script, "--dry-run", *TRAINING, env=REQUIRED | env, cwd=checkout, path=[path])
    create = next(call for call in commands(done) if "create" in call[:5])
    version = "--version" if script == "tpu_vm.sh" else "--runtime-version"
    assert flags | {f"{version}={runtime}"} <= set(create)


SLICES = {"NAME": "mine", "SLICES": "2", "EXTRAS": "tpu,wandb", "SETUP": "sudo mount /dev/sdb '/a b'"}
SLICES |= {"LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b=2"}
SHARED = [word.replace(RUN, "/shared/runs/mine") for word in TRAINING]


@pytest.mark.parametrize(
    ("script", "env", "args"),
    [
        ("tpu_vm.sh", REQUIRED, TRAINING),
        ("tpu_pod.sh", REQUIRED | SLICES, TRAINING),
        ("slurm.sh", {"PYTHON": "/my env/bin/python"}, SHARED),
    ],
)
def test_dry_run_is_its_golden_file(script, env, args, checkout, tmp_path):
    """UPDATE_GOLDEN=1 writes the files; a change of theirs is read line by line."""
    with untouched(tmp_path) as path:
        done = launch(script, "--dry-run", *args, env=env, cwd=checkout, path=[path])
    assert done.returncode == 0, done.stderr
    golden = ROOT / "tests" / "golden" / "launch" / f"{script}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(done.stdout)
    assert done.stdout == golden.read_text()


def test_vm_is_created_and_training_outlives_the_connection(cloud):
    done = cloud.launch(
        "tpu_vm.sh", *TRAINING, born="READY", scenario=[f"{FIRST_STEP}; sleep 1; exit 7"], SETUP="touch 'set up'"
    )
    assert done.returncode == 0, done.stderr
    assert "Training runs on xclip-jax. xclip-jax costs money until it is deleted" in done.stdout
    assert "line of the log" in done.stdout
    assert cloud.verbs() == ["create", "python"]
    checkout = cloud.path / "home" / "xclip_jax"
    assert (cloud.path / "home" / "set up").exists()
    assert ["python", *COMMAND] in cloud.calls
    assert not (checkout / "train.exit").exists()
    follow, stop, delete = [shlex.split(line) for line in done.stdout.splitlines()[-3:]]
    assert remote(follow) == ["tail", "-n", "100", "-F", "xclip_jax/train.log"]
    assert "--worker=0" in follow and "--worker=all" in stop and "kill -TERM" in " ".join(stop)
    assert delete[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "delete", "xclip-jax"]
    deadline = time.monotonic() + 10
    while not (checkout / "train.exit").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read(checkout / "train.exit") == "7\n"
    assert "line of the log" in read(checkout / "train.log")


def test_vm_that_exists_is_used_and_training_not_started_twice(cloud):
    first = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["exec sleep 30"])
    assert first.returncode == 0, first.stderr
    home = cloud.path / "home" / "xclip_jax"
    (home / "runs").mkdir()
    code = home / "xclip_jax" / "of_the_first_start.py"
    code.touch()
    try:
        again = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["exec sleep 30"])
        assert again.returncode != 0 and "error: training runs already, as process" in again.stderr
        assert cloud.verbs() == ["create", "python"] and code.exists()  # what runs may import it yet
    finally:
        os.kill(int(read(home / "train.pid")), signal.SIGTERM)
    while not (home / "train.exit").exists():
        time.sleep(0.05)
    resumed = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["", "exit 0"])
    assert resumed.returncode == 0, resumed.stderr
    assert cloud.verbs() == ["create", "python", "python"] and (home / "runs").is_dir()


@pytest.mark.parametrize(
    ("script", "env", "more", "message"),
    [
        ("tpu_vm.sh", {"LOGGED_OUT": "1"}, [], "error: this machine cannot list gs://bucket"),
        ("tpu_pod.sh", {}, [WANDB], "error: log.trackers names wandb, which the workers would lack"),
        ("tpu_vm.sh", {}, ["--config.log.trackers=tensorboard,wandb"], "error: log.trackers names wandb, which the"),
        ("tpu_pod.sh", {"ENV_FILE": "/nowhere/keys"}, [], "error: ENV_FILE=/nowhere/keys is not a file"),
        ("tpu_vm.sh", {"PYTHON": sys.executable}, ["--config.optim.lrr=1"], "error: config key 'optim.lrr' is unknown"),
        (
            "tpu_pod.sh", {"PYTHON": sys.executable, "EXTRAS": "tpu,demo"},
            ["--config.init.weights=hf:org/name", "--config.data.sources=('hf:org/name/train', 'demo:train')"],
            "error: the config needs datasets,hub, which the workers would lack; set EXTRAS=tpu,demo,datasets,hub\n",
        ),
    ],
)  # fmt: skip
def test_what_would_fail_later_costs_nothing(script, env, more, message, cloud):
    done = cloud.launch(script, *TRAINING, *more, **env)
    assert done.returncode == 2 and message in done.stderr
    assert cloud.verbs() == []
