"""Three of the forty tries of tests/torture/disks.py, those that need neither root nor a disk."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.long


@pytest.mark.parametrize("stage", ["checkpoint", "metrics", "embeddings"])
def test_files_that_may_not_grow_end_a_command_in_one_sentence(stage, run, pairs, tmp_path):
    """As under a quota; for a checkpoint hundreds of writes fail at once, in threads of TensorStore."""
    (tmp_path / "pairs").symlink_to(pairs)
    (tmp_path / "place").mkdir()
    command = [
        sys.executable,
        "-m",
        "tests.torture.disks",
        "--try",
        stage,
        "limited",
        tmp_path / "place",
        run,
        tmp_path,
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    (error,) = process.stderr.splitlines()
    assert error.startswith("error: ") and str(tmp_path) in error
