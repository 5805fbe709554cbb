"""Layout of a run folder; the only module that knows its file names and formats:

config.json     {"config", "environment", "started", "length_groups", "text_rows": batch rows that these groups fit,
                 "starts": differences at later starts, "unsaved_step": last step of metrics that an earlier start left
                 without a checkpoint}
data.json       fingerprint of each training source, and digests of the records read to order them
tokenizer.json  copy of a tokenizer file named by data.tokenizer
metrics.jsonl   {"step", metric: value} per line; only lines of training steps contain a "loss"
results.jsonl   {"step", "records"} per line: the results of an evaluation, see `evaluators.results.to_json`
results.json    {"results", "records", "config", "environment", "seconds", "ended"} of the last evaluation; its
                per-example values are in results.json.items.npz
evaluation.json results of `xclip_jax.commands.evaluate`, see `evaluators.results`
trackers.json   {"id": the run's id in wandb and Trackio}
stacks-N.txt    thread stacks of process N, written if it hangs
checkpoints/, bad_samples.jsonl, skipped_steps.jsonl, tensorboard/, wandb/, report.html, picture.png

A lock by flock keeps other processes from writing to a run or file on a disk. Buckets have no locks.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath

from xclip_jax.core import json_lines, storage
from xclip_jax.core.errors import UserError, first_line

# Errors of network file systems without flock, on which nothing is locked.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class RunReader:
    """Paths and contents of a run's files, which `train.run_writer` writes.

    Methods that read a JSON file return None if it is missing, and raise `UserError` if it is damaged. Damaged and
    half-written lines of JSON lines are skipped.
    """

    def __init__(self, path: str | epath.Path) -> None:
        self.path = storage.as_path(path)
        self.config_file = self.path / "config.json"
        self.data_file = self.path / "data.json"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.class_names_file = self.path / "class_names.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.results_log_file = self.path / "results.jsonl"
        self.results_file = self.path / "results.json"
        self.evaluation_file = self.path / "evaluation.json"
        self.bad_samples_file = self.path / "bad_samples.jsonl"
        self.skipped_steps_file = self.path / "skipped_steps.jsonl"
        self.trackers_file = self.path / "trackers.json"
        self.report_file = self.path / "report.html"
        self.picture_file = self.path / "picture.png"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.lock_file = self.path / ".lock"

    def stacks_file(self, process: int) -> epath.Path:
        """Return the file for the thread stacks of a hanging process."""
        return self.path / f"stacks-{process}.txt"

    def is_run(self) -> bool:
        """Whether config.json belongs to a run; transformers writes other keys."""
        data = storage.read_bytes(self.config_file)
        if data is None:
            return False
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            return True  # damaged; `read_config` raises the error
        return isinstance(content, dict) and "config" in content

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending, without opening them."""
        import orbax.checkpoint as ocp  # slow

        if not self.checkpoints.exists():
            return []
        return sorted(item.step for item in ocp.path.step.standard_name_format().find_all(self.checkpoints))

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, or None."""
        return max(self.steps(), default=None)

    def writer(self) -> str:
        """Return a description of the process now writing to the folder; "" for none or in a bucket."""
        return holder(self.lock_file)

    def read_config(self) -> dict[str, Any] | None:
        """Return the content of config.json; `UserError` also for another program's."""
        content = self._read(self.config_file, lambda content: isinstance(content.get("config", {}), dict))
        if content is not None and "config" not in content:
            raise UserError(
                f"{self.path} is not a run's folder: its config.json has no key 'config'; name another folder."
            )
        return content

    def read_sources(self) -> list[dict[str, Any]] | None:
        """Return the fingerprints in data.json, one per source of data.sources."""
        return self._read(
            self.data_file, lambda items: isinstance(items, list) and all(isinstance(x, dict) for x in items)
        )

    def read_classes(self) -> tuple[str, ...] | None:
        """Return the classes of a fine-tuning run, or None if data.json lists none."""
        sources = self.read_sources() or []
        return next((tuple(source["classes"]) for source in sources if source.get("classes")), None)

    def read_trackers(self) -> dict[str, str] | None:
        """Return the content of trackers.json."""
        return self._read(self.trackers_file, lambda content: isinstance(content["id"], str))

    def read_results(self) -> dict[str, Any] | None:
        """Return the content of results.json."""
        return self._read(self.results_file, lambda content: content.keys() >= {"results", "records"})

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the objects of metrics.jsonl with a step, without values other than finite numbers."""

        def is_finite(value: Any) -> bool:
            return isinstance(value, (int, float)) and -sys.float_info.max <= value <= sys.float_info.max

        lines = json_lines.read(self.metrics_file)
        rows = [{key: value for key, value in line.items() if is_finite(value)} for line in lines]
        return [row for row in rows if "step" in row]

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Return the objects of results.jsonl."""
        return [line for line in json_lines.read(self.results_log_file) if line.keys() >= {"step", "records"}]

    def read_bad_samples(self) -> list[dict[str, Any]]:
        """Return the entries of bad_samples.jsonl, see `data.ledger`."""
        return json_lines.read(self.bad_samples_file)

    def read_skipped_steps(self) -> list[dict[str, Any]]:
        """Return the lines of skipped_steps.jsonl, see `train.recovery`."""
        return [line for line in json_lines.read(self.skipped_steps_file) if "step" in line]

    def _read(self, path: epath.Path, is_sound: Callable[[Any], bool]) -> Any:
        data = storage.read_bytes(path)
        if data is None:
            return None
        fault = ""
        try:
            content = json.loads(data)
            if is_sound(content):
                return content
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            fault = f" ({first_line(error)})"
        raise UserError(f"{path} is damaged, or another program's{fault}; restore or delete it, or use another folder.")


