"""What a run tells: metrics.jsonl, TensorBoard, one progress line, and the facts of its environment."""

import contextlib
import math
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
from etils import epath

import xclip_jax
from xclip_jax.storage import JsonLines

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy", "xclip_jax")

# A larger share of the time spent waiting for data is told.
_WAITS = 0.05


class Writer:
    """Writes scalars to `<run>/metrics.jsonl` (one object a line, with "step") and to `<run>/tensorboard`."""

    def __init__(self, run: epath.Path, *, step: int = 0, evaluations: int | None = None) -> None:
        """Open the files of `run`, without lines of later steps that a run left which was cut off.

        Args:
          run: the run's folder.
          step: where the run stands.
          evaluations: last step whose evaluation stays, `step` by default.
        """
        from tensorboardX import SummaryWriter  # it imports torch where there is one, which takes seconds

        self.path = run / "metrics.jsonl"
        last = step if evaluations is None else evaluations
        self._file = JsonLines(self.path, lambda line: line.get("step", math.inf) <= (step if "loss" in line else last))
        self._evaluated = {line["step"] for line in self._file.kept if "loss" not in line}
        self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one set of scalars."""
        self._file.append({"step": step} | dict(scalars))
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def has_evaluation(self, step: int) -> bool:
        """Whether the file had results of an evaluation of `step` when it was opened."""
        return step in self._evaluated

    def close(self) -> None:
        """Flushes."""
        self._file.close()
        self._tensorboard.close()


def clock(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Speed and time left, not counting pauses and the first step, which compiles."""

    def __init__(
        self,
        start: int,
        steps: int,
        batch: int,
        terms: Callable[[Mapping[str, float]], Sequence[str]] = lambda metrics: (),
    ) -> None:
        """Begin to count.

        Args:
          start: step at which the run stands.
          steps: of the whole run.
          batch: samples of a step.
          terms: metrics -> the objective's parts of the line.
        """
        self.start, self.steps, self.batch, self._terms = start, steps, batch, terms
        self._since: float | None = None
        self._first = start
        self._paused = 0.0

    def tick(self, step: int) -> None:
        """Called after each step."""
        if self._since is None:
            self._since, self._first = time.perf_counter(), step

    def pause(self, seconds: float) -> None:
        """Takes evaluation time out of the speed."""
        self._paused += seconds

    def samples_per_second(self, step: int) -> float:
        """Training speed since the first step of this process."""
        elapsed = time.perf_counter() - (self._since or time.perf_counter()) - self._paused
        return (step - self._first) * self.batch / elapsed if elapsed > 0 else 0.0

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The progress line."""
        speed = self.samples_per_second(step)
        left = clock((self.steps - step) * self.batch / speed) if speed else ""
        parts = [f"step {step}/{self.steps}", f"loss {metrics['loss']:.3f}", *self._terms(metrics)]
        if (share := metrics.get("data/wait_share", 0.0)) > _WAITS:
            parts.append(f"input-bound: {share:.0%}")
        return "  ".join([*parts, f"{speed:.0f} samples/s, {left} left" if speed else "(compiled)"])


class Waiting:
    """Measures how long the devices have nothing to do because no batch is there.

    A loop that waits while the step before still runs loses nothing: a thread notes when each step ends.
    """

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[jax.Array | None] = queue.SimpleQueue()
        self._started = self._ended = 0
        self._ended_at = self._since = time.perf_counter()
        self._seconds = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while (value := self._steps.get()) is not None:
            with contextlib.suppress(Exception):  # the loop meets it too
                value.block_until_ready()
            self._ended_at = time.perf_counter()
            self._ended += 1

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch."""
        began = time.perf_counter()
        batch = next(batches)
        if self._started and self._started == self._ended:
            self._seconds += time.perf_counter() - max(began, self._ended_at)
        return batch

    def started(self, value: jax.Array) -> None:
        """Called with a result of each step that was started."""
        if not self._started:
            self.share()  # what was before, as starting the workers, is no part of it
        self._started += 1
        self._steps.put(value)

    def share(self) -> float:
        """Share of the time since the last call."""
        now = time.perf_counter()
        share = self._seconds / max(now - self._since, 1e-9)
        self._since, self._seconds = now, 0.0
        return share

    def close(self) -> None:
        """Ends the thread."""
        self._steps.put(None)


def say(message: str) -> None:
    """Prints to standard output from the first process."""
    if jax.process_index() == 0:
        print(message, flush=True)


def git_commit(folder: epath.Path) -> str:
    """Commit of the checkout that holds `folder`, with "-dirty" where it was changed, or of the `git archive`.

    "unknown" where neither names one.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        archive = folder.parent / ".git_archival.txt"
        match = re.fullmatch(r"node: ([0-9a-f]{40})\s*", archive.read_text()) if archive.is_file() else None
        return match[1] if match else "unknown"


def _version(package: str) -> str:
    """Version of a package; this one's own also where it is on the path and not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return xclip_jax.__version__ if package == "xclip_jax" else "unknown"


def environment() -> dict[str, Any]:
    """Versions, devices, commit and command line of this process."""
    return {
        "command": " ".join(sys.argv),
        "commit": git_commit(epath.Path(__file__).parent),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform": jax.default_backend(),
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
