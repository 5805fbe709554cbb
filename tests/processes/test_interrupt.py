"""Signals, data that do not come or fail, and the watchdog, in runs of one process."""

import contextlib
import signal
import subprocess
import sys
import types

import pytest

from tests.helpers import tiny
from xclip_jax.core import console, errors
from xclip_jax.core.errors import EXIT_RESUMABLE, UserError, describe
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import records
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.results import Result
from xclip_jax.processes import interrupt
from xclip_jax.train import trainer
from xclip_jax.train.loop import Session


def config(pairs, run, **changes):
    return tiny.short(pairs, run, objective="clip", checkpoint__every=1000, data__batch=8, **changes)


class Set:
    """A set that is measured in two batches, and asks for a stop before the first where `stops`."""

    def __init__(self, name):
        self.name, self.encoder = name, type("Encoder", (), {"unreadable": {}})
        self.stops, self.batches = False, 0

    def measure(self, variables):
        for _ in range(2):
            console.report_progress()
            self.batches += 1
            if self.stops:
                signal.raise_signal(signal.SIGTERM)
        return [Result(self.name, "zeroshot", "top1", 12.5)]


def test_a_signal_in_an_evaluation_saves_the_last_step_and_the_evaluation_is_made_later(pairs, tmp_path, monkeypatch):
    sets = {name: Set(name) for name in "ab"}
    monkeypatch.setattr(registry, "open_all", lambda specs, *_: [sets[spec] for spec in specs])
    c = config(pairs, tmp_path / "run", eval__sets=("a", "b"), eval__every=3)
    sets["a"].stops = True
    with pytest.raises(SystemExit) as stopped:
        trainer.run(c)
    assert stopped.value.code == EXIT_RESUMABLE
    assert RunReader(c.run).latest_step() == 3
    assert (sets["a"].batches, sets["b"].batches) == (1, 0)
    sets["a"].stops = False
    trainer.run(c)
    assert (sets["a"].batches, sets["b"].batches) == (5, 4)  # of step 3, which is made first, and at the end


def test_several_processes_leave_an_evaluation_between_batches():
    handler = interrupt.PreemptionHandler()
    watch = types.SimpleNamespace(phase=contextlib.nullcontext, progress=lambda: None)
    reached = []
    with pytest.raises(interrupt.Interrupted), Session(None, None, None, watch, handler).phase("an evaluation"):
        console.report_progress()
        handler.signal_received = True
        console.report_progress(all_processes=False)  # a place that others may not reach
        reached.append(True)
        console.report_progress()
    assert reached
    console.report_progress()  # outside, nobody listens


def test_an_evaluation_that_fails_does_not_cost_the_steps_before(pairs, tmp_path, monkeypatch):
    evaluated = Set("a")
    monkeypatch.setattr(registry, "open_all", lambda specs, *_: [evaluated for _ in specs])
    monkeypatch.setattr(evaluated, "measure", lambda _: (_ for _ in ()).throw(UserError("too many unreadable.")))
    c = config(pairs, tmp_path / "run", eval__sets=("a",), eval__every=3)
    with pytest.raises(UserError, match="too many unreadable") as raised:
        trainer.run(c)
    assert describe(raised.value) == "too many unreadable; in evaluator a; the state of step 3 is saved"
    assert RunReader(c.run).latest_step() == 3


class PanicError(BaseException):
    """As tokenizers raises it: no exception."""


def test_an_interruptible_iterator_yields_all_closes_what_it_reads_and_raises():
    closed = []

    def elements(end=None):
        try:
            yield from range(5)
            if end:
                raise end
        finally:
            closed.append(True)

    assert list(records.interruptible_iterator(elements(), lambda: None)) == list(range(5))
    for element in records.interruptible_iterator(elements(), lambda: None):
        if element == 2:
            break
    assert closed == [True, True]
    with pytest.raises(PanicError):
        list(records.interruptible_iterator(elements(PanicError), lambda: None))


# The main thread is in C code, and the signal reaches another one, as it may in a compilation.
COMPILES = """
import ctypes, signal, sys
from xclip_jax.core.run_folder import RunReader
from xclip_jax.processes import interrupt, watchdog
with interrupt.PreemptionHandler() as stop, watchdog.Watchdog(RunReader(sys.argv[1]), stop, limit=0) as dog:
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
    assert "stopping in the compilation" in err or "SIGTERM: stopping" in out


def test_signals_outside_the_loop_end_the_process_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(errors.os, "_exit", ended.append)
    with interrupt.PreemptionHandler():
        signal.raise_signal(signal.SIGTERM)
    assert ended == [interrupt.EXIT_RESUMABLE]


def test_the_second_signal_acts_also_where_the_first_is_ignored_by_inheritance():
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.PreemptionHandler() as handler:
            handler.can_save = True
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(interrupt.Interrupted):
                handler.check()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
