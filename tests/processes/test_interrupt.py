"""Signals, data that do not come or fail, and the watchdog, in runs of one process."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers import tiny
from xclip_jax.core import heartbeat
from xclip_jax.core.errors import EXIT_RESTART, EXIT_RESUMABLE, UserError, describe
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.data import loader, records
from xclip_jax.evaluators import registry
from xclip_jax.processes import interrupt, watchdog
from xclip_jax.train import loop, trainer
from xclip_jax.train.checkpoint import Checkpointer


def config(pairs, run, **changes):
    defaults = {"data__sources": (f"folder:{pairs}",), "checkpoint__every": 1000, "steps": 4, "data__batch": 8}
    return tiny.config("clip", run=run, **defaults | changes)


class Set:
    """A set that is measured in two batches, and asks for a stop before the first where `stops`."""

    def __init__(self, name):
        self.name, self.encoder = name, type("Encoder", (), {"unreadable": {}})
        self.stops, self.batches = False, 0

    def measure(self, variables):
        for _ in range(2):
            heartbeat.beat()
            self.batches += 1
            if self.stops:
                signal.raise_signal(signal.SIGTERM)
        return []


def test_a_signal_in_an_evaluation_saves_the_last_step_and_the_evaluation_is_made_later(pairs, tmp_path, monkeypatch):
    sets = {name: Set(name) for name in "ab"}
    monkeypatch.setattr(registry, "open_all", lambda specs, *_: [sets[spec] for spec in specs])
    c = config(pairs, tmp_path / "run", eval__sets=("a", "b"), eval__every=3)
    sets["a"].stops = True
    with pytest.raises(SystemExit) as stopped:
        trainer.run(c)
    assert stopped.value.code == EXIT_RESUMABLE
    assert RunFolder(c.run).latest_step() == 3
    assert (sets["a"].batches, sets["b"].batches) == (1, 0)
    with pytest.raises(SystemExit) as stopped:  # in the evaluation of step 3, which is made first
        trainer.run(c)
    assert (sets["a"].batches, sets["b"].batches) == (2, 0)
    sets["a"].stops = False
    trainer.run(c)
    assert (sets["a"].batches, sets["b"].batches) == (6, 4)  # of step 3 and at the end


def test_several_processes_leave_an_evaluation_between_batches():
    handler, watch = interrupt.PreemptionHandler(), type("Watch", (), {"enter": print, "beat": lambda self: None})()
    reached = []
    with pytest.raises(interrupt.Interrupted), loop.evaluating(watch, handler):
        heartbeat.beat()
        handler.noticed = True
        heartbeat.beat(alike=False)  # a place that others may not reach
        reached.append(True)
        heartbeat.beat()
    assert reached
    heartbeat.beat()  # outside, nobody listens


@pytest.fixture
def feed(monkeypatch):
    """Replaces what follows the second batch of a run."""
    read, finished = loader.batches, threading.Event()

    def replace(end):
        def batches(*args, **options):
            for number, batch in enumerate(read(*args, **options), 1):
                yield batch
                if number == 2:
                    end(finished)

        monkeypatch.setattr(loader, "batches", batches)

    yield replace
    finished.set()


def test_a_signal_saves_the_last_step_while_data_do_not_come(pairs, tmp_path, feed):
    def end(finished):
        os.kill(os.getpid(), signal.SIGTERM)
        finished.wait(100)

    feed(end)
    c = config(pairs, tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        trainer.run(c)
    assert stopped.value.code == EXIT_RESUMABLE
    assert RunFolder(c.run).latest_step() == 2


def test_data_that_fail_do_not_cost_the_steps_before(pairs, tmp_path, feed):
    def end(_):
        raise UserError("the disk is gone")

    feed(end)
    c = config(pairs, tmp_path / "run")
    with pytest.raises(UserError, match="the disk is gone") as raised:
        trainer.run(c)
    assert describe(raised.value).endswith("the state of step 2 is saved")
    assert RunFolder(c.run).latest_step() == 2


@pytest.mark.slow
def test_too_many_bad_samples_do_not_cost_the_steps_before(tmp_path):
    """The saved counters are exact: with a larger bound the same command ends as if there had been no stop."""
    bad = tiny.folder(tmp_path / "bad")
    for path in sorted(bad.glob("*.png"))[::2]:
        path.write_bytes(b"<html>")
    c = config(bad, tmp_path / "run", data__max_bad_fraction=0.002)
    for _ in range(2):  # the second is stopped before its first step
        with pytest.raises(UserError, match=r"samples are bad, more than data\.max_bad_fraction=0\.002 allows"):
            trainer.run(c)
        assert RunFolder(c.run).latest_step() == 2
    logged = []
    for run in ("run", "straight"):
        c = config(bad, tmp_path / run, data__max_bad_fraction=1.0)
        trainer.run(c)
        keys = ("step", "loss", "tokens", "data/bad", "samples")
        logged.append([[line[key] for key in keys] for line in RunFolder(c.run).read_metrics()])
    assert logged[0] == logged[1] and len(logged[0]) == 4


def test_an_evaluation_that_fails_does_not_cost_the_steps_before(pairs, tmp_path, monkeypatch):
    evaluated = Set("a")
    monkeypatch.setattr(registry, "open_all", lambda specs, *_: [evaluated for _ in specs])
    c = config(pairs, tmp_path / "run", eval__sets=("a",), eval__every=3)
    with monkeypatch.context() as patch:
        patch.setattr(evaluated, "measure", lambda _: (_ for _ in ()).throw(UserError("too many unreadable")))
        with pytest.raises(UserError, match="too many unreadable") as raised:
            trainer.run(c)
    assert describe(raised.value).endswith("in evaluator a; the state of step 3 is saved")
    assert RunFolder(c.run).latest_step() == 3
    trainer.run(c)
    assert evaluated.batches == 4  # of step 3 and at the end


def test_an_interruptible_iterator_yields_all_and_closes_what_it_reads():
    closed = []

    def elements():
        try:
            yield from range(5)
        finally:
            closed.append(True)

    assert list(records.interruptible_iterator(elements(), lambda: None)) == list(range(5))
    for element in records.interruptible_iterator(elements(), lambda: None):
        if element == 2:
            break
    assert closed == [True, True]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-signal.SIGKILL, "signal SIGKILL, most often too little memory"),
        (-signal.SIGBUS, r"signal SIGBUS, most often too little shared memory \(docker run --shm-size\)"),
        (1, "exit status 1, its own error is above"),
    ],
)
def test_a_killed_worker_is_one_sentence(code, reason):
    def read():
        yield 1
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. Search the logs")

    elements = records.start_workers_with_signals_blocked(read())
    assert next(elements) == 1
    with pytest.raises(UserError, match=rf"by {reason}; lower data\.workers"):
        next(elements)


@pytest.fixture
def statuses(monkeypatch):
    """The statuses with which a watchdog ends the process, in place of its end."""
    ended = []

    def end(status):
        ended.append(status)
        raise SystemExit  # of the thread

    monkeypatch.setattr(watchdog, "exit_now", end)
    return ended


@pytest.fixture
def watch(tmp_path, statuses, monkeypatch):
    """Starts a watchdog, and returns it."""
    running = []
    monkeypatch.setattr(watchdog, "_POLL_SECONDS", 0.05)

    def start(limit=0.0):
        handler = interrupt.PreemptionHandler().__enter__()
        handler.saves = True
        dog = watchdog.Watchdog(RunFolder(tmp_path), handler, warning=0.0, limit=limit).__enter__()
        running.extend([handler, dog])
        return dog

    yield start
    for context in reversed(running):
        context.__exit__()


class Timed(watchdog.Watchdog):
    """A watchdog without its thread, on a clock that the test moves."""

    def __init__(self, folder, **limits):
        self.now = 1000.0
        super().__init__(RunFolder(folder), interrupt.PreemptionHandler(), lambda: self.now, **limits)

    def ask(self):
        self._asked, self._asked_at = 1, self.now

    def wait(self, seconds):
        for _ in range(seconds):
            self.now += 1
            self.check()


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_the_watchdog_names_the_phase_and_ends_the_process(statuses, tmp_path, capfd):
    dog = Timed(tmp_path, warning=60, limit=180)
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


def test_the_watchdog_warns_of_a_stall_that_is_long_for_its_phase_but_not_of_a_compilation(tmp_path, capfd):
    dog = Timed(tmp_path, warning=60, limit=0)
    dog.enter(watchdog.COMPILATION)
    dog.wait(1000)
    for seconds in (100, 130, 130, 391, 100):
        dog.enter(watchdog.STEP)
        dog.wait(seconds)
        dog.end_step()
        dog.enter(watchdog.DATA)
    assert capfd.readouterr().out == "".join(f"WARNING: no progress: a step ({s} s)\n" for s in (61, 391))
    for _ in range(2):
        dog.wait(100)
        dog.beat()
    assert capfd.readouterr().out == 2 * "WARNING: no progress: waiting for data (61 s)\n"


def test_time_in_which_the_whole_process_was_suspended_does_not_count(statuses, tmp_path, capfd):
    dog = Timed(tmp_path, warning=60, limit=180)
    dog.enter(watchdog.STEP)
    dog.wait(50)
    dog.now += 3600
    dog.wait(11)  # the first second is of the gap
    assert capfd.readouterr().out == "" and not statuses
    dog.wait(1)
    assert "WARNING: no progress: a step (61 s)" in capfd.readouterr().out


def test_the_watchdog_of_a_process_with_many_open_files(watch, statuses, capfd):
    """In real time, and in a thread: its descriptor may be above 1,023, which select() does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2048), hard), hard))
    with open(os.devnull) as file, contextlib.ExitStack() as held:
        for _ in range(1100):
            held.callback(os.close, os.dup(file.fileno()))
        dog = watch(limit=0.4)
        assert dog._read_end.fileno() > 1023
        dog.enter(watchdog.STEP)
        wait(lambda: statuses)
    assert statuses == [EXIT_RESTART]
    assert "test_the_watchdog_of_a_process_with_many_open_files" in capfd.readouterr().err  # this thread's stack too


