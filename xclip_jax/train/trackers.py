"""Experiment trackers that show a run: TensorBoard, Weights & Biases, Trackio and others, as `log.to` names them."""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core.addresses import public
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError, first_line
from xclip_jax.core.imports import import_class
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import is_remote, write_json

# Seconds that wandb waits for a login that it asks for on a terminal, and at the end of a run for what is left to be
# uploaded. Without a limit it waits for ever for a user who has left, or for a network that is gone.
_WANDB_TIMEOUTS = {"WANDB_LOGIN_TIMEOUT": "60", "WANDB_FINISH_TIMEOUT": "300"}


@runtime_checkable
class Tracker(Protocol):
    """One run in a tracker. Any method may raise: `Trackers` prints it and leaves the tracker out from then on.

    A class of another package is made with the run's folder, its config, the step that it starts or resumes from, and
    its id in the trackers, on the first process alone.
    """

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one set of scalars. Steps do not decrease but where a run resumes from an earlier checkpoint."""

    def show(self, step: int, picture: Image.Image | None, page: str | None) -> None:
        """Show picture.png and report.html, those of them that exist and that the tracker can show."""

    def close(self) -> None:
        """Write what is buffered, and mark the run as ended."""


class TensorBoard:
    """Event files in the run's folder, written by tensorboardX."""

    def __init__(self, folder: RunFolder, config: Config, step: int, run_id: str) -> None:
        """Write to a file that hides events of steps after `step` that an interrupted run left."""
        del config, run_id
        self._folder, self._start = str(folder.tensorboard), step

    @functools.cached_property
    def _writer(self) -> Any:
        """Opened with the first scalars, behind the first step: it imports torch where there is one, for seconds."""
        from tensorboardX import SummaryWriter

        # A bounded queue blocks for ever, at exit too, when an error of the disk has ended the thread that empties it.
        return SummaryWriter(self._folder, purge_step=self._start + 1, max_queue=0)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._check()
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, picture: Image.Image | None, page: str | None) -> None:
        del page  # it shows no HTML
        self._check()
        if picture is not None:
            self._writer.add_image("picture", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        if "_writer" in vars(self):
            self._check()
            self._writer.close()

    def _check(self) -> None:
        """Raise where its thread has ended: what it is given then goes nowhere."""
        writer: Any = self._writer.file_writer
        if writer is None or not writer.event_writer._worker.is_alive():
            raise OSError("its event file cannot be written")


class WeightsAndBiases:
    """A run of wandb. Its settings are wandb's own environment variables: WANDB_MODE, WANDB_ENTITY and others."""

    def __init__(self, folder: RunFolder, config: Config, step: int, run_id: str) -> None:
        """Start or resume the run `run_id`; wandb's local files go to the run's folder, unless that is in a bucket."""
        for variable, seconds in _WANDB_TIMEOUTS.items():
            os.environ.setdefault(variable, seconds)
        sys.argv[:] = public(sys.argv)  # wandb uploads the command line
        self._wandb = wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=config.log.project,
            id=run_id,
            name=folder.path.name,
            config=schema.to_dict(config),
            resume="allow",
            reinit="create_new",  # a notebook may have a run of its own
            dir=None if is_remote(str(folder.path)) else str(folder.path),
        )
        # wandb drops steps of its own count that it had before; ours come again after a resume.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def show(self, step: int, picture: Image.Image | None, page: str | None) -> None:
        media = {} if picture is None else {"picture": self._wandb.Image(picture)}
        if page is not None:
            media["report"] = self._wandb.Html(page, inject=False)
        if media:
            self._run.log({"step": step, **media})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, on this machine or, by its own environment variables, in a Space or on a server."""

    def __init__(self, folder: RunFolder, config: Config, step: int, run_id: str) -> None:
        """Start or resume the run that is called after the folder and `run_id`: Trackio has no other identity."""
        self._trackio = trackio = importlib.import_module("trackio")
        name = f"{folder.path.name}-{run_id}"
        config_values = schema.to_dict(config)
        self._run = trackio.init(config.log.project, name=name, config=config_values, resume="allow", embed=False)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def show(self, step: int, picture: Image.Image | None, page: str | None) -> None:
        media = {} if picture is None else {"picture": self._trackio.Image(picture)}
        if page is not None:
            media["report"] = self._trackio.Html(page, inject=False)
        if media:
            self._run.log(media, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[RunFolder, Config, int, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def classes(config: Config) -> list[type[Tracker]]:
    """Import the classes of other packages that `log.to` names; none is made.

    Raises:
      UserError: a class that cannot be imported, or is not a tracker.
    """
    return [import_class(name, Tracker, "log.to:") for name in config.log.to if ":" in name]


def check(config: Config) -> None:
    """Raise `UserError` where a package or class of `log.to` is not installed; tensorboardX always is."""
    classes(config)
    for name in config.log.to:
        if ":" not in name and name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(f"log.to names {name!r}, which is not installed: pip install 'xclip_jax[{name}]'.")


class Trackers:
    """All trackers of a run. One that fails is a warning and gets nothing more; the run goes on."""

    def __init__(self, folder: RunFolder, config: Config, step: int) -> None:
        """Open those of `log.to`.

        Args:
          folder: the run's; trackers.json in it has the run's id in the trackers, so that a resumed run goes on there.
          config: of the run.
          step: the step that the run starts or resumes from; one that starts at 0 is a new run in the trackers.
        """
        self._folder, self._open = folder, {}
        names = dict.fromkeys(config.log.to)
        run_id = _run_id(folder, step) if set(names) - {"tensorboard"} else ""
        for name in names:
            with self._guarded(name):
                made: Any = TRACKERS[name] if name in TRACKERS else import_class(name, Tracker, "log.to:")
                self._open[name] = made(folder, config, step, run_id)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one set of scalars."""
        self._each(lambda tracker: tracker.log(step, scalars))

    def show_report(self, step: int) -> None:
        """Show the run's picture and its report, where it has them."""
        picture = page = None
        with self._guarded("the report's upload"):
            if self._folder.picture_file.exists():
                with self._folder.picture_file.open("rb") as file:
                    picture = Image.open(file).convert("RGB")
            if self._folder.report_file.exists():
                page = self._folder.report_file.read_text()
        self._each(lambda tracker: tracker.show(step, picture, page))

    def close(self) -> None:
        """Mark the run as ended; trackers get nothing more."""
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
            where = self._folder.metrics_file
            log0(f"WARNING: {name} failed and gets nothing more ({first_line(error)}); {where} has all metrics")


def _run_id(folder: RunFolder, step: int) -> str:
    """Return the run's id in its trackers: that of trackers.json, or a new one, which is kept there."""
    run_id = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged
        run_id = json.loads(folder.trackers_file.read_text())["id"] if step else None
    if not isinstance(run_id, str):
        run_id = secrets.token_hex(4)
        write_json(folder.trackers_file, {"id": run_id})
    return run_id
