"""The study's command from run to page: a kill in the middle, another checkout, failures, time limits."""

import json
import pathlib
import subprocess

import pytest

from studies import records, runner, worker
from studies.declaration import Arm
from studies.matrix import Snapshot
from tests.helpers import tiny
from tests.studies import tiny_study
from tests.studies.greys import TEST_SET
from tests.studies.made_records import finished, record, write_folder
from xclip_jax.core.errors import Diverged, UserError

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def source(monkeypatch, pairs):
    """The pairs as the source of the recipe "tiny", in this process and in those of runs."""
    monkeypatch.setenv(tiny_study.PAIRS, str(pairs))


def small(tmp_path, arms=None, **options):
    nothing = dict.fromkeys(("claims", "doses", "controls"), ()) | {"choices": {}, "common": {}, "weights": {}}
    changes = {} if arms is None else {"arms": arms, "baseline": arms[0].name, "shown": ((), ())} | nothing
    matrix = tiny_study.matrix(tuned=False, **changes)
    return runner.Runner(matrix, tmp_path / "runs.jsonl", tmp_path / "scratch", **{"allow_dirty": True} | options)


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


class Done:
    """In place of a run's process: has left a finished run, or a status."""

    status, before, results = 0, None, True

    def __init__(self, command, **_):
        self.returncode, folder = self.status, pathlib.Path(command[3])
        config = json.loads((folder / worker.REQUEST).read_text())["config"]
        if self.status == 0 and not (folder / "results.json").exists():
            write_folder(folder, config, value=Done.value, results=self.results)
        if self.before:
            self.before(folder)

    def poll(self):
        return self.returncode

    wait = poll


@pytest.fixture
def done(monkeypatch, source):
    """Processes of runs are `Done`, and the code is of the commits that the list has, the last one for ever."""
    commits = ["first"]
    monkeypatch.setattr(runner.subprocess, "Popen", Done)
    monkeypatch.setattr(runner, "code_version", lambda: commits.pop(0) if len(commits) > 1 else commits[0])
    monkeypatch.setattr(runner, "same_code", lambda a, b: a == b)
    monkeypatch.setattr(runner, "_POLL", 0.01)
    monkeypatch.setattr(Done, "value", 7.0, raising=False)
    return commits


ONE = (Arm("one", "", "core", "tiny:objective=clip", {}, (0,)),)


def only_record(tmp_path):
    (made,) = records.read_all(tmp_path / "runs.jsonl").values()
    return made


def test_a_kept_run_without_its_record_is_run_again(tmp_path, done, monkeypatch):
    small(tmp_path, ONE, keep=True).run()
    (tmp_path / "runs.jsonl").unlink()
    monkeypatch.setattr(Done, "value", 8.0)
    small(tmp_path, ONE).run()
    assert only_record(tmp_path).value(TEST_SET, "") == 8.0
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [".lock"]