def test_a_checkpoint_is_restored_in_a_phase_of_its_own(pairs, trained, tmp_path, monkeypatch):
    run, phases, restore = tmp_path / "run", [], Checkpointer.restore_good
    shutil.copytree(trained, run)
    (run / "results.json").unlink()
    monkeypatch.setattr(watchdog.Watchdog, "enter", lambda _, phase, detail="": phases.append(phase))
    monkeypatch.setattr(Checkpointer, "restore_good", lambda *args: phases.append("restores") or restore(*args))
    trainer.run(tiny.short(pairs, run))
    compiles = "the first step, which compiles"
    assert phases[:4] == [compiles, "restoring a checkpoint", "restores", compiles]


def test_progress_keeps_the_watchdog_quiet(statuses, tmp_path, capfd):
    dog = Timed(tmp_path, warning=60, limit=180)
    dog.enter(watchdog.EVALUATION)
    for _ in range(20):
        dog.wait(59)
        dog.beat()
    assert not statuses and capfd.readouterr().out == ""


def test_what_hangs_after_a_signal_is_ended(watch, statuses, monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "STOP_SECONDS", 0.3)
    dog = watch()
    dog.enter(watchdog.STEP)
    dog.end_step()
    dog.end_step()
    time.sleep(0.5)
    assert not statuses
    signal.raise_signal(signal.SIGTERM)
    wait(lambda: statuses)
    assert statuses == [EXIT_RESUMABLE]
    assert "error: asked to stop, and in a step (" in capfd.readouterr().err


# The main thread is in C code, and the signal reaches another one, as it may in a compilation.
COMPILES = """
import ctypes, signal, sys
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.processes import interrupt, watchdog
with interrupt.PreemptionHandler() as stop, watchdog.Watchdog(RunFolder(sys.argv[1]), stop, warning=0, limit=0) as dog:
    dog.enter(watchdog.COMPILATION)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print("compiling", flush=True)
    ctypes.CDLL(None).sleep(1000)
"""


def test_a_signal_ends_a_compilation(tmp_path):
    command = [sys.executable, "-c", COMPILES, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "compiling\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESUMABLE, err
    # The second is of a compilation that ends in time, as a system call that is interrupted.
    assert "stopping in the compilation: nothing is trained yet" in err or "SIGTERM: stopping" in out
