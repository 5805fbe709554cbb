"""Check a run before its start, in progress or after its end.

    xclip-jax doctor --config RECIPE[:a=1,b=2] [--config.KEY=VALUE ...]
    xclip-jax doctor RUN

Prints one line per check: ok, warning or FAIL, with the remedy. The exit code is 1 after a FAIL, else 0. Nothing is
written to the run's folder. xclip-jax train --help lists the keys of a config.
"""

import contextlib
import functools
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from xclip_jax.commands.diagnosis import check_run
from xclip_jax.config import load
from xclip_jax.config.schema import Config, resolve
from xclip_jax.core.console import format_bytes, format_duration, show
from xclip_jax.core.errors import Parser, UserError, describe, exit_with_message
from xclip_jax.core.imports import add_trust, trusting
from xclip_jax.data import loader
from xclip_jax.parallel.mesh import batch_part
from xclip_jax.train import callbacks, checks, cost, prepare
from xclip_jax.train.build import Experiment, make_encoder
from xclip_jax.train.checks import FAIL, WARNING, Finding, attempt, fail
from xclip_jax.train.run_writer import RunWriter
from xclip_jax.train.state import create

CHEAP_FLOPS = 2e12  # of a step; a CPU takes minutes for more
_TIMED_STEPS = 2


def check_config(config: ml_collections.ConfigDict | Mapping[str, Any] | Config) -> Iterator[Finding]:
    """Yield the findings about a run of `config` on this machine; nothing is written to the run's folder.

    The train step is compiled and timed unless a CPU takes minutes for it, see `CHEAP_FLOPS`.
    """
    devices = checks.check_devices()
    yield devices
    if devices.mark == FAIL:  # JAX has none, so nothing can be built
        return
    check = "config"
    try:
        resolved = resolve(config)
        folder = RunWriter(resolved.run)
        yield from attempt("folder", lambda: checks.check_folder(resolved, folder))
        yield from attempt("log", lambda: callbacks.check_names(resolved) or ())
        check = "model"
        experiment = prepare.open_experiment(resolved, folder)
        yield from checks.check_model(experiment)
        yield from attempt("disk", lambda: checks.check_disk(experiment, folder))
        check = "data"
        samples, fingerprints = prepare.open_data(experiment, folder)
    except (UserError, OSError) as error:
        yield fail(check, describe(error))
        return
    total = sum(map(len, samples))
    epochs = resolved.steps * resolved.data.batch / total
    yield Finding("data", f"{total:,} samples, of which the run reads {epochs:,.2f} epochs")
    yield from check_evaluation(experiment, folder, prepare.class_names(experiment, fingerprints))
    operations = cost.step_flops(experiment.config, rows=experiment.text_rows[0])
    compiles = jax.devices()[0].platform != "cpu" or (operations or np.inf) <= CHEAP_FLOPS
    if compiles:
        experiment = prepare.with_length_groups(experiment, folder, samples)
    compiled = functools.cache(lambda: cost.compile_if_fits(experiment))
    memory = list(checks.check_memory(experiment, compiled if compiles else None))
    yield from memory
    if compiles and not any(finding.mark == FAIL for finding in memory):
        yield time_step(experiment, compiled()[0], folder.latest_step() or 0, operations)


def check_evaluation(experiment: Experiment, folder: RunWriter, classes: Sequence[str] | None) -> Iterator[Finding]:
    """Yield whether evaluation sets and initial weights can be opened."""
    encoder = make_encoder(experiment, classes)

    def check_sets() -> Iterator[Finding]:
        opened = prepare.open_evaluators(experiment, encoder)
        if opened:
            yield Finding("evaluation", f"{len(opened)} evaluation sets can be opened")

    def check_weights() -> Iterator[Finding]:
        tensors, _ = prepare.open_initial(experiment, folder, classes)
        if tensors:
            total = len(jax.tree.leaves(experiment.abstract.variables()))
            text = f"{experiment.config.init.weights} has {len(tensors)} of the model's {total} tensors"
            yield Finding("weights", text)

    yield from attempt("evaluation", check_sets)
    yield from attempt("weights", check_weights)


def time_step(experiment: Experiment, compiled: Any, start: int, operations: float | None) -> Finding:
    """Return the times of the `compiled` step and of all steps from `start`; `operations` are its FLOPs, if known."""
    state = create(experiment.init, experiment.abstract)
    batch = zeros(experiment)
    ends = []
    for _ in range(_TIMED_STEPS + 1):  # the first is a warm-up
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        ends.append(time.perf_counter())
    seconds = (ends[-1] - ends[0]) / _TIMED_STEPS
    usage = cost.memory_usage(experiment, compiled)
    left = experiment.config.steps - start
    speed = f", {operations / seconds / 1e12:,.3g} TFLOP/s" if operations else ""
    text = (
        f"{seconds:.3g} s, {experiment.config.data.batch / seconds:,.0f} samples/s{speed}, "
        f"{format_bytes(usage['peak'])} of memory; {left:,} steps take {format_duration(left * seconds)} without "
        "reading and evaluating"
    )
    return Finding("step", text)


def zeros(experiment: Experiment) -> dict[str, jax.Array]:
    """Return a batch of black images and empty texts, which takes as much time as any other."""
    arrays = experiment.transform().arrays(experiment.config.data.batch // batch_part(experiment.mesh)[1])
    batch = {field: np.zeros(*array) for field, array in arrays.items()}
    if "text" in batch:
        batch["text"][:] = experiment.tokenizer.eot_id
    return loader.to_global(batch, experiment.mesh)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="xclip-jax doctor", description=__doc__)
    before = any(re.match(r"--?(no)?config\b", word) for word in words)
    if not before:
        parser.add_argument("run", metavar="RUN", help="a run's folder; or --config RECIPE for a new run")
    add_trust(parser)
    options, rest = parser.parse_known_args(words) if before else (parser.parse_args(words), [])

    out = sys.stdout
    marks = []
    with exit_with_message(), trusting(options.trust):
        with contextlib.redirect_stdout(sys.stderr):  # checks print their own lines
            if before:
                load.parse([sys.argv[0], *rest])
            for finding in check_config(flags.FLAGS.config) if before else check_run(options.run):
                marks.append(finding.mark)
                show(finding.line(), out)
        print(f"{len(marks)} checks: {marks.count(FAIL)} FAIL, {marks.count(WARNING)} warnings")
    return 1 if FAIL in marks else 0


if __name__ == "__main__":
    sys.exit(main())
