"""Goodput: the share of a run's wall time in which its devices computed steps that count."""

import time
from collections.abc import Callable, Iterable, Mapping

WALL, USEFUL = "wall_seconds", "useful_seconds"


class Goodput:
    """Wall time and useful time of a run, of this process and of those before it.

    Wall time is that of the run's processes, each from its start to its last line of metrics; the time between two
    processes is not known. Useful is the time since the first step was dispatched, without what is reported as `lost`
    (evaluations, checkpoints, rewinds, traces), the devices' waits for data, and the shares of steps that were skipped
    or undone. Of processes before, what they did after the checkpoint that the run resumed from is not useful.
    """

    def __init__(
        self,
        began: float,
        start: int = 0,
        lines: Iterable[Mapping[str, float]] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin to count.

        Args:
          began: when this process began, by `clock`.
          start: the step that it starts or resumes from.
          lines: metrics that the processes before it logged, in order, those of steps after `start` as well.
          clock: seconds.
        """
        self._began, self._start, self._clock = began, start, clock
        self._first: float | None = None  # when the first step was dispatched
        self._lost = self._wall = self._useful = 0.0
        for line in lines:
            self._wall = max(self._wall, line.get(WALL, 0.0))
            if line["step"] <= start:
                self._useful = line.get(USEFUL, self._useful)

    def tick(self) -> None:
        """Count a step as dispatched; all time before the first one is start-up."""
        if self._first is None:
            self._first, self._lost = self._clock(), 0.0

    def lose(self, seconds: float) -> None:
        """Count the last `seconds`, in which no step was computed, as lost."""
        self._lost += seconds

    def values(self, step: int, *, wasted: int, waited: float) -> dict[str, float]:
        """Return "goodput", a share, and what it is made of, "wall_seconds" and "useful_seconds", up to now.

        Args:
          step: the last that has ended.
          wasted: steps that this process computed in vain, or whose updates it undid.
          waited: seconds since the first step in which the devices waited for data.
        """
        now = self._clock()
        computing = 0.0 if self._first is None else max(0.0, now - self._first - self._lost - waited)
        steps = max(step - self._start, 1)
        wall = self._wall + now - self._began
        useful = max(0.0, self._useful + computing * (steps - wasted) / steps)
        return {"goodput": useful / wall if wall > 0 else 0.0, WALL: wall, USEFUL: useful}
