"""launch/tpu_pod.sh, which keeps a run going until it is complete, against a cloud that is made of shell scripts."""

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
    refused = "echo \"error: unknown evaluation set 'imagenett'\" >&2; exit 1"
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[refused] * 3)
    assert done.returncode == 1
    assert cloud.verbs() == ["create", "python", "delete"]
    assert "error: unknown evaluation set 'imagenett'\n" in done.stdout
    assert "training refused its input, and would again; giving up" in done.stdout


def test_pod_watch_is_taken_up_again(cloud):
    """A second watch, over a pod on which training is under way, starts nothing and sees it through."""
    watched = """until [ "$(grep -c 'queued-resources describe' "$CLOUD/calls")" -ge 2 ]; do sleep 0.05; done; finish"""
    assert cloud.launch("tpu_vm.sh", *TRAINING, born="READY", scenario=[watched]).returncode == 0
    (cloud.path / "state").write_text("ACTIVE\n")
    done = cloud.launch("tpu_pod.sh", *TRAINING, scenario=[""], KEEP="1")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "python"]
    assert (cloud.path / "state").exists()
