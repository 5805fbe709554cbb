"""Watchdog: a thread that reports the phase of a hanging run, and ends a process that hangs for too long.

It also receives signals while the main thread is in C code, such as a compiler, and Python's handlers wait.
"""

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import jax

from xclip_jax.core.errors import EXIT_RESTART, EXIT_RESUMABLE, exit_now
from xclip_jax.core.run_folder import RunReader
from xclip_jax.processes import runtime
from xclip_jax.processes.interrupt import SIGNALS, PreemptionHandler

DATA, COMPILATION, STEP = "waiting for data", "the first step, which compiles", "a step"
CHECKPOINT, RESTORE, EVALUATION = "a checkpoint", "restoring a checkpoint", "an evaluation"
_WARNING = 60.0  # seconds without progress before a warning
_POLL_SECONDS = 0.5
_MOMENT = 2.0  # seconds within which Python's handler runs, unless the main thread is in C code


class Watchdog:
    """Context manager that watches the phases of a run.

    If the process hangs, the watchdog writes the stacks of all threads to standard error and to the run's folder, and
    exits with `EXIT_RESTART`.

    Attributes:
      current: the current phase; None outside of phases.
    """

    def __init__(
        self,
        folder: RunReader,
        preemption: PreemptionHandler,
        clock: Callable[[], float] = time.monotonic,
        *,
        limit: float,
    ) -> None:
        """Make a watchdog that ends the process after `limit` seconds without progress; 0 for never."""
        self._folder = folder
        self._preemption = preemption
        self._warning = min(_WARNING, limit / 3) if limit else _WARNING
        self._limit = limit
        self._clock = clock
        self.current: str | None = None
        self._detail = ""
        self._since = clock()
        self._warned: set[str] = set()
        self._asked_at = 0.0
        self._asked = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self._read_end, self._write_end = socket.socketpair()
        for end in (self._read_end, self._write_end):
            end.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        peers = runtime.peers()
        if peers is not None:
            peers.status = self.status
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous)
        self.enter(None)  # the status for the other processes
        self._stop.set()
        self._thread.join()
        self._read_end.close()
        self._write_end.close()

    def enter(self, phase: str | None, detail: str = "") -> None:
        """Begin a phase, which counts as progress; None for a phase without limits."""
        self.progress()
        self.current = phase
        self._detail = detail

    @contextlib.contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        """Enter the phase `name` for this context, and return to the previous one unless an exception leaves it."""
        before = (self.current, self._detail)
        self.enter(name)
        yield
        self.enter(*before)

    def progress(self) -> None:
        self._since = self._clock()

    def end_step(self) -> None:
        """Record the end of a step on the devices, which counts as progress in the phase `STEP`."""
        if self.current == STEP:
            self.progress()

    def status(self) -> str:
        """Return the phase and its duration, such as "a step (3 s)"."""
        return f"{self.current}{self._detail} ({self._clock() - self._since:.0f} s)" if self.current else ""

    def check(self) -> None:
        """Warn about a long phase, or end the process; the thread calls this every half second."""
        now = self._clock()
        if self._asked and now - self._asked_at > _MOMENT:
            if self._asked > 1 and not self._preemption.signal_received:
                self._end("asked to stop twice", EXIT_RESUMABLE, stacks=False)
            if self.current == COMPILATION and jax.process_count() == 1:
                self._end("stopping in the compilation", EXIT_RESUMABLE, stacks=False)
        if self.current:
            self._check_progress(self.current, now - self._since)

    def _watch(self) -> None:
        signals = select.poll()  # select() takes no descriptor above 1023
        signals.register(self._read_end, select.POLLIN)
        while not self._stop.is_set():
            if signals.poll(1000 * _POLL_SECONDS):
                with contextlib.suppress(BlockingIOError):
                    count = sum(number in SIGNALS for number in self._read_end.recv(64))
                    if count and not self._asked:
                        self._asked_at = self._clock()
                    self._asked += count
            self.check()

    def _check_progress(self, phase: str, seconds: float) -> None:
        if self._limit and seconds > self._limit:
            self._end(f"no progress: {self.status()}{self._others()}", EXIT_RESTART)
        if phase not in (COMPILATION, *self._warned) and seconds > self._warning:
            self._warned.add(phase)  # a phase that always takes long gives one warning
            limit = f"; the run ends after {self._limit:.0f} s (log.stall_limit)" if self._limit else ""
            with contextlib.suppress(OSError):  # a full disk or a closed pipe must not end this thread
                print(f"WARNING: {self._who()}no progress: {self.status()}{self._others()}{limit}", flush=True)

    def _others(self) -> str:
        peers = runtime.peers()
        with contextlib.suppress(Exception):  # process 0 may be gone
            others = peers.waiting() if peers else ""
            return f"; {others}" if others else ""
        return ""

    def _who(self) -> str:
        return f"process {jax.process_index()}: " if jax.process_count() > 1 else ""

    def _end(self, sentence: str, status: int, *, stacks: bool = True) -> None:
        try:
            where = self._dump_stacks() if stacks else ""
            print(f"error: {self._who()}{sentence}{where}; run the same command to resume", file=sys.stderr, flush=True)
        finally:  # even if writing fails
            peers = runtime.peers()
            if peers is not None:
                peers.leave(sentence, status)
            exit_now(status)

    def _dump_stacks(self) -> str:
        """Write the stacks of all threads to standard error and to the run's folder; return a note on the path."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            text = file.read()
        os.write(2, text.encode())
        path = self._folder.stacks_file(jax.process_index())
        # In a thread, since the run's disk may be the one that hangs.
        writer = threading.Thread(target=lambda: path.write_text(text), daemon=True)
        writer.start()
        writer.join(10)
        return f" (stacks of all threads: {path})"
