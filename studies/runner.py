"""Runs a study: each run in a process of its own, resumed after a kill; a finished run leaves its record."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from studies import records
from studies.matrix import Matrix, Run, Snapshot, seconds_of, selected
from studies.worker import DIVERGED, REQUEST
from xclip_jax.config import schema
from xclip_jax.core import environment
from xclip_jax.core.console import format_duration
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import write_json
from xclip_jax.processes.interrupt import EXIT_RESUMABLE

ROOT = pathlib.Path(__file__).parents[1]
_CODE = ("xclip_jax", "configs", "studies/*.py", "setup.py")  # as git has patterns, in folders of studies too
RECORDED = "recorded"  # file in the folder of a run that has had its record
_POLL, _SHOWN_EVERY = 0.5, 30.0  # seconds
_LOCK_SECONDS = 60
_MAX_FAILURES = 3  # in a row: then all would fail


def code_version(root: pathlib.Path = ROOT) -> str:
    """Return the commit of the code, with "-dirty" where code or recipes differ from it; results and docs may."""
    commit = environment.git_commit(epath.Path(root) / "xclip_jax").removesuffix("-dirty")
    command = ["git", "-C", str(root), "status", "--porcelain", "--", *_CODE]
    status = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{commit}-dirty" if status.returncode == 0 and status.stdout.strip() else commit


def same_code(a: str, b: str, root: pathlib.Path = ROOT) -> bool:
    """Return whether two commits, as `code_version` returns them, have the same code and recipes."""
    if a == b or "-dirty" in a + b:
        return a == b
    command = ["git", "-C", str(root), "diff", "--quiet", a, b, "--", *_CODE]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclasses.dataclass
class _Active:
    """A run in progress; `slot` counts those at the same time."""

    slot: int
    run: Run
    process: subprocess.Popen[bytes]
    folder: pathlib.Path
    commits: list[str]
    shown: float = 0.0


class Runner:
    """Runs what is missing of a matrix, in its order."""

    def __init__(
        self,
        matrix: Matrix,
        runs: pathlib.Path,
        scratch: pathlib.Path,
        *,
        only: Collection[str] = (),
        max_hours: float | None = None,
        workers: int = 1,
        allow_dirty: bool = False,
        commit: str = "",
        keep: bool = False,
    ) -> None:
        """Prepare; nothing is started.

        Args:
          matrix: of the study.
          runs: the study's runs.jsonl.
          scratch: folder of the runs' own folders, which are deleted once their records are written.
          only: sections and arms to run; all by default.
          max_hours: after which runs in progress are saved and stopped.
          workers: runs at the same time.
          allow_dirty: record runs of code that is not committed.
          commit: of the code, where it is not in a git checkout.
          keep: do not delete the runs' folders.
        """
        self.matrix, self.runs, self.scratch = matrix, runs, scratch
        self.only, self.workers, self.allow_dirty, self.commit, self.keep = only, workers, allow_dirty, commit, keep
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._active: dict[str, _Active] = {}
        self._failed: dict[str, str] = {}
        self._failures = 0
        self._stopping = ""
        self._snapshot: tuple[tuple[int, int] | None, Snapshot] | None = None
        self._lock: Any = None

    def check(self) -> None:
        """Raises `UserError` where something is to be run and the code is not committed; nothing is written."""
        snapshot = self._read()
        if any(run.key and run.key not in snapshot.records for run in selected(snapshot, self.only)):
            self._check_commit()

    def run(self) -> bool:
        """Run all that can be run. Returns whether nothing is left of it but runs that wait for others' recipes.

        Raises:
          UserError: uncommitted code, another command in the same folder, or runs that failed.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        with self._locked(), self._signals():
            try:
                while self._step():
                    time.sleep(_POLL)
            finally:
                self._stop()
        if self._failed:
            raise UserError(
                f"{len(self._failed)} runs failed; the same command tries again. " + " ".join(self._failed.values())
            )
        return not self._stopping

    def _step(self) -> bool:
        """Look after the runs in progress and start others. Returns whether there is more to do."""
        for active in list(self._active.values()):
            if active.process.poll() is not None:
                del self._active[active.run.key]
                self._end(active)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._stopping = self._stopping or "--max-hours are over"
        if self._failures >= _MAX_FAILURES:
            self._stopping = f"{_MAX_FAILURES} runs failed in a row"
        if self._stopping:
            return False
        snapshot = self._read()
        todo = [run for run in selected(snapshot, self.only) if run.key not in snapshot.records]
        waiting = [run for run in todo if run.key not in self._active and run.key not in self._failed]
        for run in [run for run in waiting if run.key][: self.workers - len(self._active)]:
            self._start(run)
        self._show(snapshot, todo)
        return bool(self._active)

    def _read(self) -> Snapshot:
        """Return what is finished now, by other commands too; reads the records again when their file has changed."""
        stat = self.runs.stat() if self.runs.exists() else None
        state = stat and (stat.st_size, stat.st_mtime_ns)
        if self._snapshot is None or self._snapshot[0] != state:
            self._snapshot = state, Snapshot(self.matrix, records.read_all(self.runs))
        return self._snapshot[1]

    def _commit(self) -> str:
        commit = code_version()
        return self.commit if commit == "unknown" and self.commit else commit

    def _check_commit(self) -> str:
        """The commit of the code; `UserError` where the code has uncommitted changes, unless that is allowed."""
        commit = self._commit()
        if (commit.endswith("-dirty") or commit == "unknown") and not self.allow_dirty:
            raise UserError(
                f"the code is not that of a commit ({commit}): {', '.join(_CODE)} have changes, or are not in a git "
                "checkout. Commit them, name their commit with --commit, or pass --allow-dirty; records tell which."
            )
        return commit

    def _start(self, run: Run) -> None:
        commit = self._check_commit()
        folder = self.scratch / f"{run.arm.name}-s{run.seed}-{run.key[:8]}"
        if (folder / RECORDED).exists():  # kept without a record, which was deleted to run it again
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        (folder / DIVERGED).unlink(missing_ok=True)
        request, commits = folder / REQUEST, [commit]
        if request.exists():
            before = json.loads(request.read_text())["commits"]
            commits = before if before[-1] == commit else [*before, commit]
        config = run.config.copy_and_resolve_references()
        config.run = str(folder)
        write_json(epath.Path(request), {"config": schema.to_dict(schema.resolve(config)), "commits": commits})
        # Runs that differ only in their data share one compiled program.
        defaults = {"JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled")}
        slot = min(set(range(self.workers)) - {active.slot for active in self._active.values()})
        cores: list[int] = []
        if (
            self.workers > 1
        ):  # else the first takes most of an accelerator's memory, and all wait for each other's cores
            defaults["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
            if hasattr(os, "sched_getaffinity"):  # Linux
                cores = sorted(os.sched_getaffinity(0))[slot :: self.workers]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with open(folder / "output.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "studies.worker", str(folder), *map(str, cores)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=defaults | os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                pass_fds=(self._lock.fileno(),),  # the folder stays locked for as long as one of its runs lives
                start_new_session=True,  # Ctrl-C reaches only this process, which asks once
            )
        self._active[run.key] = _Active(slot, run, process, folder, commits)

    def _end(self, active: _Active) -> None:
        """Record a run whose process ended, or note why it failed."""
        code, run = active.process.returncode, active.run
        if code == EXIT_RESUMABLE:
            self._stopping = self._stopping or f"{run.arm.name} was asked to stop"
            return
        if code != 0:
            lines = (active.folder / "output.log").read_text(errors="replace").strip().splitlines() or [
                f"status {code}"
            ]
            self._failed[run.key] = (
                f"{run.arm.name}, seed {run.seed}: {lines[-1]} (see {active.folder / 'output.log'})."
            )
            self._failures += 1
            print(f"FAILED: {self._failed[run.key]}", flush=True)
            return
        self._failures = 0
        if run.key in self._read().records:
            print(f"{run.arm.name}, seed {run.seed}: has a record already, which stays as it is", flush=True)
        else:
            self._record(active)
        (active.folder / RECORDED).touch()
        if not self.keep:
            shutil.rmtree(active.folder)

    def _record(self, active: _Active) -> None:
        """Record a run that finished or diverged."""
        run, now = active.run, self._commit()
        record = records.collect(
            active.folder,
            arm=run.arm.name,
            section=run.arm.section,
            commit=", ".join(active.commits if same_code(active.commits[-1], now) else [*active.commits, now]),
            workers=self.workers,
            error=divergence(active.folder),
        )
        if record.key != run.key:
            raise UserError(f"{active.folder} has another config than {run.arm.name}, seed {run.seed}; delete it.")
        name = records.write(self.runs, record)
        print(f"{name}: {record.error or _headlines(record)}", flush=True)

    def _show(self, snapshot: Snapshot, todo: list[Run]) -> None:
        """Print where the runs in progress are, now and then."""
        now = time.monotonic()
        if not (due := [active for active in self._active.values() if now - active.shown > _SHOWN_EVERY]):
            return
        total = len(selected(snapshot, self.only))
        left = sum(seconds_of(snapshot, run) for run in todo) / self.workers
        for active in due:
            active.shown = now
            with open(active.folder / "output.log", "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
                lines = log.read().decode(errors="replace").splitlines()
            step = next((line for line in reversed(lines) if line.startswith("step ")), "starting")
            print(
                f"[{total - len(todo)} of {total} runs, {format_duration(left)} left] {active.run.arm.name}, seed "
                f"{active.run.seed}: {step}",
                flush=True,
            )

    def _stop(self) -> None:
        """Ask the runs in progress to save, and wait for them; those that end meanwhile are written."""
        if self._active:
            print(f"stopping: {self._stopping or 'an error'}; runs in progress are saved", flush=True)
        for active in self._active.values():
            with contextlib.suppress(ProcessLookupError):
                active.process.terminate()
        for active in self._active.values():
            if active.process.wait() == 0:
                self._end(active)
        self._active = {}

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the study once its runs are saved; the second one does not wait for that."""

        def stop(number: int, _: Any) -> None:
            if self._stopping:
                for active in self._active.values():
                    active.process.kill()
            self._stopping = signal.Signals(number).name

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other commands out of the scratch folder, and wait for runs that a killed command left."""
        with open(self.scratch / ".lock", "a") as file:
            since = time.monotonic()
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() - since > _LOCK_SECONDS:
                        raise UserError(
                            f"{self.scratch} is in use by another study; wait, or pass --scratch."
                        ) from None
                    time.sleep(_POLL)
            os.set_inheritable(file.fileno(), True)
            self._lock = file
            yield


def _headlines(record: records.RunRecord) -> str:
    """The headline of each set, in one line."""
    return ", ".join(f"{r.set} {r.key} {r.value:.1f}" for r in record.results if r.headline) or "finished"


# --- runs that were started by other means


def collect(
    matrix: Matrix,
    runs: pathlib.Path,
    folders: Sequence[str],
    *,
    commit: str = "",
    diverged: str = "",
    allow_dirty: bool = False,
) -> Iterator[str]:
    """Record each finished run, and yield its name.

    Args:
      matrix: of the study.
      runs: the study's runs.jsonl.
      folders: of the runs, in a bucket too.
      commit: of the code, where the run does not know it.
      diverged: why runs without results diverged, where their folders do not say so.
      allow_dirty: record runs of uncommitted code.

    Raises:
      UserError: a folder without a finished run, or whose run belongs to another study, is recorded already or was made
        by code that is not committed.
    """
    for folder in folders:
        snapshot = Snapshot(matrix, records.read_all(runs))  # recipes are chosen as candidates come in
        content = RunFolder(folder).read_config()
        if content is None:
            raise UserError(f"{folder!r} is not the folder of a run; --collect takes folders with a config.json.")
        key = records.config_key(content["config"])
        run = next((run for run in snapshot.runs if run.key == key), None)
        if run is None:
            raise UserError(
                f"{folder!r} has the config of no run of study {matrix.study.name!r}; start runs by its config file, "
                "and collect candidates before the runs that take over their recipes."
            )
        results = RunFolder(folder).read_results()
        if results and diverged:
            raise UserError(f"{folder!r} has results; --diverged is for runs that ended without.")
        commits = _commits([content, *content.get("starts", ()), *([results] if results else ())], commit)
        if not allow_dirty and (unclear := [name for name in commits if name.endswith("-dirty") or name == "unknown"]):
            raise UserError(
                f"{folder!r} was made by code that is not that of a commit ({unclear[0]}); name the commit of an "
                "unknown one with --commit, or pass --allow-dirty: records tell which."
            )
        record = records.collect(
            folder,
            arm=run.arm.name,
            section=run.arm.section,
            commit=", ".join(commits),
            workers=None,
            error="" if results else divergence(folder) or diverged,
        )
        yield records.write(runs, record)


def divergence(folder: str | pathlib.Path) -> str:
    """Return why a run diverged, as its process wrote into its folder; "" where it did not."""
    mark = epath.Path(folder) / DIVERGED
    return json.loads(mark.read_text())["error"] if mark.exists() else ""


def _commits(starts: Sequence[Mapping[str, Any]], commit: str) -> list[str]:
    """Commits of all starts and of the last evaluation, without repetitions; `commit` stands for unknown ones."""
    known = [str(start.get("environment", {}).get("commit") or "unknown") for start in starts]
    return list(dict.fromkeys(commit if name == "unknown" and commit else name for name in known))
