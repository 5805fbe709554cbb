"""The scripts for TPUs, against a cloud that is made of shell scripts."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from tests.helpers.fake_cloud import REQUIRED, Cloud
from tests.helpers.launching import COMMAND, TRAINING, commands, launch, read, untouched
from xclip_jax.core import environment

FIRST_STEP = 'echo "clip: 1,234 parameters, 56 pairs"'


def remote(call):
    """The command that a call of `gcloud ... ssh` carries, as words."""
    return shlex.split(next(word for word in call if word.startswith("--command=")).removeprefix("--command="))


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
@pytest.mark.parametrize(
    ("env", "args", "message"),
    [
        ({"ZONE": "z"}, TRAINING, "error: PROJECT is not set; set it as in PROJECT=my-project"),
        ({"PROJECT": "p"}, TRAINING, "error: ZONE is not set; set it as in ZONE=us-west4-a"),
        (REQUIRED | {"TYPE": "v9-8"}, TRAINING, "error: RUNTIME is not set, and none is known for TYPE=v9-8; set it"),
        (REQUIRED | {"TYPE": "tpu7x-8"}, TRAINING, "error: TYPE=tpu7x-8: the Cloud TPU API, on which this"),
        (REQUIRED | {"TYPE": "tpu7x", "RUNTIME": "v2-alpha-tpuv6e"}, TRAINING, "error: TYPE=tpu7x: "),
        (
            REQUIRED | {"EXTRAS": "wandb"},
            TRAINING,
            "error: EXTRAS=wandb lacks tpu, without which JAX finds no TPU; set",
        ),
        (REQUIRED, [], "error: "),
        (REQUIRED, TRAINING, "error: gcloud is missing"),
    ],
)
def test_what_is_missing_is_one_sentence(script, env, args, message):
    done = launch(script, *args, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "run", "message"),
    [
        (
            "tpu_pod.sh",
            "",
            "error: --config.run is missing; say where the run is kept, as in --config.run=gs://my-bucket",
        ),
        ("tpu_pod.sh", "runs/mine", "error: --config.run=runs/mine would be lost with the pod; give a gs:// folder"),
        ("slurm.sh", "", "error: --config.run is missing; say where the run is kept, as in --config.run=/shared"),
    ],
)
def test_a_run_that_would_be_lost_is_one_sentence(script, run, message):
    done = launch(script, "--config", "configs/pretrain.py:objective=xclip", f"--config.run={run}", env=REQUIRED)
    assert done.returncode == 2
    assert done.stderr.startswith(message)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
@pytest.mark.parametrize(
    ("env", "flags", "runtime"),
    [
        ({}, {"--zone=some-zone", "--project=some-project"}, "v2-alpha-tpuv5-lite"),
        ({"TYPE": "v4-8"}, {"--accelerator-type=v4-8"}, "tpu-ubuntu2204-base"),
        ({"TYPE": "v5p-8"}, {"--accelerator-type=v5p-8"}, "v2-alpha-tpuv5"),
        ({"TYPE": "v6e-8", "SPOT": "1"}, {"--accelerator-type=v6e-8", "--spot"}, "v2-alpha-tpuv6e"),
        ({"TYPE": "v4", "TOPOLOGY": "2x2x4"}, {"--type=v4", "--topology=2x2x4"}, "tpu-ubuntu2204-base"),
        ({"RUNTIME": "next", "CREATE_FLAGS": "--reserved --network=x"}, {"--reserved", "--network=x"}, "next"),
    ],
)
def test_dry_run_creates_what_was_asked_for(script, env, flags, runtime, checkout, tmp_path):
    with untouched(tmp_path) as path:
        done = launch(script, "--dry-run", *TRAINING, env=REQUIRED | env, cwd=checkout, path=[path])
    create = next(call for call in commands(done) if "create" in call[:5])
    if script == "tpu_vm.sh":
        assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "xclip-jax"]
        flags = flags | {f"--version={runtime}"}
    else:
        assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "xclip-jax"]
        flags = flags | {"--node-id=xclip-jax", f"--runtime-version={runtime}"}
    assert flags <= set(create)
    assert ("--spot" in create) == ("SPOT" in env)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
@pytest.mark.parametrize("more", [{}, {"LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b=2"}])
def test_dry_run_reaches_all_workers_with_the_command_intact(script, more, checkout, tmp_path):
    env = REQUIRED | {"NAME": "mine", "SETUP": "sudo mount /dev/sdb '/a b'", "EXTRAS": "tpu,wandb"} | more
    with untouched(tmp_path) as path:
        calls = commands(launch(script, "--dry-run", *TRAINING, env=env, cwd=checkout, path=[path]))
    # A config that is wrong, a bucket out of reach and a checkout that cannot be packed cost nothing.
    assert calls[0] == ["env", "JAX_PLATFORMS=cpu", "python3", "-m", "xclip_jax.main", "--check", *TRAINING]
    assert calls[1] == ["gcloud", "storage", "ls", "gs://bucket"]
    assert [call[0] for call in calls[2:4]] == ["mkdir", "git"]
    for call in calls[4:]:
        assert call[0] == "gcloud"
        if call[:3] == ["gcloud", "compute", "tpus"]:
            assert {"--project=some-project", "--zone=some-zone"} <= set(call)
            assert call[5] == "mine" or call[4] == "scp"
    over_ssh = [call for call in calls if call[4:5] == ["ssh"]]
    everywhere = [remote(call) for call in over_ssh if "--worker=all" in call]
    flags = ["env", f"LIBTPU_INIT_ARGS={more['LIBTPU_INIT_ARGS']}"] if more else []
    start = ["bash", "xclip_jax/launch/detach.sh", *flags, ".venv/bin/python", *COMMAND]
    assert everywhere[-2:] == [["sudo", "mount", "/dev/sdb", "/a b"], start]
    assert any(".[tpu,wandb]" in command for command in everywhere)
    assert any("--worker=all" in call for call in calls if call[4:5] == ["scp"])


def test_dry_run_reaches_the_workers_of_all_slices(checkout, tmp_path):
    env = REQUIRED | {"NAME": "mine", "SLICES": "2"}
    with untouched(tmp_path) as path:
        calls = commands(launch("tpu_pod.sh", "--dry-run", *TRAINING, env=env, cwd=checkout, path=[path]))
    create = next(call for call in calls if "create" in call[:5])
    assert create[5] == "mine" and {"--node-count=2", "--node-prefix=mine"} <= set(create)
    assert not any(word.startswith("--node-id") for word in create)
    # What one slice gets the other gets next, and the first worker of all is asked how training goes.
    everywhere = [call for call in calls if call[4:5] in (["ssh"], ["scp"]) and "--worker=all" in call]
    assert len(everywhere) > 4
    for first, second in zip(everywhere[::2], everywhere[1::2], strict=True):
        assert any(word.startswith("mine-0") for word in first)
        assert [word.replace("mine-0", "mine-1") for word in first] == second
    assert {call[5] for call in calls if "--worker=0" in call} == {"mine-0"}
    assert [call[5] for call in calls if call[3:5] == ["queued-resources", "delete"]] == ["mine"]


@pytest.mark.parametrize("slices", ["0", "two"])
def test_slices_are_a_number(slices):
    done = launch("tpu_pod.sh", "--dry-run", *TRAINING, env=REQUIRED | {"SLICES": slices})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: SLICES={slices} is not a number of slices")


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


def test_vm_whose_training_fails_at_once_is_an_error_with_the_command_that_deletes_it(cloud):
    """Not so by what an earlier start has left in the log."""
    worker = cloud.path / "home" / "xclip_jax"
    worker.mkdir(parents=True)
    (worker / "train.log").write_text("clip: 1 parameters, 2 pairs\n")
    refused = "echo \"error: data folder '/data/pairs' does not exist\" >&2; exit 1"
    done = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=[refused])
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == ["line of the log", "error: data folder '/data/pairs' does not exist"]
    failed, delete = done.stderr.splitlines()[-2:]
    assert failed == "error: training has failed with exit status 1, see above"
    assert delete.startswith(
        "xclip-jax exists and costs money; to delete it: gcloud compute tpus tpu-vm delete xclip-jax"
    )


def test_vm_that_takes_long_to_its_first_step_is_no_error(cloud):
    done = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["exec sleep 30"])
    os.kill(int(read(cloud.path / "home" / "xclip_jax" / "train.pid")), signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert "has started on xclip-jax and has not come to its first step yet" in done.stdout


def head(checkout):
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True).strip()


@pytest.mark.parametrize("source", ["clone", "shallow clone", "git archive", "folder"])
def test_workers_have_the_code_and_its_commit_from(source, checkout, tmp_path):
    copy, commit = tmp_path / "source", head(checkout)
    if source == "shallow clone":
        subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{checkout}", copy], check=True)
    elif source == "git archive":
        copy.mkdir()
        subprocess.run(f"git archive HEAD | tar -x -C {copy}", cwd=checkout, shell=True, check=True)
    else:
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git" if source == "folder" else "none"))
    cloud = Cloud(tmp_path, copy)
    worker = tmp_path / "home" / "xclip_jax"
    (worker / ".git").mkdir(parents=True)  # of an earlier release
    (worker / "xclip_jax").mkdir()
    (worker / "xclip_jax" / "removed_since.py").touch()
    done = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert environment.git_commit(epath.Path(worker / "xclip_jax")) == ("unknown" if source == "folder" else commit)
    names = ["setup.py", "README.md", "configs/pretrain.py", "launch/detach.sh", "xclip_jax/main.py"]
    assert [name for name in names if not (worker / name).is_file()] == []
    assert not (worker / "xclip_jax" / "removed_since.py").exists()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
def test_checkout_that_cannot_be_packed_costs_nothing(script, checkout, tmp_path):
    shutil.copytree(checkout, tmp_path / "source", ignore=shutil.ignore_patterns("objects"))
    cloud = Cloud(tmp_path, tmp_path / "source")
    done = cloud.launch(script, *TRAINING)
    assert done.returncode != 0 and "fatal: " in done.stderr
    assert cloud.verbs() == []


def test_vm_that_exists_is_used_and_training_not_started_twice(cloud):
    first = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["exec sleep 30"])
    assert first.returncode == 0, first.stderr
    home = cloud.path / "home" / "xclip_jax"
    (home / "runs").mkdir()
    code = home / "xclip_jax" / "of_the_first_start.py"
    code.touch()
    try:
        again = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["exec sleep 30"])
        assert again.returncode != 0
        assert "error: training runs already, as process" in again.stderr
        assert cloud.verbs() == ["create", "python"]
        assert code.exists()  # what runs may import it yet
    finally:
        os.kill(int(read(home / "train.pid")), signal.SIGTERM)
    while not (home / "train.exit").exists():
        time.sleep(0.05)
    resumed = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["", "exit 0"])
    assert resumed.returncode == 0, resumed.stderr
    assert cloud.verbs() == ["create", "python", "python"]
    assert (home / "runs").is_dir()


def test_pid_of_another_process_does_not_count_as_training(cloud):
    """As after a reboot: train.pid is there, train.exit is not, and the number is that of an unrelated process."""
    worker = cloud.path / "home" / "xclip_jax"
    worker.mkdir(parents=True)
    (worker / "train.pid").write_text(f"{os.getpid()}\n")
    done = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python"]


def test_vm_in_another_state_is_one_sentence(cloud):
    (cloud.path / "state").write_text("PREEMPTED\n")
    done = cloud.launch("tpu_vm.sh", *TRAINING)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: xclip-jax is PREEMPTED; ")
    assert cloud.verbs() == []


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
@pytest.mark.parametrize(
    ("env", "more", "message"),
    [
        ({"LOGGED_OUT": "1"}, [], "error: this machine cannot list gs://bucket; log in (gcloud auth login), or"),
        (
            {},
            ["--config.log.to=('wandb',)"],
            "error: log.to names wandb, which the workers would lack; set EXTRAS=tpu,w",
        ),
        (
            {"EXTRAS": "tpu,wandb"},
            ["--config.log.to=('wandb',)"],
            "error: log.to names wandb, for which the workers have no key; write WANDB_API_KEY=...",
        ),
        ({"ENV_FILE": "/nowhere/keys"}, [], "error: ENV_FILE=/nowhere/keys is not a file that can be read; correct it"),
        ({"PYTHON": sys.executable}, ["--config.optim.lrr=1"], "error: config key 'optim.lrr' is unknown"),
        (
            {"PYTHON": sys.executable, "EXTRAS": "tpu,demo"},
            ["--config.init.weights=hf:org/name", "--config.data.sources=('hf:org/name/train', 'demo:train')"],
            "error: the config needs datasets,hub, which the workers would lack; set EXTRAS=tpu,demo,datasets,hub\n",
        ),
    ],
)
def test_what_would_fail_later_costs_nothing(script, env, more, message, cloud):
    done = cloud.launch(script, *TRAINING, *more, **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.verbs() == []
