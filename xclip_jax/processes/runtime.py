"""Runs of several processes, one per host: they join at the start and end together.

Through the key-value store of JAX's coordination service, in process 0, processes report that they run, where they wait
and why they end. A killed process writes nothing, and JAX ends the others after `HEARTBEAT_SECONDS`.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

# Not public in JAX: the client for messages between processes.
from jax._src import distributed as jax_distributed

from xclip_jax.core.errors import EXIT_RESTART, EXIT_RESUMABLE, UserError, describe, exit_now, first_line, redact

HEARTBEAT_SECONDS = 25  # JAX declares a process dead without a heartbeat for this time
_POLL_SECONDS = 1.0
_LINGER_SECONDS = 4.0  # time for the others to read process 0's last message, which is stored in process 0
_FAILED_READS = 5
# Errors of XLA's runtime, some raised as ValueError.
_STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
_NOTES, _ALIVE = "xclip_jax/notes/", "xclip_jax/alive/"
_FACTS, _SAME = "xclip_jax/facts/", "xclip_jax/same/"
_DONE = json.dumps({"status": "done"})
_SHUTDOWN_SECONDS = 300  # a finished process waits for the others, once process 0 has finished
_JOIN_SECONDS = 900  # a process waits for the others to start, if JAX discovers them: slices may start in turn
_EXIT_SECONDS = 30  # a finished process exits, even if a thread hangs


class Peers:
    """The other processes, watched by a thread that ends this process when another one fails.

    Attributes:
      status: returns this process's current work, reported to the others; set by the watchdog.
    """

    def __init__(self, client: Any, index: int, count: int) -> None:
        self.index = index
        self.count = count
        self.status: Callable[[], str] = lambda: ""
        self._client = client
        self._rounds = 0
        self._ending = threading.Lock()
        self._signing = threading.Lock()
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="peers").start()
        atexit.register(self.stop)  # runs before JAX's function, which waits for the others

    def stop(self) -> None:
        """Stop monitoring and mark this process as finished, so that its silence is not mistaken for a failure."""
        self._done.set()
        # The lock waits for a sign of life in progress, which would overwrite this mark.
        with self._signing, contextlib.suppress(Exception):
            self._client.key_value_set(f"{_ALIVE}{self.index}", _DONE, allow_overwrite=True)

    def await_first(self) -> None:
        """Wait without limit until process 0, which writes the report, is finished or, by the thread, found dead.

        JAX's barrier at the end would end all processes after a while.
        """
        signs: dict[str, str] = {}
        while self.index and signs.get(f"{_ALIVE}0") != _DONE:
            time.sleep(_POLL_SECONDS)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                signs = dict(self._client.key_value_dir_get(_ALIVE))

    def check_same(self, facts: Mapping[str, Any], remedy: str) -> None:
        """Raise `UserError` if `facts`, values for JSON, differ from process 0's, which waits for all other processes.

        Every process must call this the same number of times.
        """
        self._rounds += 1
        mine = json.loads(json.dumps(facts))
        name = f"{_FACTS}{self._rounds}"
        if self.index == 0:
            self._client.key_value_set(name, json.dumps(mine))
            while len(self._client.key_value_dir_get(f"{_SAME}{self._rounds}/")) < self.count - 1:
                time.sleep(0.2)  # a process with other facts ends this one
            return
        first = None
        while first is None:  # signals are handled between these short waits
            try:
                first = json.loads(self._client.blocking_key_value_get(name, 2000))
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        different = [key for key in sorted(mine | first) if mine.get(key) != first.get(key)]
        if different:
            shown = ", ".join(f"{key} ({mine.get(key)!r:.60}, not {first.get(key)!r:.60})" for key in different[:5])
            raise UserError(f"process {self.index} differs from process 0: {shown}; {remedy}.")
        self._client.key_value_set(f"{_SAME}{self._rounds}/{self.index}", "")

    def waiting(self) -> str:
        """Return the current work of other processes, if it differs from this process's."""
        mine = self.status().partition(" (")[0]
        signs = sorted(self._client.key_value_dir_get(_ALIVE))
        states = [(name.rpartition("/")[2], json.loads(sign)["status"]) for name, sign in signs]
        return "; ".join(f"process {k}: {s}" for k, s in states if s.partition(" (")[0] not in ("", "done", mine))

    def leave(self, sentence: str, status: int) -> NoReturn:
        """End this process and, by a note, the others with `status`."""
        with self._ending:  # never released: only one thread ends the process
            try:
                note = json.dumps({"sentence": sentence, "status": status})
                self._client.key_value_set(f"{_NOTES}{self.index}", note)
                self._linger()
            finally:
                exit_now(status)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of `error`, or of the end of another process that caused it."""
        # A failed collective is the first sign of a lost process, whose last message ends this process during the wait.
        lost = bool(_STATUS.match(str(error)))
        if lost:
            time.sleep(_LINGER_SECONDS)
        status = EXIT_RESTART if lost else 1
        expected = isinstance(error, (UserError, SystemExit))
        sentence = redact(describe(error) if expected else repr(error)).removeprefix("error: ")
        gone = " (another process may be gone; start all of them again)" if lost else ""
        with contextlib.suppress(OSError):  # a full disk or a closed pipe
            if not expected:
                print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
            print(f"error: process {self.index} of {self.count}: {sentence}{gone}", file=sys.stderr)
        self.leave(sentence.splitlines()[0], status)

    def _watch(self) -> None:
        failed = 0
        while failed < _FAILED_READS:
            if self._done.wait(_POLL_SECONDS):
                return
            try:
                sign = json.dumps({"status": self.status()})
                with self._signing:
                    if self._done.is_set():
                        return
                    self._client.key_value_set(f"{_ALIVE}{self.index}", sign, allow_overwrite=True)
                notes = self._client.key_value_dir_get(_NOTES)
                failed = 0
            except Exception as error:
                if not (isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))):
                    raise  # such as from another version of JAX: the run continues without this thread
                failed += 1
                continue
            for name, note in notes:
                process = int(name.rpartition("/")[2])
                if process != self.index:
                    last = json.loads(note)
                    self._end(f"process {process} of {self.count} has ended: {last['sentence']}", last["status"])
        if not self._done.is_set():
            self._end(f"process 0 of {self.count} is gone", EXIT_RESTART)

    def _end(self, sentence: str, status: int) -> None:
        if not self._ending.acquire(blocking=False):
            return
        advice = f"Process {self.index} ends too; start all of them again."
        try:
            print(f"error: {sentence.rstrip('.')}. {advice}", file=sys.stderr)
            self._linger()
        finally:  # even if printing fails
            exit_now(status)

    def _linger(self) -> None:
        if self.index == 0:
            time.sleep(_LINGER_SECONDS)


_peers: Peers | None = None


def join(distributed: bool, coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Initialise `jax.distributed` if asked to, before the first use of a device.

    Args:
      distributed: let JAX discover the other processes, on TPU pods, GKE, Slurm and MPI.
      coordinator: "HOST:PORT" of process 0, if JAX cannot discover the processes.
      processes: number of processes.
      process: index of this process.
    """
    given = (bool(coordinator), processes > 0, process >= 0)
    if any(given) and (not all(given) or process >= processes):
        raise UserError(
            f"--coordinator={coordinator!r}, --processes={processes} and --process={process} belong together: "
            "HOST:PORT of process 0, the number of processes, and the index of this one, from 0."
        )
    if not distributed and not coordinator:
        return
    addresses = (coordinator, processes, process) if coordinator else ()
    if not coordinator:
        print(f"waiting for the other processes, {_JOIN_SECONDS // 60} minutes at most ...", flush=True)
    try:
        jax.distributed.initialize(
            *addresses,
            initialization_timeout=300 if coordinator else _JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"this process cannot join the others ({first_line(error)}). If JAX cannot discover them, start each with "
            "--coordinator=HOST:PORT --processes=N --process=I; if a recipe calls jax.devices(), give it the device."
        ) from error
    global _peers
    state = jax_distributed.global_state
    if state.client is not None and state.num_processes > 1:
        _peers = Peers(state.client, state.process_id, state.num_processes)
    else:  # JAX's handler keeps the signal for other processes, and this one would train on
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def peers() -> Peers | None:
    """Return the other processes; None in a single-process run or before `join`."""
    return _peers


@contextlib.contextmanager
def ends_all() -> Iterator[None]:
    """If this context fails in one process, end all of them and report the reason."""
    try:
        yield
    except BaseException as error:
        ended = isinstance(error, SystemExit) and error.code in (None, 0, EXIT_RESUMABLE)
        if _peers is not None and not ended and not isinstance(error, GeneratorExit):
            _peers.fail(error)
        raise


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """Run a whole command in `ends_all`; afterwards the process exits in time, even if a thread hangs.

    A single process that stops or fails exits at once, since XLA may still compile for an abandoned evaluation, and
    threads of TensorStore that write abort a process whose interpreter ends.
    """
    status = 1
    try:
        with ends_all():
            yield
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status and _peers is None:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            exit_now(status)
        raise
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        exit_now(status)
    finally:
        if _peers is not None and status in (0, EXIT_RESUMABLE):
            _peers.await_first()
        limit = _EXIT_SECONDS + (_SHUTDOWN_SECONDS if _peers is not None else 0)
        # At its exit Python waits for reading threads, forever if a disk does not answer.
        end = threading.Timer(limit, os._exit, (status,))
        end.daemon = True
        end.start()
