"""A run, alone or as one of several processes, that meets a fault of its own making at a step.

python -m tests.helpers.faulty_run RUN PAIRS FAULT STEP PROCESS [KEY=VALUE ...] [-- COORDINATOR PROCESSES PROCESS]
"""

import ast
import os
import signal
import sys
import time
import types

import jax

from tests.helpers import tiny
from xclip_jax import report
from xclip_jax.core import console
from xclip_jax.core.errors import exit_with_message
from xclip_jax.data import loader
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.results import Provenance
from xclip_jax.processes import runtime
from xclip_jax.report import page
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
    "sigint in evaluation": lambda: None,
    "sigint in report": lambda: None,
    "raise in report": lambda: None,
    "slow report": lambda: None,
}


def spoil_report(fault, process):
    """What goes wrong while the report is made, in one process; all make it from the same batches."""
    render, collect = page.render, page.collect_examples

    def slow(*args, **options):
        time.sleep(12)  # in process 0 alone
        return render(*args, **options)

    def examples(*args, **options):
        for number in range(200):
            if number == 3 and jax.process_index() == process:
                FAULTS[fault.removesuffix(" in report")]()
            console.report_progress()
            time.sleep(0.05)
        return collect(*args, **options)

    if fault == "slow report":
        runtime._SHUTDOWN_SECONDS = 4
        page.render = slow
    elif fault.endswith("in report"):
        page.collect_examples = examples


class LongSet:
    """A set of very many batches, each of which takes a moment."""

    inputs, data = (), types.SimpleNamespace(card=Provenance())

    def __init__(self, name, fault):
        self.name, self.encoder, self._fault = name, type("Encoder", (), {"unreadable": {}}), fault

    def measure(self, variables):
        for number in range(1000):
            if number == 3:
                self._fault()
            console.report_progress()
            time.sleep(0.05)
        return []


def main(run, pairs, fault, step, process, *rest):
    changes = dict(pair.split("=", 1) for pair in rest[: rest.index("--")] if "=" in pair)
    others = rest[rest.index("--") + 1 :]
    with runtime.exits(), exit_with_message():
        spoil_report(fault, int(process))
        if others:
            runtime.join(False, others[0], int(others[1]), int(others[2]))
        meets = jax.process_index() == int(process)
        place, steps = loader.to_global, []

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

        read, loader.to_global = loader.batches, to_global
        loader.batches = slow
        registry.open_all = lambda specs, *_: [
            LongSet(spec, FAULTS["sigint"] if meets and "evaluation" in fault else FAULTS["none"]) for spec in specs
        ]
        given = {key: ast.literal_eval(value) for key, value in changes.items()}
        defaults = {
            "data__sources": (f"folder:{pairs}",),
            "checkpoint__every": 10_000,
            "data__batch": 8,
            "steps": 10_000,
        }
        trainer.run(tiny.config("clip", run=run, **defaults | given), [report.callback()])


if __name__ == "__main__":
    main(*sys.argv[1:])
