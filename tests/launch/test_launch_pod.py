"""launch/tpu_pod.sh, which keeps a run going until it is complete, against a cloud that is made of shell scripts."""

import pytest

from tests.helpers.launching import COMMAND, TRAINING


def test_pod_goes_on_until_the_run_is_complete(cloud):
    scenario = [
        'echo SUSPENDED >"$CLOUD/state"; exec sleep 30',  # preempted, the state tells
        'echo "wrong" >&2; exit 3',  # an error
        "exit 79",  # hung
        "exit 75",  # asked to stop: saved, not complete
        "exit 0",  # without a result
        'echo SUSPENDING >"$CLOUD/state"; (sleep 0.3; echo SUSPENDED >"$CLOUD/state") & exit 134',  # a host less
        "sleep 0.2; finish; exit 0",
    ]
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=scenario, FAILURES="4")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python", "delete"] * 7
    assert cloud.calls.count(["python", *COMMAND]) == 7
    assert (cloud.path / "pinned").read_text() == "jax==1.2.3\n" * 6  # the packages of the first pod
    reasons = ["the pod is SUSPENDED; ", "exit status 3; ", "exit status 79; ", "exit status 0 and without results; "]
    for reason in (*reasons, "the run is complete"):
        assert reason in done.stdout
    assert "exit status 134" not in done.stdout
    assert done.stdout.count("stopped before its end; ") == 1
    assert not (cloud.path / "state").exists()


def test_pod_gives_up_on_a_command_that_keeps_failing(cloud):
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=["exit 1"] * 5, FAILURES="2")
    assert done.returncode == 1
    assert cloud.verbs() == ["create", "python", "delete"] * 2
    assert "line of the log" in done.stdout
    assert "exit status 1, 2 times in a row; giving up" in done.stdout
    logs = list((cloud.path / "bucket" / "bucket" / "runs" / "mine" / "logs").iterdir())
    assert logs and {log.read_text() for log in logs} == {"line of the log\n"}  # the pods with them are deleted


def test_pod_gives_up_at_once_on_input_that_training_refuses(cloud):
    """A run that was preempted after its first step, too: what counts is how this start went."""
    refused = "echo \"error: unknown evaluation set 'imagenett'\" >&2; exit 1"
    trained = 'echo "clip: 12 parameters, 8 samples"; echo SUSPENDED >"$CLOUD/state"; exec sleep 30'
    (cloud.path / "bucket" / "bucket" / "runs" / "mine").mkdir(parents=True)
    (cloud.path / "bucket" / "bucket" / "runs" / "mine" / "metrics.jsonl").write_text('{"step": 1}\n')
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[trained, refused, refused])
    assert done.returncode == 1
    assert cloud.verbs() == ["create", "python", "delete"] * 2
    assert "error: unknown evaluation set 'imagenett'\n" in done.stdout
    assert "training refused its input, and would again; giving up" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        "error: 'gs://bucket/runs/mine/config.json': ServiceUnavailable, status 503: busy",
        "error: checkpoint gs://bucket/1 cannot be read, though it is whole; run the same command to try again.",
        r"clip: 12 parameters, 8 samples\nerror: too many samples are bad",
    ],
)
def test_pod_tries_again_after_a_fault_that_may_pass(cloud, words):
    scenario = [f'echo -e "{words}"; exit 1', "finish; exit 0"]
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=scenario)
    assert done.returncode == 0, done.stdout
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
