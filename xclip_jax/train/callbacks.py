"""Callbacks of a run, and the trackers of `log.trackers`: TensorBoard, Weights & Biases, Trackio and custom ones."""

import contextlib
import importlib
import importlib.util
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError, first_line, redact
from xclip_jax.core.imports import import_class
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import is_remote, write_json
from xclip_jax.evaluators.results import Result
from xclip_jax.models.two_towers import Variables
from xclip_jax.train.prepare import Run

__all__ = ["Callback", "Tracker"]

_PROJECT = "xclip_jax"  # in wandb and Trackio, unless WANDB_PROJECT or TRACKIO_PROJECT names another


class Callback:
    """Base class of callbacks.

    Every process calls every method at the same steps, so a method may compute on all devices.
    """

    def on_start(self, run: Run, step: int) -> None:
        """Receive the run, whose folder is `run.folder`, before it starts or resumes from `step`."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive the metrics of a training step, as logged in metrics.jsonl."""

    def on_evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Receive the results of an evaluation, during training or at the end."""

    def on_end(self, run: Run, variables: Variables, results: Sequence[Result]) -> None:
        """Receive the evaluated variables, for `TwoTowers.apply`, and the last results; results.json is written."""


def classes(config: Config) -> list[type[Callback]]:
    """Import the callback classes of `log.callbacks`; `UserError` for other names."""
    return [import_class(name, Callback, "log.callbacks:") for name in config.log.callbacks]


@runtime_checkable
class Tracker(Protocol):
    """One run in a tracker. A method may raise: `Trackers` prints the error and drops the tracker.

    Process 0 alone makes it, with the run's folder, its config, its first step and its id in the trackers.
    """

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one set of scalars. Steps decrease only if a run resumes from an earlier checkpoint."""

    def close(self) -> None:
        """Write buffered scalars, and mark the run as ended."""


class TensorBoard:
    """Event files in the run's folder, written by tensorboardX."""

    def __init__(self, folder: RunReader, config: Config, step: int, run_id: str) -> None:
        """Write to a file that hides events of steps after `step` that an interrupted run left."""
        del config, run_id
        tensorboardx = importlib.import_module("tensorboardX")
        # A bounded queue blocks for ever, at exit too, when an error of the disk has ended the thread that empties it.
        self._writer = tensorboardx.SummaryWriter(str(folder.tensorboard), max_queue=0, purge_step=step + 1)
        writer: Any = self._writer.file_writer
        self._events = writer.event_writer
        hook = threading.excepthook
        # Else an error of the disk, which `_check` reports, is printed as a traceback too.
        threading.excepthook = lambda event: None if event.thread is self._events._worker else hook(event)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._check()
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._check()
        try:
            self._writer.close()
        finally:
            self._events.close = lambda: None  # called at exit, it would raise an error again

    def _check(self) -> None:
        """Raise if the writing thread has ended: closing would wait for ever."""
        if not self._events._worker.is_alive():
            self._events.close = lambda: None  # as in `close`
            raise OSError("its event file cannot be written")


class WeightsAndBiases:
    """A run of wandb, configured by wandb's environment variables: WANDB_MODE, WANDB_ENTITY and others."""

    def __init__(self, folder: RunReader, config: Config, step: int, run_id: str) -> None:
        """Start or resume the run `run_id`; wandb's local files go to the run's folder, except in a bucket."""
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")  # else it waits for a lost network for ever
        os.environ.setdefault("WANDB_LOGIN_TIMEOUT", "60")
        sys.argv[:] = redact(sys.argv)  # wandb uploads the command line
        self._run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            id=run_id,
            name=folder.path.name,
            config=schema.to_dict(config),
            resume="allow",
            reinit="create_new",  # a notebook may have another run
            dir=None if is_remote(str(folder.path)) else str(folder.path),
        )
        # wandb drops repeated values of its own step counter; ours repeat after a resume.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, on this machine or, by Trackio's environment variables, in a Space or on a server."""

    def __init__(self, folder: RunReader, config: Config, step: int, run_id: str) -> None:
        """Start or resume the run named after the folder and `run_id`: Trackio has no other identity."""
        self._run = importlib.import_module("trackio").init(
            os.environ.get("TRACKIO_PROJECT") or _PROJECT,
            name=f"{folder.path.name}-{run_id}",
            config=schema.to_dict(config),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[RunReader, Config, int, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_names(config: Config, *, installed: bool = True) -> None:
    """Raise `UserError` if a callback, a tracker or, with `installed`, the package of a tracker cannot be imported."""
    classes(config)
    for name in config.log.trackers:
        if ":" in name:
            import_class(name, Tracker, "log.trackers:")
        elif installed and name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(f"log.trackers names {name!r}, which is not installed: pip install 'xclip_jax[{name}]'.")


class Trackers:
    """All trackers of a run. A tracker that fails is a warning, and is disabled; the run goes on."""

    def __init__(self, folder: RunReader, config: Config, step: int) -> None:
        """Open the trackers of `log.trackers` for a run that starts (0) or resumes at `step`."""
        self._folder = folder
        self._open = {}
        names = dict.fromkeys(config.log.trackers)
        saved = folder.read_trackers() if step else None
        run_id = saved["id"] if saved else secrets.token_hex(4)
        if not saved and set(names) - {"tensorboard"}:
            write_json(folder.trackers_file, {"id": run_id})
        for name in names:
            with self._guarded(name):
                kind: Any = TRACKERS.get(name) or import_class(name, Tracker, "log.trackers:")
                self._open[name] = kind(folder, config, step, run_id)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, scalars))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                action(tracker)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            file = self._folder.metrics_file
            log0(f"WARNING: {name} failed and is disabled ({first_line(error)}); {file} has all metrics")
