"""Signals: a run saves its state and stops, and the same command resumes it."""

import contextlib
import ctypes
import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from xclip_jax.core import errors
from xclip_jax.core.console import log0
from xclip_jax.core.errors import EXIT_RESUMABLE

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """Raised to abandon work, such as an evaluation, when the run should stop; no fault, so not an `Exception`."""


class PreemptionHandler:
    """Treats the first SIGTERM, SIGINT or SIGHUP as a request to save and stop; a second one acts at once.

    While `can_save` is false, the first signal interrupts an evaluation, or else ends the process at once with
    `EXIT_RESUMABLE`: an exception could be lost in a callback, and would leave XLA compiling. Several processes agree
    on the moment through JAX's preemption service: each calls `check` equally often, and a signal to one stops all.

    Attributes:
      can_save: whether a request leads to a checkpoint; set by the training loop.
      signal_received: whether a signal has arrived.
    """

    def __init__(self) -> None:
        self.can_save = self.signal_received = False
        self._leaves = self._agreed = False
        self._questions = 0
        self._previous: dict[int, Any] = {}
        self._service: Callable[[int], None] | None = None

    def __enter__(self) -> "PreemptionHandler":
        if jax.process_count() > 1:
            self._service = _handler_below_python(signal.SIGTERM)
        for number in (*SIGNALS, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        name = signal.Signals(number).name
        previous = self._previous[number]
        # The second signal must end the process, though nohup's handler ignores SIGINT, and a command's handler waits
        # while the main thread is in C code.
        second = signal.SIG_DFL if previous in (signal.SIG_IGN, errors.interrupted) else previous
        # Both the system and the shell send SIGHUP when a terminal is closed.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else second)
        self.signal_received = True
        alone = jax.process_count() == 1
        stopping = "saving, then stopping; send it again to stop at once"
        with contextlib.suppress(RuntimeError, OSError):  # a print is interrupted, or the output closed
            log0(f"{name}: {stopping if self.can_save else 'stopping; run the same command to resume'}")
        if self._service is not None:
            self._service(signal.SIGTERM)
        if alone and self._leaves:
            self._leaves = False
            raise Interrupted
        if alone and not self.can_save:
            errors.exit_now(EXIT_RESUMABLE)

    def check(self) -> None:
        """Raise `Interrupted` if the run should stop here, on every process; every process must call this."""
        self.check_alone()
        if jax.process_count() > 1:
            # The service chooses the question at which all stop: the one after the last that any process has asked.
            self._questions += 1
            self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._questions)
            if self._agreed:
                raise Interrupted

    def check_alone(self) -> None:
        """Raise `Interrupted` if a single-process run should stop."""
        if self.signal_received and jax.process_count() == 1:
            raise Interrupted

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal end this context at once, with `Interrupted`, in a single-process run."""
        self.check_alone()
        self._leaves = True
        try:
            yield
        finally:
            self._leaves = False


@functools.cache  # a later run in this process would find only Python's handler
def _handler_below_python(number: int) -> Callable[[int], None] | None:
    """Remove and return the C-level handler that JAX's service installed, or None; Python's would replace it."""
    try:
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        address = libc.signal(number, None)
    except (OSError, AttributeError):
        return None
    if address in (None, 1, ctypes.c_void_p(-1).value):  # the default, ignored, an error
        return None
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
