"""Space on the disk of a run, and what its checkpoints need of it."""

import os
import shutil

import jax
from etils import epath

from xclip_jax.config.schema import Config
from xclip_jax.core.console import format_bytes, log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import is_remote
from xclip_jax.train.state import TrainState


def num_bytes(state: TrainState) -> int:
    """Bytes of a state, or of its shapes, on all devices together: what a checkpoint takes at most."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def free_bytes(path: epath.Path) -> int | None:
    """Bytes that can be written to the disk of `path`, which need not exist; None of a bucket, or of a broken disk."""
    if is_remote(str(path)):
        return None
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def most_added(config: Config, saved: list[int]) -> int:
    """How many checkpoints a run adds at most to those that it has, of the steps `saved`.

    A new checkpoint is complete before the oldest is deleted, so that a run needs space for one more than it keeps.
    """
    settings, newest = config.checkpoint, max(saved, default=0)
    most = settings.keep + 1
    if every := settings.keep_every:
        most += config.steps // every - newest // every + sum(step % every == 0 for step in saved)
    return min(_saves(config, saved), max(most - len(saved), 1))


def _saves(config: Config, saved: list[int]) -> int:
    """How many checkpoints the run has yet to write."""
    left, every = max(config.steps - max(saved, default=0), 0), config.checkpoint.every
    return -(-left // every) if every else min(left, 1)


def check(config: Config, folder: RunFolder, abstract: TrainState) -> None:
    """Check, before anything is written, that there is space for the checkpoints of a run that starts or resumes.

    Prints a warning where there may be too little for `most_added`.

    Args:
      config, folder: of the run.
      abstract: shapes of its state.

    Raises:
      UserError: there is not even space for two checkpoints, or for one where there is one already.
    """
    free = free_bytes(folder.checkpoints)
    if free is None:
        return
    size, saved = num_bytes(abstract), folder.steps()
    least, most = min(_saves(config, saved), max(2 - len(saved), 1)), most_added(config, saved)
    free += _left_over(folder.checkpoints)
    where = f"the disk of {str(folder.path)!r} has {format_bytes(free)} free"
    if free < least * size:
        raise UserError(
            f"{where}, and {least} checkpoint{'s' if least > 1 else ''} of up to {format_bytes(size)} must fit; make "
            "room, or use another --config.run."
        )
    if free < most * size:
        log0(f"WARNING: {where}, and the run's checkpoints need up to {format_bytes(most * size)} more")


def _left_over(checkpoints: epath.Path) -> int:
    """Bytes of checkpoints that were cut off, which are deleted when the run opens the folder."""
    names = [root for root, _, _ in os.walk(checkpoints) if ".orbax-checkpoint-tmp" in root]
    return sum(entry.stat().st_size for name in names for entry in os.scandir(name) if entry.is_file())