def test_a_run_that_ended_while_nobody_looked_is_read(tmp_path, done, monkeypatch):
    """The command was killed between the end of a run and its record: nothing is trained twice."""
    with monkeypatch.context() as patched:
        patched.setattr(runner.Runner, "_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path, ONE).run()
    monkeypatch.setattr(Done, "value", 8.0)
    small(tmp_path, ONE).run()
    assert only_record(tmp_path).value(TEST_SET, "") == 7.0


def test_a_mark_of_an_earlier_start_does_not_count(tmp_path, done, monkeypatch):
    def mark(folder):
        (folder / worker.DIVERGED).write_text(json.dumps({"error": "loss of step 3 is nan"}))

    with monkeypatch.context() as patched:
        patched.setattr(Done, "before", staticmethod(mark))
        patched.setattr(Done, "status", 1)
        patched.setattr(runner.pathlib.Path, "read_text", reading("error: killed"))
        with pytest.raises(UserError, match="1 runs failed"):
            small(tmp_path, ONE).run()
    small(tmp_path, ONE).run()
    assert not only_record(tmp_path).error


def reading(text, original=pathlib.Path.read_text):
    """Path.read_text, with this text in logs."""
    return lambda path, *a, **k: text if path.name == "output.log" else original(path, *a, **k)


@pytest.mark.parametrize(("commits", "recorded"), [(["a", "a", "a"], "a"), (["a", "b"], "a, b")])
def test_the_commit_is_read_at_both_ends(tmp_path, done, commits, recorded):
    done[:] = commits
    small(tmp_path, ONE).run()
    assert only_record(tmp_path).commit == recorded


def test_a_record_that_another_command_wrote_meanwhile_stays(tmp_path, done, monkeypatch, capsys):
    matrix = small(tmp_path, ONE).matrix
    (run,) = Snapshot(matrix, {}).runs

    def write(folder):
        records.write(tmp_path / "runs.jsonl", record(run, 1.0))

    monkeypatch.setattr(Done, "before", staticmethod(write))
    assert small(tmp_path, ONE).run()
    assert only_record(tmp_path).value(TEST_SET, "") == 1.0
    assert "one, seed 0: has a record already" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [".lock"]


def test_a_run_whose_record_came_meanwhile_is_not_started(tmp_path, done, monkeypatch):
    """The first run's end finds the second one's record, which another command has written."""
    two = (*ONE, Arm("two", "", "core", "tiny:objective=nclip", {}, (0,)))
    second = Snapshot(small(tmp_path, two).matrix, {}).runs[1]
    started = []

    def write(folder):
        started.append(folder.name[:3])
        records.write(tmp_path / "runs.jsonl", record(second, 1.0))

    monkeypatch.setattr(Done, "before", staticmethod(write))
    assert small(tmp_path, two).run()
    assert started == ["one"] and len(records.read_all(tmp_path / "runs.jsonl")) == 2


def test_commits_with_the_same_code(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
        git("add", ".")
        git("commit", "-m", "x")
        return git("rev-parse", "HEAD")

    git("init")
    first, docs, code = commit("xclip_jax/a.py"), commit("docs/a.md"), commit("xclip_jax/b.py")
    assert runner.same_code(first, docs, tmp_path) and not runner.same_code(docs, code, tmp_path)
    assert not runner.same_code(first, f"{docs}-dirty", tmp_path) and not runner.same_code("unknown", code, tmp_path)


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, source, monkeypatch):
    sources = {"data.sources": (f"folder:{tmp_path / 'missing'}",)}
    bad = Arm("bad", "", "core", "tiny:objective=clip", sources, (0,))
    good = Arm("good", "", "core", "tiny:objective=clip", {}, (0,))
    with pytest.raises(
        UserError, match=r"1 runs failed; the same command tries again. bad, seed 0: error: data folder"
    ):
        small(tmp_path, arms=(bad, good)).run()
    assert [r.name[:8] for r in records.read_all(tmp_path / "runs.jsonl").values()] == ["good-s0-"]
    assert not list((tmp_path / "scratch").glob("good*")) and list((tmp_path / "scratch").glob("bad*"))


def test_a_worker_writes_down_that_training_diverged(tmp_path, monkeypatch):
    def diverge(config):
        raise Diverged("loss of step 3 is nan")

    monkeypatch.setattr(worker, "_stop_with_parent", lambda: None)  # it would end this process
    monkeypatch.setattr(worker.trainer, "run", diverge)
    (tmp_path / worker.REQUEST).write_text(json.dumps({"config": tiny.config("clip").to_dict()}))
    worker.main(str(tmp_path))
    assert json.loads((tmp_path / worker.DIVERGED).read_text()) == {"error": "loss of step 3 is nan"}


def test_a_finished_run_is_not_run_again(tmp_path, source):
    matrix = tiny_study.matrix(tuned=False)
    for r in finished(matrix, {"clip": 1.0, "xclip": 2.0}).values():
        records.write(tmp_path / "runs.jsonl", r)
    assert small(tmp_path).run()
    assert not Snapshot(matrix, records.read_all(tmp_path / "runs.jsonl")).missing()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [".lock"]
