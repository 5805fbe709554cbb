"""Signals: a run saves its state and stops, so that the same command can resume it."""

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils

from xclip_jax.console import log0

# Exit status of an interrupted run that the same command resumes: EX_TEMPFAIL of sysexits.h.
EXIT_RESUMABLE = 75


class PreemptionHandler:
    """Makes the first SIGTERM or SIGINT a request to save and stop; the second acts at once.

    Outside the training loop (`saves` is false) there is nothing to save, and the first signal ends the process with
    `EXIT_RESUMABLE`. Several processes agree on the step through JAX's coordination service, which handles SIGTERM.

    Attributes:
      saves: whether a request leads to a checkpoint; set by the training loop.
    """

    def __init__(self) -> None:
        self.saves = False
        self._requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        name, previous = signal.Signals(number).name, self._previous[number]
        # Under nohup the inherited handler ignores SIGINT; the second one must end the process nevertheless.
        signal.signal(number, signal.SIG_DFL if previous == signal.SIG_IGN else previous)
        self._requested = True
        if not self.saves:
            log0(f"{name}: stopping; run the same command to resume")
            raise SystemExit(EXIT_RESUMABLE)
        log0(f"{name}: saving, then stopping; send it again to stop at once")

    def requested(self, step: int) -> bool:
        """Whether to stop at `step`; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested
