"""The study's command from run to page: a kill in the middle, another checkout, failures, time limits."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import study_tiny, tiny
from tests.study_sets import TEST_SET
from xclip_jax.errors import Diverged, UserError
from xclip_jax.study import records, runner, worker
from xclip_jax.study.declaration import Arm
from xclip_jax.study.matrix import Snapshot
from xclip_jax.train.interrupt import EXIT_RESUMABLE

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def source(monkeypatch, pairs):
    """The pairs as the source of the recipe "tiny", in this process and in those of runs."""
    monkeypatch.setenv(study_tiny.PAIRS, str(pairs))


def command(docs, scratch, *flags):
    return [sys.executable, "-m", "tests.study_tiny", "--docs", str(docs), "--scratch", str(scratch), *flags]


def environment(pairs):
    return os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", study_tiny.PAIRS: str(pairs)}


def files(docs):
    return {p.relative_to(docs): p.read_bytes() for p in sorted(docs.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_killed_resumed_and_written_again_byte_for_byte(tmp_path, pairs):
    docs, scratch = tmp_path / "docs", tmp_path / "scratch"
    env = environment(pairs) | {"STUDY_STEPS": "40"}
    line = command(docs, scratch, "--allow-dirty", "--only", "tuning,core")
    first = subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    deadline = time.time() + 400
    logs = scratch / "tuning_0.001-s9-*"
    while time.time() < deadline and not any(
        len(path.read_text().splitlines()) >= 3 for path in logs.parent.glob(f"{logs.name}/metrics.jsonl")
    ):
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list(docs.rglob("*.json"))
    # The run notices, saves and ends; the same command waits for it and goes on.
    done = subprocess.run([*line, "--keep"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    output = next(scratch.glob("tuning_0.001-s9-*/output.log")).read_text()
    assert "saving, then stopping" in output and "resuming at step" in output
    finished = records.read_all(docs / "study" / "runs")
    assert sorted(r.file_name.rpartition("-")[0] for r in finished.values()) == [
        "clip-s0", "clip-s1", "tuning_0.001-s9", "tuning_0.002-s9", "xclip-s0", "xclip-s1",
    ]  # fmt: skip
    for r in finished.values():
        assert r.curve["step"][-1] == 40 and len(r.curve["step"]) == records.CURVE_POINTS
        assert (r.value(TEST_SET, "") is None) == (r.section == "tuning")
    assert "All 6 runs have a file." in (docs / "study.md").read_text()
    assert "6 of 6 runs" not in done.stdout and "[1 of 6 runs" in done.stdout

    # In another checkout with the files nothing is left to run, and the page is the same, by either command.
    before = files(docs)
    for flags in (["--page"], ["--allow-dirty"]):
        (docs / "study.md").unlink()
        again = subprocess.run(
            command(docs, tmp_path / "elsewhere", *flags), cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert again.returncode == 0, again.stderr
        assert "seed" not in again.stdout and files(docs) == before


def small(tmp_path, arms=None, **options):
    changes = {} if arms is None else {"arms": arms, "baseline": arms[0].name} | dict.fromkeys(
        ("claims", "doses", "controls"), ()) | {"choices": {}, "common": {}}  # fmt: skip
    matrix = study_tiny.matrix(tuned=False, **changes)
    return runner.Runner(matrix, tmp_path / "runs", tmp_path / "scratch", **{"allow_dirty": True} | options)


def test_uncommitted_code_is_refused(tmp_path, source, monkeypatch):
    monkeypatch.setattr(runner, "code_version", lambda: "abc-dirty")
    with pytest.raises(UserError, match=r"the code is not that of a commit \(abc-dirty\)"):
        small(tmp_path, allow_dirty=False).run()
    monkeypatch.setattr(runner, "code_version", lambda: "unknown")
    with pytest.raises(UserError, match="name their commit with --commit"):
        small(tmp_path, allow_dirty=False).run()


def test_code_version(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    (tmp_path / "xclip_jax").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("xclip_jax/a.py", "docs/study.md"):
        (tmp_path / name).write_text("")
    git("init")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-m", "x")
    (tmp_path / "docs" / "study.md").write_text("results are no change of the code")
    clean = runner.code_version(tmp_path)
    assert len(clean) == 40
    (tmp_path / "xclip_jax" / "new.py").write_text("")
    assert runner.code_version(tmp_path) == f"{clean}-dirty"


def test_nothing_is_started_after_the_time_limit(tmp_path, source, capsys):
    assert not small(tmp_path, max_hours=0.0).run()
    assert not list((tmp_path / "scratch").glob("clip*"))


def test_another_command_in_the_same_folder_is_refused(tmp_path, source, monkeypatch):
    monkeypatch.setattr(runner, "_LOCK_SECONDS", 0)
    first = small(tmp_path)
    first.scratch.mkdir()
    with first._locked(), pytest.raises(UserError, match="is in use by another study; wait, or pass --scratch"):
        small(tmp_path).run()


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, source, monkeypatch):
    sources = {"data.sources": (f"folder:{tmp_path / 'missing'}",)}
    bad = Arm("bad", "", "core", "tiny:objective=clip", sources, (0,))
    good = Arm("good", "", "core", "tiny:objective=clip", {}, (0,))
    with pytest.raises(
        UserError, match=r"1 runs failed; the same command tries again. bad, seed 0: error: data folder"
    ):
        small(tmp_path, arms=(bad, good)).run()
    assert [path.name[:8] for path in (tmp_path / "runs").iterdir()] == ["good-s0-"]
    assert not list((tmp_path / "scratch").glob("good*")) and list((tmp_path / "scratch").glob("bad*"))


def test_a_worker_writes_down_that_training_diverged(tmp_path, monkeypatch):
    def diverge(config):
        raise Diverged("loss of step 3 is nan")

    monkeypatch.setattr(worker, "_stop_with_parent", lambda: None)  # it would end this process
    monkeypatch.setattr(worker.trainer, "run", diverge)
    (tmp_path / worker.REQUEST).write_text(json.dumps({"config": tiny.config("clip").to_dict()}))
    worker.main(str(tmp_path))
    assert json.loads((tmp_path / worker.DIVERGED).read_text()) == {"error": "loss of step 3 is nan"}


@pytest.mark.slow
def test_an_interrupt_stops_the_command(tmp_path, pairs):
    line = command(tmp_path / "docs", tmp_path / "scratch", "--allow-dirty", "--only", "tuning_0.001")
    env = environment(pairs) | {"STUDY_STEPS": "100000"}
    process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 300
    while time.time() < deadline and not list((tmp_path / "scratch").glob("*/metrics.jsonl")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_RESUMABLE and "stopping: SIGINT; runs in progress are saved" in output
    folder = next((tmp_path / "scratch").glob("tuning_0.001-*"))
    assert list((folder / "checkpoints").iterdir())
    assert "**0 runs have a file, 6 are missing.**" in (tmp_path / "docs" / "study.md").read_text()


def test_a_finished_run_is_not_run_again(tmp_path, source):
    matrix = study_tiny.matrix(tuned=False)
    from tests.study_records import finished

    for r in finished(matrix, {"clip": 1.0, "xclip": 2.0}).values():
        records.write(tmp_path / "runs", r)
    assert small(tmp_path).run()
    assert not Snapshot(matrix, records.read_all(tmp_path / "runs")).missing()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [".lock"]
