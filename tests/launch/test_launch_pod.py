"""launch/tpu_pod.sh, which keeps a run going until it is complete, against a cloud that is made of shell scripts."""

import json
import os
import shlex

import pytest

from tests.helpers.fake_cloud import GCLOUD
from tests.helpers.launching import COMMAND, TRAINING, executable, read


def test_pod_whose_training_is_lost_is_created_again(cloud):
    worker = cloud.path / "home" / "xclip_jax"
    worker.mkdir(parents=True)
    (worker / "train.pid").write_text(f"{os.getpid()}\n")
    (cloud.path / "state").write_text("ACTIVE\n")
    # The fake `delete` kills what train.pid names.
    executable(cloud.path / "bin" / "gcloud", GCLOUD.replace('kill "$(cat', ': "$(cat'))
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["finish; exit 0"])
    assert done.returncode == 0, done.stderr
    assert "training failed with exit status lost" in done.stdout
    assert cloud.verbs() == ["delete", "create", "python", "delete"]


def test_pod_goes_on_until_the_run_is_complete(cloud):
    scenario = [
        'echo SUSPENDED >"$CLOUD/state"; exec sleep 30',  # preempted, the state tells
        'echo "wrong" >&2; exit 3',  # an error
        "exit 79",  # hung
        "exit 75",  # asked to stop: saved, not complete
        'kill -TERM "$BASHPID"',  # asked to stop before it could save
        "exit 130",
        "exit 0",  # without a result
        'echo SUSPENDING >"$CLOUD/state"; (sleep 0.3; echo SUSPENDED >"$CLOUD/state") & exit 134',  # a host less
        "sleep 0.2; finish; exit 0",
    ]
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=scenario, FAILURES="4")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python", "delete"] * 9
    assert cloud.calls.count(["python", *COMMAND]) == 9
    assert (cloud.path / "pinned").read_text() == "jax==1.2.3\n" * 8  # the packages of the first pod
    reasons = ["the pod is SUSPENDED; ", "exit status 3; ", "exit status 79; ", "exit status 0 and without results; "]
    for reason in (*reasons, "the run is complete"):
        assert reason in done.stdout
    assert "exit status 134" not in done.stdout
    assert done.stdout.count("stopped before its end; ") == 3
    assert not (cloud.path / "state").exists()


def test_pod_gives_up_on_a_command_that_keeps_failing(cloud):
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["exit 1"] * 5, FAILURES="2")
    assert done.returncode == 1
    assert cloud.verbs() == ["create", "python", "delete"] * 2
    assert "line of the log" in done.stdout
    assert "exit status 1, 2 times in a row; giving up" in done.stdout
    logs = list((cloud.path / "bucket" / "bucket" / "runs" / "mine" / "logs").iterdir())
    assert logs and {log.read_text() for log in logs} == {"line of the log\n"}  # the pods with them are deleted


def test_pod_gives_up_on_a_queued_resource_that_keeps_failing(cloud):
    """Without a look at a log that it cannot have."""
    done = cloud.launch("tpu_pod.sh", *TRAINING, born="FAILED", FAILURES="2")
    assert done.returncode == 1
    assert "the pod is FAILED, 2 times in a row; giving up" in done.stdout
    assert cloud.verbs() == ["create", "delete"] * 2
    assert not any("ssh" in call for call in cloud.calls)


def test_pod_gives_up_at_once_on_input_that_training_refuses(cloud):
    refused = "echo \"error: unknown evaluation set 'imagenett'\" >&2; exit 1"
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[refused] * 3)
    assert done.returncode == 1
    assert cloud.verbs() == ["create", "python", "delete"]
    assert "error: unknown evaluation set 'imagenett'\n" in done.stdout
    assert "training refused its input, and would again; giving up" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        "this process cannot join the others (DEADLINE_EXCEEDED: Barrier timed out).",
        "process 3 of 16 has ended: OSError(5, 'Input/output error'). Process 0 ends too; start all of them again.",
        "process 0 of 16: OSError(116, 'Stale file handle')",
    ],
)
def test_pod_tries_again_after_a_passing_fault_before_the_first_step(words, cloud):
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[f'echo "error: {words}" >&2; exit 1', "finish; exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python", "delete"] * 2


def test_pod_does_not_take_a_bucket_that_cannot_be_asked_for_one_without_metrics(cloud):
    gcloud = GCLOUD.replace(
        '  "storage ls "*)', '  "storage ls "*metrics.jsonl) echo "ERROR: token" >&2; exit 1 ;;\n  "storage ls "*)'
    )
    executable(cloud.path / "bin" / "gcloud", gcloud)
    refused = "echo \"error: process 0 of 16: unknown evaluation set 'imagenett'\" >&2; exit 1"
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[refused, "finish; exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python", "delete"] * 2


def test_pod_is_not_complete_where_a_set_failed(cloud):
    results = json.dumps({"results": {"b/top1": 1.0}, "failed": {"a": "disk"}}, indent=2, sort_keys=True)
    failed = f"put metrics.jsonl; put results.json {shlex.quote(results)}; exit 134"
    scenario = [failed.replace("\n", "'$'\\n''"), "finish; exit 0"]
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=scenario)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python", "delete"] * 2


