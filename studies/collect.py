"""Records of runs that were started by other means than the study's command, such as a launch script of a pod."""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from studies import records
from studies.matrix import Matrix, Snapshot
from studies.worker import DIVERGED
from xclip_jax.errors import UserError
from xclip_jax.run_folder import RunFolder


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
      diverged: why runs have no results that diverged and whose folders do not say so.
      allow_dirty: record runs of code that is not that of a commit.

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
