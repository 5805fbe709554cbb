"""The search page's command in a process of its own."""

import contextlib
import os
import subprocess
import sys

import pytest


@contextlib.contextmanager
def served(run, pictures, cache):
    """The address at which the command serves the pictures."""
    line = [
        sys.executable,
        "-m",
        "xclip_jax.commands.serve",
        str(run),
        "--images",
        str(pictures),
        "--cache",
        str(cache),
    ]
    process = subprocess.Popen([*line, "--port", "0"], stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        for printed in process.stdout:
            if "http://" in printed:
                yield f"http://{printed.partition('http://')[2].split()[0]}/"
                break
        else:
            pytest.fail("the command ended without an address")
    finally:
        process.terminate()
        process.wait(timeout=30)
