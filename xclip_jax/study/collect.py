"""Run files of runs that were started by other means than the study's command, such as a launch script of a pod."""

import pathlib
from collections.abc import Iterator, Sequence

from xclip_jax.errors import UserError
from xclip_jax.run_folder import RunFolder
from xclip_jax.study import records
from xclip_jax.study.matrix import Matrix, Snapshot


def collect(matrix: Matrix, runs: pathlib.Path, folders: Sequence[str], commit: str = "") -> Iterator[pathlib.Path]:
    """Write the run file of each finished run, and yield its path.

    Args:
      matrix: of the study.
      runs: folder of the run files.
      folders: of the runs, in a bucket too.
      commit: of the code, where the run does not know it.

    Raises:
      UserError: a folder that is not of a finished run, or of none of the study, or whose run has its file already.
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
        known = str(content["environment"].get("commit") or "unknown")
        record = records.collect(
            folder,
            arm=run.arm.name,
            section=run.arm.section,
            commit=commit if known == "unknown" and commit else known,
            workers=1,
            error="",
        )
        yield records.write(runs, record)
