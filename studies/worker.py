"""Process of one run of a study: python -m studies.worker FOLDER [CORE ...], started by the study's command."""

import json
import os
import pathlib
import signal
import sys
import threading

from absl import logging

from xclip_jax.config import schema
from xclip_jax.core.errors import Diverged, exit_with_message
from xclip_jax.processes import runtime
from xclip_jax.train import trainer

REQUEST, DIVERGED = ".study.json", "diverged.json"


def stop_with_parent() -> None:
    """Ask for a stop, as a signal would, when the study's command ends, however it ends: its pipe closes."""
    os.read(0, 1)  # a lock of sys.stdin would be held while the interpreter shuts down
    os.kill(os.getpid(), signal.SIGTERM)


def main(folder: str, *cores: str) -> None:
    """Train, or resume, the run of the config in FOLDER/.study.json, on the named cores, by default on all."""
    if cores:
        os.sched_setaffinity(0, map(int, cores))
    logging.set_verbosity(logging.ERROR)
    path = pathlib.Path(folder)
    config = schema.complete(json.loads((path / REQUEST).read_text())["config"])
    threading.Thread(target=stop_with_parent, daemon=True).start()
    with exit_with_message():
        try:
            trainer.run(config)
        except Diverged as error:
            (path / DIVERGED).write_text(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    with runtime.exits():
        main(*sys.argv[1:])
