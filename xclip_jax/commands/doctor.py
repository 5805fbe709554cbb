"""Check a run before its start, in progress or after its end.

    xclip-jax doctor --config RECIPE[:a=1,b=2] [--config.KEY=VALUE ...]
    xclip-jax doctor RUN

Prints one line per check: ok, warning or FAIL, with the remedy. The exit code is 1 after a FAIL, else 0. Nothing is
written to the run's folder. xclip-jax train --help lists the keys of a config.
"""

import contextlib
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags, logging

from xclip_jax.commands.diagnosis import check_heads, check_run
from xclip_jax.config import load
from xclip_jax.config.schema import Config, resolve
from xclip_jax.core.console import format_bytes, format_duration, show
from xclip_jax.core.errors import Parser, UserError, describe, exit_with_message
from xclip_jax.core.imports import add_trust, trusting
from xclip_jax.core.storage import strict_json
from xclip_jax.data import inspect, loader, records
from xclip_jax.data.base import Source
from xclip_jax.data.inspect import LoaderSample
from xclip_jax.objectives.clip import Contrastive
from xclip_jax.parallel.mesh import batch_part
from xclip_jax.train import callbacks, checks, cost, prepare
from xclip_jax.train.build import Experiment, make_encoder
from xclip_jax.train.checks import FAIL, WARNING, Finding, attempt, fail, warning
from xclip_jax.train.log import INPUT_BOUND
from xclip_jax.train.run_writer import RunWriter
from xclip_jax.train.state import create

CHEAP_FLOPS = 2e12  # of a step; a CPU takes minutes for more
SAMPLES, SECONDS = 512, 3.0  # to read at least
_TIMED_STEPS = 2
_MANY_TWINS = 0.05  # fraction of a batch's pairs that share a caption: false negatives


def check_config(
    config: ml_collections.ConfigDict | Mapping[str, Any] | Config, step: str = "auto"
) -> Iterator[Finding]:
    """Yield the findings about a run of `config` on this machine; nothing is written to the run's folder.

    Args:
      config: the config of the run.
      step: whether to compile and time the train step: "always", "never", or "auto", unless a CPU takes minutes for it.
    """
    faults: set[str] = set()
    for finding in _all_findings(config, step):
        # The first failed check reports a fault, later ones do not repeat it.
        if not any(fault in finding.text for fault in faults):
            yield finding
        if finding.mark == FAIL:
            faults.add(finding.text.rstrip("."))


def _all_findings(config: ml_collections.ConfigDict | Mapping[str, Any] | Config, step: str) -> Iterator[Finding]:
    devices = checks.check_devices()
    yield devices
    if not devices.values:  # JAX has none, so nothing can be built
        return
    check = "config"
    try:
        resolved = resolve(config)
        folder = RunWriter(resolved.run)
        yield from attempt("folder", lambda: checks.check_folder(resolved, folder))
        yield from attempt("log", lambda: callbacks.check_names(resolved) or ())
        check = "model"
        experiment = prepare.open_experiment(resolved, folder)
        model = list(checks.check_model(experiment))
        yield from model
        yield from attempt("disk", lambda: checks.check_disk(experiment, folder))
        check = "data"
        samples, fingerprints = prepare.open_data(experiment, folder)
    except (UserError, OSError) as error:
        yield fail(check, describe(error))
        if check == "data" and not experiment.objective.labelled:
            yield from check_evaluation(experiment, folder, None)
        return
    yield from checks.check_data(experiment, samples)
    yield from check_evaluation(experiment, folder, prepare.class_names(experiment, fingerprints))
    operations = model[0].values.get("flops_per_step")
    cheap = jax.devices()[0].platform != "cpu" or (operations or np.inf) <= CHEAP_FLOPS
    compiles = step == "always" or (step == "auto" and cheap)
    if compiles:
        experiment = prepare.with_length_groups(experiment, folder, samples)
    compiled = functools.cache(lambda: cost.compile_if_fits(experiment))
    memory = list(checks.check_memory(experiment, compiled if compiles else None))
    yield from memory
    yield from check_heads(resolved)
    seconds = None
    if compiles and not any(finding.mark == FAIL for finding in memory):
        timed = time_step(experiment, compiled()[0], folder.latest_step() or 0, operations)
        yield timed
        seconds = timed.values["step_seconds"]
    yield from check_samples(experiment, samples, seconds)


def check_evaluation(experiment: Experiment, folder: RunWriter, classes: Sequence[str] | None) -> Iterator[Finding]:
    """Yield whether evaluation sets and initial weights can be opened."""
    encoder = make_encoder(experiment, classes)

    def check_sets() -> Iterator[Finding]:
        return checks.check_sets(len(prepare.open_evaluators(experiment, encoder)))

    def check_weights() -> Iterator[Finding]:
        return checks.check_weights(experiment, prepare.open_initial(experiment, folder, classes)[0])

    yield from attempt("evaluation", check_sets)
    yield from attempt("weights", check_weights)


def time_step(experiment: Experiment, compiled: Any, start: int, operations: float | None = None) -> Finding:
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
    b = experiment.config.data.batch
    left = experiment.config.steps - start
    speed = f", {operations / seconds / 1e12:,.3g} TFLOP/s" if operations else ""
    text = (
        f"{seconds:.3g} s, {b / seconds:,.0f} samples/s{speed}, {format_bytes(usage['peak'])} of memory; {left:,} "
        f"steps take {format_duration(left * seconds)} without reading and evaluating"
    )
    values = {"step_seconds": seconds, "samples_per_second": b / seconds, "run_seconds": left * seconds}
    return Finding("step", text, values=values | {f"{name}_bytes": size for name, size in usage.items()})


