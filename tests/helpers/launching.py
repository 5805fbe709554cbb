"""Runs the launch scripts with nothing of this environment but what a test gives them."""

import contextlib
import os
import pathlib
import shlex
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RUN = "gs://bucket/runs/mine"
TRAINING = [
    "--config",
    "configs/pretrain.py:objective=xclip,preset=B/32",
    f"--config.run={RUN}",
    "--config.data.sources=('folder:/a b',)",
]
COMMAND = ["-m", "xclip_jax.main", "--distributed", *TRAINING]


def executable(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)


def read(path):
    return path.read_text() if path.exists() else ""


def launch(script, *args, env=None, cwd=ROOT, path=(), timeout=60, folder=None):
    """Runs a script of the checkout `cwd`, from there or from `folder`.

    It has nothing of this environment but the commands in `path` and those of the system.
    """
    folder = folder or cwd
    env = {"PATH": os.pathsep.join([*map(str, path), "/usr/bin", "/bin"]), "HOME": "/nonexistent"} | (env or {})
    command = ["bash", os.path.relpath(pathlib.Path(cwd, "launch", script), folder), *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


@contextlib.contextmanager
def untouched(folder):
    """A folder for PATH whose commands must not be called."""
    for name in ("gcloud", "srun", "sbatch", "scontrol", "kubectl", "ssh", "scp", "curl", "uv", "python"):
        executable(folder / name, f"echo {name} >>{folder}/called\n")
    yield folder
    assert not (folder / "called").exists(), read(folder / "called")


def commands(done):
    """The commands that a dry run printed, as words."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