def test_pod_is_not_complete_by_the_results_that_an_earlier_start_has_left(cloud):
    """Other sets are asked for, and one of them is refused before anything of the run's folder is changed."""
    refused = 'put metrics.jsonl; finish; echo "error: process 0 of 16: unknown evaluation set" >&2; exit 1'
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[refused] * 3, FAILURES="2")
    assert done.returncode == 1
    assert "training failed with exit status 1, 2 times in a row; giving up" in done.stdout


def test_pod_tries_again_after_an_error_in_the_midst_of_a_run(cloud):
    scenario = ["put metrics.jsonl; echo 'error: gs://data cannot be read' >&2; exit 1", "finish; exit 0"]
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=scenario)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python", "delete"] * 2


def test_pod_that_cannot_be_created_is_an_error(cloud):
    executable(cloud.path / "bin" / "gcloud", GCLOUD.replace('*" create "*)', '*" create "*) exit 5 ;; never)'))
    assert cloud.launch("tpu_pod.sh", *TRAINING).returncode == 1


def test_pod_that_cannot_be_deleted_at_first_has_failed_once(cloud):
    failing = """*" delete "*)
    n=$(($(cat "$CLOUD/deletes" 2>/dev/null || echo 0) + 1)); echo "$n" >"$CLOUD/deletes"
    [ "$n" -gt 3 ] || { echo "ERROR: try again" >&2; exit 1; }"""
    executable(cloud.path / "bin" / "gcloud", GCLOUD.replace('*" delete "*)', failing))
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["exit 3", "finish; exit 0"], FAILURES="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("it could not be deleted yet") == 3 and "2 times in a row" not in done.stdout
    assert cloud.verbs() == ["create", "python", *["delete"] * 4, "create", "python", "delete"]


def test_pod_watch_that_is_taken_up_again_creates_a_pod_more_than_once(cloud):
    (cloud.path / "state").write_text("SUSPENDED\n")
    failing = """*" create "*)
    n=$(($(cat "$CLOUD/creates" 2>/dev/null || echo 0) + 1)); echo "$n" >"$CLOUD/creates"
    [ "$n" -gt 2 ] || { echo "ERROR: no capacity" >&2; exit 1; }"""
    executable(cloud.path / "bin" / "gcloud", GCLOUD.replace('*" create "*)', failing))
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["finish; exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["delete", *["create"] * 3, "python", "delete"]


def test_pod_is_not_complete_by_older_results_where_a_host_is_lost(cloud):
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["finish; exit 79", "exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python", "delete"] * 2


def test_pod_watch_is_taken_up_again(cloud):
    """A second watch, over a pod on which training is under way, starts nothing and sees it through."""
    watched = """until [ "$(grep -c 'queued-resources describe' "$CLOUD/calls")" -ge 2 ]; do sleep 0.05; done; finish"""
    assert cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=[watched]).returncode == 0
    (cloud.path / "state").write_text("ACTIVE\n")
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[""], KEEP="1")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python"]
    assert (cloud.path / "state").exists()


def test_pod_that_was_kept_starts_the_corrected_command(cloud):
    """Neither the exit status nor the log of the earlier command counts as this one's."""
    refused = "echo \"error: data folder '/a b' does not exist\" >&2; exit 1"
    assert cloud.launch("tpu_pod.sh", *TRAINING, scenario=[refused], KEEP="1").returncode == 1
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["", "exit 1", "finish; exit 0"], KEEP="1")
    assert done.returncode == 0, done.stderr
    assert "an earlier command ended here with exit status 1" in done.stdout and "does not exist" not in done.stdout
    assert "training failed with exit status 1; " in done.stdout  # its own start does count
    assert cloud.verbs() == ["create", "python", "python", "delete", "create", "python"]


def test_pod_that_was_kept_trains_for_more_sets(cloud):
    """Whether results of an earlier command have all that this one asks for is known to training alone."""
    for scenario, verbs in (
        (["finish; exit 0"], ["create", "python"]),
        (["", "finish"], ["create", "python", "python"]),
    ):
        done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=scenario, KEEP="1")
        assert done.returncode == 0 and "the run is complete" in done.stdout, done.stderr
        assert cloud.verbs() == verbs


def test_pod_that_was_kept_trains_another_run(cloud):
    assert cloud.launch("tpu_pod.sh", *TRAINING, scenario=["finish; exit 0"], KEEP="1").returncode == 0
    finish = 'mkdir "$CLOUD/bucket/bucket/runs/other"; echo "{}" >"$CLOUD/bucket/bucket/runs/other/results.json"'
    other = [*TRAINING, "--config.run=gs://bucket/runs/other"]
    done = cloud.launch("tpu_pod.sh", *other, scenario=["", finish], KEEP="1")
    assert done.returncode == 0, done.stderr
    assert "the run is complete" in done.stdout
    assert cloud.verbs() == ["create", "python", "python"]
    assert "line of the log" in read(cloud.path / "home/xclip_jax/train.log.1")