def zeros(experiment: Experiment) -> dict[str, jax.Array]:
    """Return a batch of black images and empty texts, which takes as much time as any other."""
    arrays = experiment.transform().arrays(experiment.config.data.batch // batch_part(experiment.mesh)[1])
    batch = {field: np.zeros(*array) for field, array in arrays.items()}
    if "text" in batch:
        batch["text"][:] = experiment.tokenizer.eot_id
    return loader.to_global(batch, experiment.mesh)


def check_samples(experiment: Experiment, samples: Sequence[Source], step_seconds: float | None) -> Iterator[Finding]:
    """Read the first samples like the run; yield the fractions of bad samples and equal texts, and the speed."""
    seed = experiment.config.seed
    transform = experiment.transform()
    try:
        sample = inspect.read_batches(samples, transform, seed, samples=SAMPLES, seconds=SECONDS)
    except (UserError, OSError) as error:
        yield fail("samples", describe(error))
        return
    yield _bad_samples(sample, experiment)
    if sample.text is not None:
        yield _texts(sample.text, experiment)
    yield _speed(sample, experiment, step_seconds)


def _bad_samples(sample: LoaderSample, experiment: Experiment) -> Finding:
    bad = sum(sample.bad.values())
    allowed = experiment.config.data.max_bad_fraction
    share = bad / (sample.read + bad)
    text = f"{share:.2%} bad, of {sample.read + bad:,} that were read; the limit is {allowed:.2%}"
    values = {"read": sample.read + bad, "bad": bad, "bad_share": share, "allowed_share": allowed}
    if sample.example:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sample.bad.items())
        text += f" ({reasons}; the first is {sample.example.strip()})"
    remedy = "list them with xclip-jax check SOURCE and repair the data, or raise data.max_bad_fraction"
    if share > allowed:
        return fail("samples", f"{text}; the run stops", remedy, **values)
    return Finding("samples", text, values=values)


def _texts(text: np.ndarray, experiment: Experiment) -> Finding:
    """Return the lengths of texts, and the fraction of equal ones, which are false negatives of a contrastive loss."""
    objective = experiment.objective
    length = experiment.context_length
    rows = text[: experiment.config.data.batch]
    twins = records.repeated_share(rows)
    full = float(np.mean(experiment.tokenizer.lengths(text) == text.shape[1]))
    values = {"full_share": full, "duplicate_share": twins}
    if len(text) > 1 and (text == text[0]).all():
        fault = f"all {len(text):,} texts that were read are equal in their {length} tokens: there is nothing to learn"
        return fail("texts", fault, "give each image a caption of its own", **values)
    described = f"{full:.0%} of the texts fill all {length} tokens"
    equal = f"{twins:.0%} of {len(rows)} pairs have the text of another one"
    terms = [x for name, x in objective.terms.items() if isinstance(x, Contrastive) and objective.weights[name]]
    matched = any(term.positives == "caption" for term in terms)
    if terms and twins > _MANY_TWINS and matched == experiment.config.data.spread_duplicate_captions:
        fault = "which data.spread_duplicate_captions keeps apart" if matched else "which makes them false negatives"
        remedy = f"set data.spread_duplicate_captions={not matched}"
        return warning("texts", f"{described}; {equal}, {fault}", remedy, **values)
    return Finding("texts", f"{described}; {equal}", values=values)


def _speed(sample: LoaderSample, experiment: Experiment, step_seconds: float | None) -> Finding:
    data = experiment.config.data
    text = f"{sample.speed:,.0f} samples/s with data.threads={data.threads} on {records.cores()} cores"
    values = {"reading_samples_per_second": sample.speed}
    if not step_seconds:
        return Finding("reading", f"{text}; whether that is enough is unknown without a step", values=values)
    needed = data.batch / batch_part(experiment.mesh)[1] / step_seconds
    share = max(1 - sample.speed / needed, 0.0)
    values |= {"needed_samples_per_second": needed, "wait_share": share}
    text += f"; the steps need {needed:,.0f}"
    if share <= INPUT_BOUND or data.cache:  # later epochs come from the cache
        return Finding("reading", text, values=values)
    remedy = "raise data.threads, store smaller images, or read from a faster disk"
    return warning("reading", f"{text}: the devices would wait {share:.0%} of the time", remedy, **values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    logging.set_verbosity(logging.ERROR)
    words = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="xclip-jax doctor", description=__doc__)
    before = any(re.match(r"--?(no)?config\b", word) for word in words)
    if not before:
        parser.add_argument("run", metavar="RUN", help="a run's folder; or --config RECIPE for a new run")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    doc = "compile and time the train step; auto: unless that takes minutes on a CPU"
    parser.add_argument("--step", choices=("auto", "always", "never"), default="auto", help=doc)
    options, rest = parser.parse_known_args(words) if before else (parser.parse_args(words), [])

    def check() -> Iterator[Finding]:
        if not before:
            yield from check_run(options.run)
        else:
            load.parse([sys.argv[0], *rest])
            yield from check_config(flags.FLAGS.config, options.step)

    out = sys.stdout
    findings = []
    with exit_with_message(), trusting(options.trust):
        with contextlib.redirect_stdout(sys.stderr):  # checks print their own lines
            for finding in check():
                findings.append(finding)
                if not options.json:
                    show(finding.line(), out)
        marks = [finding.mark for finding in findings]
        if options.json:
            rows = [dataclasses.asdict(finding) for finding in findings]
            print(strict_json({"ok": FAIL not in marks, "findings": rows}, indent=2))
        else:
            print(f"{len(marks)} checks: {marks.count(FAIL)} FAIL, {marks.count(WARNING)} warnings")
    return 1 if FAIL in marks else 0


if __name__ == "__main__":
    sys.exit(main())
