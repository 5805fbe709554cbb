"""Orbax checkpoints of state and data position: saved asynchronously, the newest few kept, damaged ones never used."""

import contextlib
import dataclasses
import logging
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from xclip_jax.core.console import format_bytes, log0
from xclip_jax.core.errors import UserError, first_line
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import is_remote
from xclip_jax.train import checkpoint_files
from xclip_jax.train.checkpoint_files import num_bytes
from xclip_jax.train.state import TrainState
from xclip_jax.train.step import all_finite

_REASON = 200  # characters of a reason that another library gives


class _Damaged(Exception):
    """A checkpoint's files are not those written by a run, or have infinite values or NaN."""


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return {"params/img/...": shape} of a tree's arrays."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    return {name: tuple(x.shape) for name, x in named.items() if getattr(x, "shape", None) is not None}


def _reason(error: BaseException) -> str:
    """One line about an error of Orbax or TensorStore, whose messages may be a page long."""
    return getattr(error, "strerror", None) or first_line(error)[:_REASON]


def _keep_record(record: logging.LogRecord) -> bool:
    """Logging filter: drop Orbax's records of errors that it also raises, and of read-only folders."""
    raised = record.exc_info or record.getMessage().startswith("Failed to delete")
    return "orbax" not in record.pathname or not (raised or "read only" in record.getMessage())