def evaluation_file(path: str | epath.Path) -> epath.Path:
    """Return the evaluation.json in the folder of a run or weights, or PATH.evaluation.json next to a file."""
    run = RunReader(path)
    if run.path.is_dir():
        return run.evaluation_file
    return run.path.with_name(f"{run.path.name}.{run.evaluation_file.name}")


def _flock(content: IO[str], how: int) -> None:
    try:
        fcntl.flock(content, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


@contextlib.contextmanager
def lock(path: str | os.PathLike, *, blocking: bool, file: str | os.PathLike = "") -> Iterator[None]:
    """Hold a lock on `path` by the lock file `file`, by default hidden in the same folder; it names this process.

    `UserError` if another process holds it, unless `blocking`.
    """
    if storage.is_remote(os.fspath(path)):
        yield
        return
    place = pathlib.Path(path)
    file = pathlib.Path(file or place.with_name(f".{place.name}.lock"))
    locked = False
    while not locked:
        with open(file, "a+") as content:
            try:
                _flock(content, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            except BlockingIOError as error:
                content.seek(0)
                other = content.read().strip() or "another process"
                raise UserError(f"{path} is in use by {other}; wait for it, or name another path.") from error
            # Retry if the previous holder has unlinked the locked inode.
            with contextlib.suppress(FileNotFoundError):
                locked = os.path.samestat(os.stat(file), os.fstat(content.fileno()))
            if locked:
                try:
                    content.truncate(0)
                    content.write(f"process {os.getpid()} on {platform.node()}\n")
                    content.flush()
                    yield
                finally:
                    with contextlib.suppress(OSError):  # such as on a disk that became read-only
                        file.unlink()


def holder(file: str | os.PathLike) -> str:
    """Return a description of the process holding the lock file; "" for none or in a bucket."""
    if storage.is_remote(os.fspath(file)) or not os.path.exists(file):
        return ""
    with open(file) as content:
        try:
            _flock(content, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return content.read().strip() or "another process"
    return ""
