import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from studies import records, runner, worker
from studies.declaration import Arm
from tests.studies import made
from tests.studies.greys import TEST_SET
from xclip_jax.core.errors import UserError

ONE = Arm("one", "", "tiny:objective=clip", {}, (0,))
# Runs an arm of 40 steps in argv[1], of code that may be uncommitted.
SCRIPT = """
import dataclasses, pathlib, sys
from studies import runner
from tests.studies import made, test_runner
arm = dataclasses.replace(test_runner.ONE, changes={"steps": 40})
runner.code_version = lambda: "c"
folder = pathlib.Path(sys.argv[1])
runner.Runner(made.matrix(arm), folder / "runs.jsonl", folder / "scratch").run()
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path, pairs):
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "STUDY_PAIRS": str(pairs)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    options = {"cwd": runner.ROOT, "env": env, "text": True}
    first = subprocess.Popen(command, **options)
    deadline = time.time() + 400
    while time.time() < deadline and not list(tmp_path.glob("scratch/*/metrics.jsonl")):
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    # The run notices, saves and ends; until then the folder is in use.
    (folder,) = tmp_path.glob("scratch/one-*")
    log = ""
    while time.time() < deadline:
        second = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
        while second.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                log = (folder / "output.log").read_text()
            time.sleep(0.05)
        if "is in use" not in second.stderr.read():
            break
    assert second.returncode == 0 and "saving, then stopping" in log and "resuming at step" in log
    (record,) = records.read_all(tmp_path / "runs.jsonl").values()
    assert record.config["steps"] == 40 and record.value(TEST_SET, "") is not None
    assert [path.name for path in (tmp_path / "scratch").iterdir() if path.name != "compiled"] == [".lock"]


class Done:
    status = 0
    before = None

    def __init__(self, command, **_):
        self.returncode = self.status
        folder = pathlib.Path(command[3])
        (folder / "output.log").write_text("error: killed\n")
        if self.status == 0:
            made.write_folder(folder, json.loads((folder / worker.REQUEST).read_text())["config"])
        if self.before:
            self.before(folder)

    def poll(self):
        return self.returncode

    wait = poll


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run arms as `Done` with code of the commits in `run.commits`, the last one for ever; return their records."""

    def run(*arms, **options):
        study = runner.Runner(made.matrix(*arms), tmp_path / "runs.jsonl", tmp_path / "scratch", **options)
        assert study.run() == ("max_hours" not in options)
        assert [path.name for path in (tmp_path / "scratch").iterdir()] == [".lock"]
        return list(records.read_all(tmp_path / "runs.jsonl").values())

    run.commits = ["a"]
    monkeypatch.setattr(runner.subprocess, "Popen", Done)
    monkeypatch.setattr(runner, "code_version", lambda: run.commits.pop(0) if run.commits[1:] else run.commits[0])
    monkeypatch.setattr(runner, "_POLL", 0.01)
    return run


def test_runs_leave_records_and_are_not_run_again(run, monkeypatch):
    run.commits = ["a", "a", "b"]  # checked, at its start, at its end
    (first,) = run(ONE)
    assert (first.arm, first.seed, first.commit, first.value(TEST_SET, "")) == ("one", 0, "a, b", 7.0)
    monkeypatch.setattr(Done, "status", 1)
    assert [record.key for record in run(ONE)] == [first.key]
    monkeypatch.setattr(Done, "status", 0)
    shared = [(r.arm, r.seed) for r in run(ONE, *made.ARMS)]  # CLIP's first seed has the config of `ONE`
    assert shared == [("clip", 1), ("one", 0), ("xclip", 0), ("xclip", 1)]


def test_failed_runs_are_named(run, monkeypatch):
    def mark(self, folder):
        (folder / worker.DIVERGED).write_text(json.dumps({"error": "loss of step 3 is nan"}))

    with monkeypatch.context() as patched:
        patched.setattr(Done, "status", 1)
        patched.setattr(Done, "before", mark)
        with pytest.raises(UserError, match=r"1 runs failed; .* again. one, seed 0: error: killed \(see .*output.log"):
            run(ONE)
    (record,) = run(ONE)
    assert not record.error  # the mark was of the earlier start


def test_commands_that_are_refused(run, tmp_path):
    assert run(ONE, max_hours=0.0) == []
    run.commits = ["abc-dirty"]
    with pytest.raises(UserError, match="abc-dirty"):
        run(ONE)
    run.commits = ["a"]
    first = runner.Runner(made.matrix(ONE), tmp_path / "runs.jsonl", tmp_path / "scratch")
    with first._locked(), pytest.raises(UserError, match="is in use by another study"):
        run(ONE)


def test_code_version(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    for name in ("xclip_jax/a.py", "docs/a.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    (tmp_path / "docs" / "a.md").write_text("is not code")
    clean = runner.code_version(tmp_path)
    assert len(clean) == 40
    (tmp_path / "xclip_jax" / "new.py").write_text("")
    assert runner.code_version(tmp_path) == f"{clean}-dirty"
