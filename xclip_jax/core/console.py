"""Console output, and progress callbacks for long work."""

import contextlib
import contextvars
import errno
import sys
from collections.abc import Callable, Iterator
from typing import TextIO, TypeVar

from xclip_jax.core.errors import discard, redact


def log0(message: str) -> None:
    """Print to standard output from process 0, and from every process that has not joined others yet, see `show`."""
    import jax  # slow, and not needed by the other functions

    # Asking for the index would open the devices, after which a process cannot join.
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        show(message)


def show(message: str, file: TextIO | None = None) -> None:
    """Print to standard output, or `file`, with URLs redacted and letters that its encoding lacks as "?".

    Nothing is printed to a terminal that was closed.
    """
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(redact(message).encode(encoding, "replace").decode(encoding), file=stream, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        discard(stream.fileno())


def format_duration(seconds: float) -> str:
    """Return "1:02:03" or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_bytes(n: float) -> str:
    """Return "1.50 GiB", "3.00 MiB", "2.00 KiB" or "12 B"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


T = TypeVar("T")
Observer = Callable[[bool], None]

_observer: contextvars.ContextVar[Observer] = contextvars.ContextVar("observer", default=lambda all_processes: None)


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar[T], value: T) -> Iterator[None]:
    """Set `variable` to `value` inside this context."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def observing_progress(observer: Observer) -> contextlib.AbstractContextManager[None]:
    """Call `observer` at every `report_progress` in this context; it may raise an exception to stop the work."""
    return setting(_observer, observer)


def report_progress(*, all_processes: bool = True) -> None:
    """Notify the observer, which may raise to stop the work.

    `all_processes` says that every process calls this the same number of times, so that all can stop together.
    """
    _observer.get()(all_processes)
