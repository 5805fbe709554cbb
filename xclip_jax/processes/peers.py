"""Messages between the processes of a run: that they run, where they wait, why they end.

Each writes to the key-value store of JAX's coordination service, which process 0 holds. A process that is killed writes
nothing, and JAX ends the others after `HEARTBEAT_SECONDS`.
"""

import atexit
import contextlib
import json
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from xclip_jax.core.errors import EXIT_RESTART, UserError, describe, exit_now, public

# All processes end within 30 s after one of them: JAX counts as dead what sends no heartbeat for so long.
HEARTBEAT_SECONDS = 25
_POLL_SECONDS = 1.0
_LINGER_SECONDS = 4.0  # the others read process 0's last words from process 0
_FAILED_READS = 5
# Errors of XLA's runtime, also those that it raises as ValueError.
_STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
_NOTES, _ALIVE = "xclip_jax/notes/", "xclip_jax/alive/"
_FACTS, _SAME = "xclip_jax/facts/", "xclip_jax/same/"
_DONE = json.dumps({"status": "done"})


class Peers:
    """The other processes, watched by a thread that ends this process when one of them ends by a fault.

    Attributes:
      index, count: of this process, and how many there are.
      status: what this process is doing, reported to the others; set by the watchdog.
    """

    def __init__(self, client: Any, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.status: Callable[[], str] = lambda: ""
        self._client, self._rounds = client, 0
        self._ending = threading.Lock()
        self._signing = threading.Lock()
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="peers").start()
        atexit.register(self.stop)  # before JAX's own, which waits for the others

    def stop(self) -> None:
        """Stop monitoring and mark this process as finished, so that missing heartbeats are not taken for a failure."""
        self._done.set()
        # After a sign of life that is being sent, which would otherwise overwrite this one.
        with self._signing, contextlib.suppress(Exception):
            self._client.key_value_set(f"{_ALIVE}{self.index}", _DONE, allow_overwrite=True)

    def await_first(self) -> None:
        """Wait, as long as it takes, until process 0, which writes the report, has marked itself as finished.

        JAX's own barrier at the end would end all processes after a while. The thread notices if process 0 dies.
        """
        signs: dict[str, str] = {}
        while self.index and signs.get(f"{_ALIVE}0") != _DONE:
            time.sleep(_POLL_SECONDS)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                signs = dict(self._client.key_value_dir_get(_ALIVE))

    def check_same(self, facts: Mapping[str, Any], remedy: str) -> None:
        """Compare `facts`, of JSON's types, with the facts of process 0, which waits until all others have done so.

        All processes call it equally often.

        Raises:
          UserError: names what differs.
        """
        self._rounds += 1
        own, name = json.loads(json.dumps(facts)), f"{_FACTS}{self._rounds}"
        if self.index == 0:
            self._client.key_value_set(name, json.dumps(own))
            while len(self._client.key_value_dir_get(f"{_SAME}{self._rounds}/")) < self.count - 1:
                time.sleep(0.2)  # one that differs ends this process
            return
        first = json.loads(self._wait_for(name))
        if different := [key for key in sorted(own | first) if own.get(key) != first.get(key)]:
            shown = ", ".join(f"{key} ({_short(own.get(key))}, not {_short(first.get(key))})" for key in different[:5])
            more = f" and {len(different) - 5} more" if len(different) > 5 else ""
            raise UserError(f"process {self.index} differs from process 0: {shown}{more}; {remedy}.")
        self._client.key_value_set(f"{_SAME}{self._rounds}/{self.index}", "")

    def _wait_for(self, name: str) -> str:
        while True:  # in short waits, between which signals are handled; the thread watches whether process 0 lives
            try:
                return self._client.blocking_key_value_get(name, 2000)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def waiting(self) -> str:
        """Return what other processes were doing a moment ago, if it differs from this one's work."""
        own = self.status().partition(" (")[0]
        others = sorted((int(k.rpartition("/")[2]), v) for k, v in self._client.key_value_dir_get(_ALIVE))
        states = [(k, json.loads(v)["status"]) for k, v in others if k != self.index]
        return "; ".join(f"process {k}: {s}" for k, s in states if s.partition(" (")[0] not in ("", "done", own))

    def leave(self, sentence: str, status: int) -> NoReturn:
        """End this process with `status`, after notifying the other processes, which end with the same status."""
        with self._ending:  # for good: only one thread ends the process
            try:
                note = json.dumps({"sentence": sentence, "status": status})
                self._client.key_value_set(f"{_NOTES}{self.index}", note)
                self._linger()
            finally:
                exit_now(status)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process by `error`, or by the end of another process that caused it."""
        # A process that is gone shows first as a collective that fails. Its last words end this one while it waits.
        if lost := bool(_STATUS.match(str(error))):
            time.sleep(_LINGER_SECONDS)
        status = EXIT_RESTART if lost else 1
        sentence = describe(error) if isinstance(error, (UserError, SystemExit)) else public(repr(error))
        if not isinstance(error, (UserError, SystemExit)):
            print(public("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        gone = " (another process may be gone; start all of them again)" if lost else ""
        own = f"process {self.index} of {self.count}"
        print(f"error: {own}: {sentence.removeprefix('error: ')}{gone}", file=sys.stderr)
        self.leave(sentence.removeprefix("error: ").splitlines()[0], status)

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
                if not _is_of_runtime(error):
                    raise  # of another version of JAX, say: the run goes on without this watch
                failed += 1
                continue
            for name, note in notes:
                if (process := int(name.rpartition("/")[2])) != self.index:
                    last = json.loads(note)
                    self._end(f"process {process} of {self.count} has ended: {last['sentence']}", last["status"])
        if not self._done.is_set():
            self._end(f"process 0 of {self.count} is gone", EXIT_RESTART)

    def _end(self, sentence: str, status: int) -> None:
        if not self._ending.acquire(blocking=False):
            return
        advice = f"Process {self.index} ends too; start all of them again."
        print(f"error: {sentence.rstrip('.')}. {advice}", file=sys.stderr)
        self._linger()
        exit_now(status)

    def _linger(self) -> None:
        """In process 0: give the others time to read why all end."""
        if self.index == 0:
            time.sleep(_LINGER_SECONDS)


def _is_of_runtime(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(_STATUS.match(str(error)))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
