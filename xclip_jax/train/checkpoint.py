"""Checkpoints through Orbax: state and data position, asynchronous, the newest few kept."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from xclip_jax.console import log0
from xclip_jax.errors import UserError
from xclip_jax.run_folder import RunFolder
from xclip_jax.storage import is_remote
from xclip_jax.train.state import TrainState

_SHOWN = 4  # mismatches that an error lists by name


def _names(tree: Any) -> dict[str, Any]:
    """Flat {"params/img/...": leaf}."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in p): x for p, x in paths}


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


@contextlib.contextmanager
def _without_read_only_notice() -> Iterator[None]:
    """Drop the warning with which Orbax confirms that a folder was opened read-only, and no other message."""

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Given directory is read only")

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


class Checkpointer:
    """Saves and restores (`TrainState`, position) under `<run>/checkpoints/<step>`.

    `position` is a small JSON dict: how many samples the run has read, and its counters.
    """

    def __init__(self, run: str | epath.Path, *, keep: int = 3, read_only: bool = False) -> None:
        """Open the checkpoints of the folder `run`.

        Args:
          run: the run's folder.
          keep: newest checkpoints that are kept.
          read_only: touch nothing, so that a run in progress can be read.
        """
        checkpoints = RunFolder(run).checkpoints
        # Orbax wants absolute paths; that of a bucket is one, and would be taken for a local folder's name.
        self.path = checkpoints if is_remote(str(checkpoints)) else checkpoints.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            save_interval_steps=0 if read_only else 1,  # Orbax warns of any other where it only reads
            step_prefix=None,
            # An interrupted save leaves a temporary folder; it is not a checkpoint. A reader leaves it, since
            # another process may be writing it.
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        with _without_read_only_notice():
            self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, also of one that is being saved, which this waits for."""
        self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Start to save; returns when the state is copied, so the next step may overwrite it."""
        step = int(state.step)
        if step == self.latest():
            return
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        )

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Restore state and position of `step` (default: the newest) in the shardings of `abstract`.

        Raises:
          UserError: no checkpoint, an unreadable one, or one of another architecture.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise UserError(f"{self.path} holds no checkpoint{'' if step is None else f' of step {step}'}.")
        self._check(abstract, step)
        try:
            restored: Any = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
            )
        except Exception as error:  # whatever the storage raises, often a page long
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"checkpoint {self.path / str(step)} is damaged ({type(error).__name__}: {lines[0][:200]}); restore "
                "it, or delete its folder to use the checkpoint before it."
            ) from error
        return restored.state, restored.position

    def restore_finite(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the newest checkpoint whose values are all finite; newer ones are deleted.

        Raises:
          UserError: as `restore`, or no checkpoint is finite.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, position = self.restore(abstract, step)
            if _all_finite(state):
                return state, position
            log0(f"WARNING: deleting checkpoint {self.path / str(step)}, which has values that are not finite")
            self._manager.delete(step)
        raise UserError(f"{self.path} has no checkpoint with finite values; delete the run's folder to start again.")

    def _check(self, abstract: TrainState, step: int) -> None:
        """Compare names and shapes before any array is read: Orbax's own error is a page long."""
        try:
            saved = _names(self._manager.item_metadata(step)["state"])
        except Exception as error:
            raise UserError(f"checkpoint {self.path / str(step)} cannot be read: {error}") from error
        current = {name: x for name, x in _names(abstract).items() if hasattr(x, "shape")}
        saved = {name: x for name, x in saved.items() if getattr(x, "shape", None) is not None}
        wrong = [f"{name} is missing" for name in current if name not in saved]
        wrong += [f"{name} is not in this model" for name in saved if name not in current]
        wrong += [
            f"{name} has shape {tuple(saved[name].shape)}, expected {tuple(x.shape)}"
            for name, x in current.items()
            if name in saved and tuple(saved[name].shape) != tuple(x.shape)
        ]
        if wrong:
            params = [line for line in wrong if line.startswith("params/")] or wrong
            suffix = f" (and {len(params) - _SHOWN} more)" if len(params) > _SHOWN else ""
            raise UserError(
                f"checkpoint {self.path / str(step)} has another architecture: {'; '.join(params[:_SHOWN])}{suffix}. "
                "Use the config that the run was started with (config.json beside it), or another --config.run."
            )

    def close(self) -> None:
        """Wait until everything that was started is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