class _Manager(ocp.CheckpointManager):
    """Checkpoint manager that does not ask JAX's preemption service: the training loop saves at a signal by itself.

    The service stops all processes at one more than the largest number asked about. Orbax would ask with step numbers,
    which the count of calls in `interrupt.PreemptionHandler.check` never reaches.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer:
    """Saves and restores (`TrainState`, position) under `<run>/checkpoints/<step>`.

    `position` is a small JSON dict: the number of samples read, and counters. One renaming of their folder makes state,
    position and the digest of their files a checkpoint.
    """

    def __init__(self, run: str | epath.Path, *, keep: int = 3, read_only: bool = False) -> None:
        """Open the checkpoints of a run's folder, and keep the `keep` newest ones.

        With `read_only` nothing is touched, to read a run in progress, and `restore` can leave out parts of a state.
        """
        checkpoint_files.check_store(run)
        checkpoints = RunReader(run).checkpoints
        # Orbax wants absolute paths; `absolute` would take a URL for a local folder's name.
        self.path = checkpoints if is_remote(str(checkpoints)) else checkpoints.absolute()
        self._keep = keep
        self._refused: list[int] = []  # old checkpoints that the storage did not delete
        self._policies: list[policies.PreservationPolicy] = [policies.LatestN(None if read_only else keep)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(self._policies),
            save_interval_steps=0 if read_only else 1,  # Orbax warns of others when it only reads
            step_prefix=None,
            cleanup_tmp_directories=not read_only,  # of interrupted saves; a reader could delete a save in progress
            read_only=read_only,
            create=not read_only,
            async_options=ocp.AsyncOptions(
                # Process 0 calls it when all files are written, before the folder gets its final name.
                post_finalization_callback=self._write_digest,
                # Else threads wait for minutes for a folder that a full or read-only disk cannot make.
                create_directories_asynchronously=False,
            ),
        )
        # The PyTree handler can restore parts of the standard handler's files.
        handler = ocp.PyTreeCheckpointHandler() if read_only else ocp.StandardCheckpointHandler()
        handlers = {"state": handler, "position": ocp.JsonCheckpointHandler()}
        self._read_only = read_only
        # The last save: its step, its bytes, and whether it may be in progress.
        self._saving = -1
        self._size = 0
        self._pending = False
        logging.getLogger("absl").addFilter(_keep_record)
        self._manager = _Manager(self.path, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, damaged or not, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Wait for a save in progress; return the steps of all checkpoints, ascending, the same on all processes."""
        self._wait()
        return sorted(set(self._manager.all_steps()) - set(self._refused))

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Start to save, and return once the state is copied; `UserError` if this or the last save fails."""
        self._wait()
        step = int(state.step)
        if step == self.latest():
            return
        self._saving = step
        self._size = num_bytes(state)
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        try:
            # A bucket has no folders, so it lacks this one before the first save.
            if jax.process_index() == 0 and not (is_remote(str(self.path)) or self.path.exists()):
                raise FileNotFoundError(2, "the folder no longer exists")
            saved = self._manager.save(step, args=arguments)
        except (OSError, ValueError) as error:
            raise self._describe(error) from error
        if not saved:
            raise UserError(f"{self.path} has a checkpoint of a later step than {step}; use a different --config.run.")
        self._pending = True

    def raise_failure(self) -> None:
        """Raise, once, the `UserError` of a save that failed in the background; every step may call it."""
        if self._pending and not self._manager.is_saving_in_progress():
            self._wait()

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Restore state and position of `step` (default: the newest) in the shardings of `abstract`; change nothing.

        A `read_only` reader leaves out the parts that are None in `abstract`.
        """
        steps = self._manager.all_steps()
        step = self.latest() if step is None else step
        if step is None or step not in steps:
            raise UserError(f"{self.path} holds no checkpoint{'' if step is None else f' of step {step}'}.")
        try:
            return self._read(abstract, step)
        except _Damaged as error:
            others = sorted((other for other in steps if other != step), reverse=True)
            whole = next((other for other in others if self.find_fault(other) is None), None)
            newest = (
                f"the newest whole one is of step {whole}: --step {whole}"
                if whole is not None
                else "no other one is whole"
            )
            raise UserError(f"checkpoint {self.path / str(step)} is damaged: {error}; {newest}.") from error

    def restore_good(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the newest whole and finite checkpoint, and move newer ones aside, to `damaged-<step>`."""
        faults: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, position = self._read(abstract, step)
                if not jax.jit(all_finite)(state):
                    raise _Damaged("it has values that are not finite")
            except _Damaged as error:
                faults[step] = str(error)
                continue
            if faults:
                self._move_aside(faults, step)
            return state, position
        listed = "; ".join(f"{step}: {fault}" for step, fault in faults.items())
        raise UserError(f"{self.path} has no whole checkpoint ({listed}); restore one, or delete the run's folder.")

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until every save is on disk; `UserError` if the last one could not be written."""
        try:
            self._wait()
        except UserError as error:
            if kind is None:
                raise
            log0(f"WARNING: {error}")  # the exception that ended the run is raised
        finally:
            with contextlib.suppress(Exception):  # of a save that is already reported
                self._manager.close()

    def _wait(self) -> None:
        """Wait for a save in progress; `UserError` if it failed, a warning if only an old checkpoint is not deleted."""
        if not self._pending:
            return
        self._pending = False
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            with contextlib.suppress(Exception):
                self._manager.reload()
            steps = sorted(self._manager.all_steps())
            if self._saving not in steps:
                raise self._describe(error) from error
            # Asked again by the next start of the run; meanwhile it does not keep others from being deleted.
            self._refused = steps[: -self._keep]
            self._policies.append(policies.CustomSteps(self._refused))
            listed = ", ".join(map(str, self._refused))
            log0(f"WARNING: old checkpoints in {self.path} could not be deleted: {listed} ({_reason(error)})")

    def _describe(self, error: Exception) -> UserError:
        return UserError(
            f"the checkpoint of step {self._saving} could not be written to {self.path} ({_reason(error)}): it "
            f"needs up to {format_bytes(self._size)}; make room or restore the folder, then run the same command to "
            "resume from an earlier checkpoint."
        )

    def _write_digest(self) -> None:
        folder = self.path / str(self._saving)
        if not folder.exists():  # in a bucket it has its final name from the start
            folder = max(self.path.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        checkpoint_files.write_digest(folder, self._saving)

    def find_fault(self, step: int) -> str | None:
        """Return the fault that process 0 finds in the files of `step`, None if they are whole; on all processes."""
        fault = checkpoint_files.find_fault(self.path / str(step), step) if jax.process_index() == 0 else None
        damaged = bool(multihost_utils.broadcast_one_to_all(np.asarray(fault is not None)))
        return (fault or "process 0 names the file") if damaged else None

    def _read(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Return state and position of `step`; raise `_Damaged` if its files differ from their digest."""
        if fault := self.find_fault(step):
            raise _Damaged(fault)
        unreadable = UserError(  # a storage may not list some files for a moment: to Orbax they were never saved
            f"checkpoint {self.path / str(step)} cannot be read, though its files are those that were written; run the "
            "same command to try again."
        )
        saved = _shapes(self._manager.item_metadata(step)["state"])
        if not saved:
            raise unreadable
        parts = {name: part for name, part in vars(abstract).items() if not self._read_only or jax.tree.leaves(part)}
        saved = {name: shape for name, shape in saved.items() if name.partition("/")[0] in parts}
        expected = _shapes(abstract)
        wrong = [name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name)]
        if wrong:  # Orbax's error would be a page long
            name = max(wrong, key=lambda name: (name.startswith("params/"), name))
            raise UserError(
                f"checkpoint {self.path / str(step)} has another architecture: {name} has shape {saved.get(name)}, "
                f"expected {expected.get(name)}; use the code that the run was started with, or another --config.run."
            )
        arguments: Any = ocp.args.StandardRestore(abstract)
        if self._read_only:
            places = ocp.checkpoint_utils.construct_restore_args(parts)
            arguments = ocp.args.PyTreeRestore(parts, restore_args=places, partial_restore=True)
        composite = ocp.args.Composite(state=arguments, position=ocp.args.JsonRestore())
        restored: Any = self._manager.restore(step, args=composite)
        if restored.position is None:
            raise unreadable
        state = dataclasses.replace(abstract, **restored.state) if self._read_only else restored.state
        return state, restored.position

    def _move_aside(self, faults: dict[int, str], good: int) -> None:
        """Rename damaged checkpoints so that Orbax and `RunReader` ignore them, and print a warning."""
        for step in faults if jax.process_index() == 0 else ():
            target = self.path / f"damaged-{step}"
            if target.exists():
                target.rmtree()
            (self.path / str(step)).rename(target)
        multihost_utils.sync_global_devices("damaged checkpoints are moved")
        self._manager.reload()
        moved = "; ".join(f"checkpoint {self.path / str(step)} ({fault})" for step, fault in faults.items())
        log0(f"WARNING: damaged, and moved to damaged-STEP: {moved}; going back to step {good}, the newest whole one")
