"""Marks of progress in long work: what a watchdog waits for, and where an interrupt may leave the work."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

Observer = Callable[[bool], None]

_observer: contextvars.ContextVar[Observer] = contextvars.ContextVar("observer", default=lambda alike: None)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Context in which every `beat` of this thread calls `observer`, which may raise to leave the work."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def beat(*, alike: bool = True) -> None:
    """Mark progress.

    Args:
      alike: whether every process of a run reaches this place equally often, so that all can leave the work here.
    """
    _observer.get()(alike)
