import dataclasses
import functools
import json
import math
import multiprocessing
import pathlib
import subprocess
import time
import types

import pytest

from studies import records, runner, worker
from tests.studies import made
from tests.studies.made import ONE, TEST_SET
from xclip_jax.core.errors import UserError


def study(folder):
    """Run an arm of 40 steps, of code that may be uncommitted, and keep its folder."""
    runner.code_version = lambda: "c"
    runner.shutil.rmtree = print
    arm = dataclasses.replace(ONE, changes={"steps": 40})
    runner.Runner(made.matrix(arm), folder / "runs.jsonl", folder / "scratch").run()


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path, pairs, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("STUDY_PAIRS", str(pairs))
    command = functools.partial(multiprocessing.get_context("spawn").Process, target=study, args=(tmp_path,))
    deadline = time.time() + 400
    process = command()
    process.start()
    while time.time() < deadline and not list(tmp_path.glob("scratch/*/metrics.jsonl")):
        time.sleep(0.1)
    process.kill()
    process.join()
    # The run notices, saves and ends; until then the folder is in use.
    while process.exitcode and time.time() < deadline:
        process = command()
        process.start()
        process.join()
    log = next(tmp_path.glob("scratch/one-*/output.log")).read_text()
    assert process.exitcode == 0 and "saving, then stopping" in log and "resuming at step" in log
    (record,) = records.read_all(tmp_path / "runs.jsonl").values()
    assert record.config["steps"] == 40 and record.value(TEST_SET, "") is not None


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run arms as processes that end at once with `run.status`, by code of `run.commits`; return all records."""

    def ended(command, **_):
        folder = pathlib.Path(command[3])
        (folder / "output.log").write_text("error: killed\n")
        if run.status:
            (folder / worker.DIVERGED).write_text(json.dumps({"error": "loss of step 3 is nan"}))
        else:
            made.write_folder(folder, json.loads((folder / worker.REQUEST).read_text())["config"], run.value)
        return types.SimpleNamespace(returncode=run.status, poll=lambda: run.status)

    def run(*arms, **options):
        study = runner.Runner(made.matrix(*arms), tmp_path / "runs.jsonl", tmp_path / "scratch", **options)
        assert study.run() == ("max_hours" not in options)
        assert [path.name for path in (tmp_path / "scratch").iterdir()] == [".lock"]
        return list(records.read_all(tmp_path / "runs.jsonl").values())

    run.commits = ["a"]
    run.status, run.value = 0, 7.0
    monkeypatch.setattr(runner.subprocess, "Popen", ended)
    monkeypatch.setattr(runner, "code_version", lambda: run.commits.pop(0) if run.commits[1:] else run.commits[0])
    monkeypatch.setattr(runner, "_POLL", 0.01)
    return run


def test_runs_leave_records_and_are_not_run_again(run):
    run.status = 1
    with pytest.raises(UserError, match=r"1 runs failed; .* again. one, seed 0: error: killed \(see .*output.log"):
        run(ONE)
    run.status = 0
    run.commits = ["a", "a", "b"]  # checked, at its start, at its end
    (first,) = run(ONE)
    assert (first.arm, first.seed, first.commit, first.value(TEST_SET, "")) == ("one", 0, "a, b", 7.0)
    assert not first.error  # the mark of divergence was of the earlier start
    # To record a run again is an error; CLIP's first seed has the config of `ONE`.
    shared = [(r.arm, r.seed) for r in run(ONE, *made.ARMS, workers=2)]
    assert shared == [("clip", 1), ("one", 0), ("xclip", 0), ("xclip", 1)]


def test_results_that_are_not_finite_are_recorded_and_have_no_value(run):
    run.value = math.nan
    first, second, *_ = run(*made.ARMS)
    assert first.value(TEST_SET, "top1") is None and second.mean(TEST_SET, ("top1", "rank")) is None


def test_commands_that_are_refused(run, tmp_path):
    assert run(ONE, max_hours=0.0) == []
    first = runner.Runner(made.matrix(ONE), tmp_path / "runs.jsonl", tmp_path / "scratch")
    with first._locked(), pytest.raises(UserError, match="is in use by another study"):
        run(ONE)
    run.commits = ["abc-dirty"]
    with pytest.raises(UserError, match="abc-dirty"):
        run(ONE)


def test_code_version(tmp_path):
    for name in ("xclip_jax/a.py", "docs/a.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    for command in ("init", "add .", "-c user.name=x -c user.email=x@x commit -m x"):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True, capture_output=True)
    (tmp_path / "docs" / "a.md").write_text("is not code")
    clean = runner.code_version(tmp_path)
    assert len(clean) == 40
    for name in ("examples/a.py", "studies/photographs/tokens.txt", "xclip_jax/new.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        assert runner.code_version(tmp_path) == f"{clean}-dirty"
        (tmp_path / name).unlink()
    (tmp_path / "xclip_jax" / "new.py").write_text("")
    for command in ("add .", "-c user.name=x -c user.email=x@x commit -m y"):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True, capture_output=True)
    head = subprocess.check_output(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], text=True).strip()
    assert runner.code_version(tmp_path) == head != clean
