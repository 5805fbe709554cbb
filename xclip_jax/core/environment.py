"""Versions, devices and commit behind a result, and the memory of this machine."""

import contextlib
import functools
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

import jax
from etils import epath

from xclip_jax.core import __version__
from xclip_jax.core.errors import Parser, redact

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy", "xclip_jax")
_CGROUP = pathlib.Path("/sys/fs/cgroup")


@functools.cache
def git_commit(folder: epath.Path) -> str:
    """Return the commit of the checkout or `git archive` with `folder` at its top, or "unknown" outside both.

    A commit with changed files ends in "-dirty". The answer is cached, as the checkout may change during a run.
    """
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        # The package may be installed in another project's checkout, such as in .venv.
        if os.path.samefile(_git(folder, "rev-parse", "--show-toplevel"), folder.parent):
            return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    archive = folder.parent / ".git_archival.txt"
    match = re.fullmatch(r"node: ([0-9a-f]{40})\s*", archive.read_text()) if archive.is_file() else None
    return match[1] if match else "unknown"


def _git(folder: epath.Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return __version__ if package == "xclip_jax" else "unknown"


def uptime() -> float:
    """Seconds since the start of this process; 0 if the system is not Linux."""
    try:
        # Field 22 is the start; split after the program name in brackets, which may contain spaces.
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def capture() -> dict[str, Any]:
    """Return versions, devices, commit and command line of this process."""
    tpu = _version("libtpu")
    return {
        "command": redact(" ".join([Parser.program or sys.argv[0], *sys.argv[1:]])),
        "commit": git_commit(epath.Path(__file__).parent.parent),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform": jax.default_backend(),
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES} | ({"libtpu": tpu} if tpu != "unknown" else {}),
    }


def host_memory() -> float:
    """Return the memory of this machine or container, in bytes."""
    machine = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        return min(machine, float((_CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # "max" if unlimited
        return machine
