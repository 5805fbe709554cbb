"""The search page, served by its command in another process."""

import contextlib
import os
import subprocess
import sys


@contextlib.contextmanager
def served(run, pictures, cache):
    """Yield the address of the page for a folder of pictures."""
    flags = [str(run), "--images", str(pictures), "--port", "0"]
    line = [sys.executable, "-m", "xclip_jax.commands.serve", *flags]
    environment = os.environ | {"XCLIP_CACHE": str(cache)}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield next(f"{printed.split()[2]}/" for printed in process.stdout if "http://" in printed)
        finally:
            process.terminate()
