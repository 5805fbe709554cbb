"""The end of a process before its time: by Ctrl-C, from the first import of a command on, and past hanging threads."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

# What a shell reports of a program that SIGINT ends.
EXIT_INTERRUPTED = 130


def exit_now(status: int) -> NoReturn:
    """End this process without waiting for its threads, wherever it is, a signal's handler included.

    Python's own exit crashes where XLA still compiles in threads of its own, and waits for threads that read.
    """
    try:
        for flush in (sys.stdout.flush, sys.stderr.flush):
            with contextlib.suppress(Exception):  # a stream that nobody reads, or that was just being written
                flush()
    finally:
        os._exit(status)


def interrupted(advice: str = "") -> NoReturn:
    """End this process by Ctrl-C, in one sentence."""
    os.write(2, f"error: interrupted{advice and f'; {advice}'}\n".encode())  # a handler may not enter sys.stderr again
    exit_now(EXIT_INTERRUPTED)


def at_once(*_: Any) -> NoReturn:
    """Handle SIGINT: end this process.

    An exception could be lost: in a callback, as JAX has one in each garbage collection, or in an import that is tried.
    """
    interrupted()


def end_at_once() -> None:
    """From here on, Ctrl-C ends this process at once, unless it is ignored by inheritance, as under nohup."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, at_once)
        sys.unraisablehook = _unraisable


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Context in which Ctrl-C ends a command, see `end_at_once`, by `KeyboardInterrupt`: open files are closed."""
    if signal.getsignal(signal.SIGINT) is not at_once:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        interrupted("; ".join(getattr(error, "__notes__", ())))
    finally:
        signal.signal(signal.SIGINT, at_once)


def _unraisable(event: Any) -> None:
    if issubclass(event.exc_type, KeyboardInterrupt):  # else the command would go on
        interrupted()
    sys.__unraisablehook__(event)
