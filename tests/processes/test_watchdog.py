"""The watchdog: it names the phase of a hang, and ends a process that hangs."""

import contextlib
import shutil
import time

import pytest

from tests.helpers import tiny
from xclip_jax.core.errors import EXIT_RESTART
from xclip_jax.core.run_folder import RunReader
from xclip_jax.processes import interrupt, watchdog
from xclip_jax.train import trainer
from xclip_jax.train.checkpoint import Checkpointer


@pytest.fixture
def statuses(monkeypatch):
    """The statuses with which a watchdog ends the process, in place of its end."""
    ended = []

    def end(status):
        ended.append(status)
        raise SystemExit  # as a process does, exit_now never returns

    monkeypatch.setattr(watchdog, "exit_now", end)
    return ended


class Timed(watchdog.Watchdog):
    """A watchdog without its thread, on a clock that the test moves."""

    def __init__(self, folder, **limits):
        self.now = 1000.0
        super().__init__(RunReader(folder), interrupt.PreemptionHandler(), lambda: self.now, **limits)

    def wait(self, seconds):
        for _ in range(seconds):
            self.now += 1
            self.check()


def test_the_watchdog_names_the_phase_and_ends_the_process(statuses, tmp_path, capfd):
    dog = Timed(tmp_path, limit=180)
    dog.wait(1000)  # no phase: as long as it likes
    dog.enter(watchdog.DATA, " from folder:/a")
    dog.wait(60)
    assert capfd.readouterr().out == ""
    dog.wait(120)
    warning = "WARNING: no progress: waiting for data from folder:/a (61 s); the run ends after 180 s (log.stall_limit)"
    assert capfd.readouterr().out == f"{warning}\n" and not statuses
    with pytest.raises(SystemExit):
        dog.wait(1)
    assert statuses == [EXIT_RESTART]
    out, err = capfd.readouterr()
    assert out == "" and "error: no progress: waiting for data from folder:/a (181 s) (stacks of all threads: " in err
    assert "test_the_watchdog_names_the_phase" in (tmp_path / "stacks-0.txt").read_text()


def test_the_watchdog_warns_once_of_each_phase_but_not_of_a_compilation(tmp_path, capfd):
    dog = Timed(tmp_path, limit=0)
    dog.enter(watchdog.COMPILATION)
    dog.wait(1000)
    for _ in range(2):
        dog.enter(watchdog.STEP)
        dog.wait(100)
        dog.end_step()
        dog.wait(59)
        dog.enter(watchdog.DATA)
        dog.wait(61)
    lines = capfd.readouterr().out.splitlines()
    assert lines == [f"WARNING: no progress: {phase} (61 s)" for phase in ("a step", "waiting for data")]


class Threaded(watchdog.Watchdog):
    """A watchdog whose thread ends where the process would."""

    def _watch(self):
        with contextlib.suppress(SystemExit):
            super()._watch()


def test_the_thread_of_the_watchdog(statuses, tmp_path, monkeypatch, capfd):
    """In real time."""
    monkeypatch.setattr(watchdog, "_POLL_SECONDS", 0.05)
    with interrupt.PreemptionHandler() as handler, Threaded(RunReader(tmp_path), handler, limit=0.4) as dog:
        handler.can_save = True
        dog.enter(watchdog.STEP)
        deadline = time.monotonic() + 60
        while not statuses and time.monotonic() < deadline:
            time.sleep(0.02)
    assert statuses == [EXIT_RESTART]
    assert "test_the_thread_of_the_watchdog" in capfd.readouterr().err  # this thread's stack too


def test_a_checkpoint_is_restored_in_a_phase_of_its_own(pairs, trained, tmp_path, monkeypatch):
    run, phases, restore = tmp_path / "run", [], Checkpointer.restore_good
    shutil.copytree(trained, run)
    (run / "results.json").unlink()
    enter = watchdog.Watchdog.enter

    def recorded(self, phase, detail=""):
        phases.append(phase)
        enter(self, phase, detail)

    monkeypatch.setattr(watchdog.Watchdog, "enter", recorded)
    monkeypatch.setattr(Checkpointer, "restore_good", lambda *args: phases.append("restores") or restore(*args))
    trainer.run(tiny.short(pairs, run))
    compiles = "the first step, which compiles"
    assert phases[:4] == [compiles, "restoring a checkpoint", "restores", compiles]


def test_progress_keeps_the_watchdog_quiet(statuses, tmp_path, capfd):
    dog = Timed(tmp_path, limit=180)
    dog.enter(watchdog.EVALUATION)
    for _ in range(20):
        dog.wait(59)
        dog.progress()
    assert not statuses and capfd.readouterr().out == ""
