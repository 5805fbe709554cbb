"""A run, alone or as one of several processes, that meets a fault at a step.

python -m tests.helpers.faulty_run RUN PAIRS FAULT STEP PROCESS [KEY=VALUE ...] [-- COORDINATOR PROCESSES PROCESS]
"""

import ast
import os
import signal
import sys
import time

import jax

from tests.helpers import tiny
from xclip_jax.core.errors import exit_with_message
from xclip_jax.data import loader
from xclip_jax.processes import runtime
from xclip_jax.train import trainer


def fail():
    raise ValueError("disk on fire")


FAULTS = {
    "none": lambda: None,
    "raise": fail,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sigint": lambda: signal.raise_signal(signal.SIGINT),
    "sigterm": lambda: signal.raise_signal(signal.SIGTERM),
    "hang in data": lambda: None,
}


def main(run, pairs, fault, step, process, *rest):
    changes = dict(pair.split("=", 1) for pair in rest[: rest.index("--")] if "=" in pair)
    others = rest[rest.index("--") + 1 :]
    with runtime.exits(), exit_with_message():
        if others:
            runtime.join(False, others[0], int(others[1]), int(others[2]))
        meets = jax.process_index() == int(process)
        place, read, steps = loader.to_global, loader.batches, []

        def to_global(batch, mesh):
            steps.append(batch)
            if len(steps) == int(step) and meets:
                FAULTS[fault]()
            time.sleep(0.02)
            return place(batch, mesh)

        def slow(*args, **options):
            for number, batch in enumerate(read(*args, **options), 1):
                if number == int(step) and meets and fault == "hang in data":
                    time.sleep(1000)
                yield batch

        loader.to_global = to_global
        loader.batches = slow
        given = {key: ast.literal_eval(value) for key, value in changes.items()}
        defaults = {"checkpoint__every": 10_000, "data__batch": 8, "steps": 10_000}
        trainer.run(tiny.short(pairs, run, objective="clip", optim__warmup=1, **defaults | given))


if __name__ == "__main__":
    main(*sys.argv[1:])
