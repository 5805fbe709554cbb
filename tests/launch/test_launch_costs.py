"""The scripts for TPUs: nothing goes on costing money without an end, or without a word."""

import shlex

import pytest

from tests.helpers.fake_cloud import GCLOUD
from tests.helpers.launching import TRAINING, executable, read

CHECKPOINTS = '"$CLOUD/bucket/bucket/runs/mine/checkpoints"'


def saves(step):
    """Commands that leave a complete checkpoint."""
    return f"mkdir -p {CHECKPOINTS}/{step}; touch {CHECKPOINTS}/{step}/commit_success.txt; "


def test_pod_sees_the_files_of_a_run_that_is_spelt_with_more_slashes(cloud):
    """The metrics, without which the error would be that of refused input, and the results."""
    error = "put metrics.jsonl; echo 'error: gs://data cannot be read' >&2; exit 1"
    args = [*TRAINING, "--config.run=gs://bucket//runs/./mine/"]
    done = cloud.launch("tpu_pod.sh", *args, scenario=[error, "finish", "exit 3", "exit 3"], FAILURES="2")
    assert done.returncode == 0, done.stdout
    assert cloud.verbs() == ["create", "python", "delete"] * 2


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
def test_check_among_the_arguments_costs_nothing(script, cloud):
    done = cloud.launch(script, *TRAINING, "--check")
    assert done.returncode == 2 and done.stderr.startswith("error: --check trains nothing; leave it out")
    assert cloud.calls == []


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
def test_dry_run_after_the_other_arguments_costs_nothing(script, cloud):
    done = cloud.launch(script, *TRAINING, "--dry-run")
    assert (
        done.returncode == 2
        and done.stderr == "error: --dry-run is not the first argument; write it before the others\n"
    )
    assert cloud.calls == []


def test_pod_counts_an_end_without_results(cloud):
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["exit 0", "finish"], FAILURES="1")
    assert done.returncode == 1
    assert "training failed with exit status 0 and without results, 1 times in a row; giving up" in done.stdout


@pytest.mark.parametrize(("attempts", "delete", "status"), [(3, "", 0), (9, "", 1), (9, 'rm -f "$CLOUD/state"; ', 0)])
def test_pod_that_could_not_be_deleted_is_deleted_or_named(attempts, delete, status, cloud):
    """Attempts to delete it fail but for the last; in the third case what failed had deleted it."""
    fails = f'  *" delete "*)\n[ "$(grep -c " delete " "$CLOUD/calls")" -ge {attempts} ] || {{ {delete}exit 1; }}\n'
    executable(cloud.path / "bin" / "gcloud", GCLOUD.replace('  *" delete "*)\n', fails))
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["finish; exit 0"])
    assert done.returncode == status, done.stderr
    assert (cloud.path / "state").exists() == ("goes on costing money; delete it with: " in done.stdout) == bool(status)
    if status:
        command = shlex.split(done.stdout.rpartition("delete it with: ")[2])
        assert command == next(call for call in cloud.calls if "delete" in call)


def test_pod_gives_up_on_a_run_that_hangs_at_the_same_place(cloud):
    """Each look at the pod comes after more than an hour, in which training is seen to run."""
    hour = {"BASH_FUNC_sleep%%": '() { SECONDS=$((SECONDS + 4000)); command sleep "$@"; }'}
    hangs = f"{saves(100)} sleep 0.3; exit 79"
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[hangs] * 3 + ["finish"], FAILURES="2", **hour)
    assert done.returncode == 1
    assert "exit status 79, 2 times in a row; giving up" in done.stdout
    assert cloud.verbs() == ["create", "python", "delete"] * 2


def test_pod_forgets_failures_before_a_newer_checkpoint(cloud):
    scenario = [f"{saves(step)} exit 79" for step in (90, 100)]
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[*scenario, "finish; exit 0"], FAILURES="2")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("exit status 79; ") == 2


def test_pod_counts_no_checkpoint_whose_save_was_cut_off(cloud):
    """In a bucket it has its final name from the start."""
    scenario = [f"{saves(90)} mkdir -p {CHECKPOINTS}/{step}/state; exit 79" for step in (100, 110)]
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[*scenario, "finish; exit 0"], FAILURES="2")
    assert done.returncode == 1
    assert "exit status 79, 2 times in a row; giving up" in done.stdout


def test_pod_forgets_failures_while_training_runs(cloud):
    """The bucket shows a checkpoint at the second look, and cannot be asked when training fails again."""
    asked = '$(grep -c "/checkpoints/" "$CLOUD/calls")'
    looks = f'  "storage ls "*/commit_success.txt) [ "{asked}" = 2 ] && echo "${{3/\\*/100}}" ;;\n'
    ls = """  "storage ls "*'*'*)"""
    executable(cloud.path / "bin" / "gcloud", GCLOUD.replace(ls, looks + ls))
    waits = f'for _ in {{1..200}}; do [ "{asked}" != 2 ] || break; sleep 0.05; done'
    done = cloud.launch(
        "tpu_pod.sh", *TRAINING, scenario=["exit 79", f"{waits}; exit 79", "finish; exit 0"], FAILURES="2"
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("exit status 79; ") == 2


@pytest.mark.parametrize(
    ("broken", "setup", "message"),
    [('*" ssh "*) exit 255 ;;', "", "takes no connections"), ("", "echo no disk >&2; exit 3", "no disk")],
)
def test_vm_on_which_training_cannot_be_started_is_named(broken, setup, message, cloud):
    executable(cloud.path / "bin" / "gcloud", GCLOUD.replace('*" ssh "*)', f'{broken} *" ssh "*)', 1))
    done = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", SETUP=setup)
    assert done.returncode != 0 and message in done.stderr
    said, _, command = done.stderr.splitlines()[-1].partition("; to delete it: ")
    assert said == "xclip-jax exists and costs money"
    assert shlex.split(command)[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "delete", "xclip-jax"]


def test_vm_that_could_not_be_created_costs_nothing(cloud):
    executable(cloud.path / "bin" / "gcloud", GCLOUD.replace('*" create "*)', '*" create "*) exit 5 ;; never)'))
    done = cloud.launch("tpu_vm.sh", *TRAINING)
    assert done.returncode == 5 and "costs money" not in done.stderr
    assert not read(cloud.path / "state")
