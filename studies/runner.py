"""Runs a study: each run in its own process, resumed after a kill; a finished run leaves its record."""

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
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from studies import records
from studies.matrix import Matrix, Run
from studies.worker import DIVERGED, REQUEST
from xclip_jax.config import schema
from xclip_jax.core import environment
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import write_json
from xclip_jax.processes.interrupt import EXIT_RESUMABLE

ROOT = pathlib.Path(__file__).parents[1]
# Git's patterns, which include folders of studies.
_CODE = ("xclip_jax", "configs", "examples/*.py", "studies/*.py", "studies/*.txt", "setup.py")
_POLL = 0.5  # seconds


def code_version(root: pathlib.Path = ROOT) -> str:
    """Return the commit of the code, with "-dirty" if code or recipes have uncommitted changes; docs may have them."""
    # Not the cached answer: the checkout may change during a study, whose workers import the code anew.
    commit = environment.git_commit.__wrapped__(epath.Path(root) / "xclip_jax").removesuffix("-dirty")
    command = ["git", "-C", str(root), "status", "--porcelain", "--", *_CODE]
    status = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{commit}-dirty" if status.returncode == 0 and status.stdout.strip() else commit


@dataclasses.dataclass
class _Active:
    """A run in progress; `slot` numbers simultaneous runs."""

    slot: int
    run: Run
    process: subprocess.Popen[bytes]
    folder: pathlib.Path
    commits: list[str]

    def __str__(self) -> str:
        return f"{self.run.arm.name}, seed {self.run.seed}"


class Runner:
    """Runs the missing runs of a matrix, in its order."""

    def __init__(
        self,
        matrix: Matrix,
        runs: pathlib.Path,
        scratch: pathlib.Path,
        *,
        only: Collection[str] = (),
        max_hours: float | None = None,
        workers: int = 1,
    ) -> None:
        """Prepare without starting a run.

        Args:
          matrix, only: the study, and names of its arms; all by default.
          runs: the study's runs.jsonl.
          scratch: folder of the runs' folders, which are deleted once their records are written.
          max_hours: hours after which runs in progress are saved and stopped.
          workers: number of simultaneous runs.
        """
        self.runs = runs
        self.scratch = scratch
        self.workers = workers
        self._planned = matrix.runs(only)
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._active: dict[str, _Active] = {}
        self._failed: dict[str, str] = {}
        self._stopping = ""
        self._recorded = set(records.read_all(runs))
        self._lock: Any = None

    def run(self) -> bool:
        """Run all missing runs, and return whether none is left.

        Raises:
          UserError: uncommitted code, another command in the same folder, or failed runs.
        """
        if self._missing():
            self._check_commit()
        self.scratch.mkdir(parents=True, exist_ok=True)
        with self._locked(), self._signals():
            try:
                while self._step():
                    time.sleep(_POLL)
            finally:
                self._stop()
        if self._failed:
            reasons = " ".join(self._failed.values())
            raise UserError(f"{len(self._failed)} runs failed; the same command tries again. {reasons}")
        return not self._stopping

    def _step(self) -> bool:
        """End finished processes and start new ones; return whether a run is in progress."""
        for active in list(self._active.values()):
            if active.process.poll() is not None:
                del self._active[active.run.key]
                self._end(active)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._stopping = self._stopping or "--max-hours are over"
        if self._stopping:
            return False
        waiting = [run for run in self._missing() if run.key not in {**self._active, **self._failed}]
        for run in waiting[: self.workers - len(self._active)]:
            self._start(run)
        return bool(self._active)

    def _missing(self) -> list[Run]:
        return [run for run in self._planned if run.key not in self._recorded]

    def _check_commit(self) -> str:
        """Return the commit of the code; `UserError` for uncommitted code."""
        commit = code_version()
        if commit.endswith("-dirty") or commit == "unknown":
            raise UserError(f"the code has no commit ({commit}); commit {', '.join(_CODE)} in a git checkout.")
        return commit

    def _start(self, run: Run) -> None:
        commit = self._check_commit()
        folder = self.scratch / f"{run.arm.name}-s{run.seed}-{run.key[:8]}"
        folder.mkdir(exist_ok=True)
        (folder / DIVERGED).unlink(missing_ok=True)
        request = folder / REQUEST
        commits = json.loads(request.read_text())["commits"] if request.exists() else []
        if commit not in commits[-1:]:
            commits.append(commit)
        config = run.config.copy_and_resolve_references()
        config.run = str(folder)
        write_json(epath.Path(request), {"config": schema.to_dict(schema.resolve(config)), "commits": commits})
        # Runs that differ only in their data share one compiled program.
        defaults = {"JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled")}
        slot = min(set(range(self.workers)) - {active.slot for active in self._active.values()})
        cores: list[int] = []
        if self.workers > 1:
            # Without these the first run takes most of an accelerator's memory, and all wait for each other's cores.
            defaults["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
            if hasattr(os, "sched_getaffinity"):  # Linux
                cores = sorted(os.sched_getaffinity(0))[slot :: self.workers]
        with open(folder / "output.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "studies.worker", str(folder), *map(str, cores)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=defaults | os.environ | {"PYTHONUNBUFFERED": "1"},
                pass_fds=(self._lock.fileno(),),  # the folder stays locked as long as one of its runs lives
                start_new_session=True,  # Ctrl-C reaches only this process, which asks once
            )
        self._active[run.key] = _Active(slot, run, process, folder, commits)
        print(f"{self._active[run.key]}: started, {folder / 'output.log'}", flush=True)

    def _end(self, active: _Active) -> None:
        """Record a run whose process ended, or keep the message of its failure."""
        code = active.process.returncode
        if code == EXIT_RESUMABLE:
            self._stopping = self._stopping or f"{active} was asked to stop"
            return
        if code != 0:
            log = active.folder / "output.log"
            *_, reason = [f"status {code}", *log.read_text(errors="replace").strip().splitlines()]
            self._failed[active.run.key] = f"{active}: {reason} (see {log})."
            print(f"FAILED: {self._failed[active.run.key]}", flush=True)
            return
        self._record(active)
        shutil.rmtree(active.folder)

    def _record(self, active: _Active) -> None:
        """Record a run that finished or diverged."""
        mark = active.folder / DIVERGED
        record = records.collect(
            active.folder,
            arm=active.run.arm.name,
            tested=active.run.arm.tested,
            commit=", ".join(dict.fromkeys([*active.commits, code_version()])),
            workers=self.workers,
            error=json.loads(mark.read_text())["error"] if mark.exists() else "",
        )
        if record.key != active.run.key:
            raise UserError(f"{active.folder} has another config than {active}; delete it.")
        name = records.write(self.runs, record)
        self._recorded.add(record.key)
        headlines = ", ".join(f"{r.set} {r.key} {r.value:.1f}" for r in record.results if r.headline)
        print(f"{name}: {record.error or headlines or 'finished'}", flush=True)

    def _stop(self) -> None:
        """Ask the runs in progress to save, wait for them, and record those that end meanwhile."""
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
        """Stop at SIGTERM or SIGINT once runs are saved; a second signal kills them."""

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
        """Keep other commands out of the scratch folder, also while runs left by a killed command save."""
        with open(self.scratch / ".lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.scratch} is in use by another study; wait, or pass --scratch.") from None
            os.set_inheritable(file.fileno(), True)
            self._lock = file
            yield
