"""Faults of a run in progress or ended, found in its folder, which is only read."""

import collections
import statistics
import time
from collections.abc import Iterator

from xclip_jax.core.console import format_duration
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import is_remote
from xclip_jax.report import collect
from xclip_jax.report.collect import Record, Warnings
from xclip_jax.train import checkpoint_files
from xclip_jax.train.checks import Finding, fail, warning
from xclip_jax.train.log import INPUT_BOUND
from xclip_jax.train.recovery import MOST_SKIPPED

_LATE = 10  # a run is stalled after this multiple of the usual time between lines of metrics,
_STALLED_SECONDS = 15 * 60  # but not before this time, which an evaluation may take
_MANY_BAD = 0.5  # fraction of data.max_bad_fraction


def check_run(path: str, now: float | None = None) -> Iterator[Finding]:
    """Yield the findings about the run in the folder `path` at the time `now`, in seconds since the epoch."""
    run = collect.read(path)
    folder = RunReader(path)
    speed = run.training[-1].get("samples_per_second", 0.0) if run.training else 0.0
    step_seconds = run.config.data.batch / speed if speed else 0.0
    diverged = _diverged(run, folder)
    yield _progress(run, folder, step_seconds, bool(diverged), time.time() if now is None else now)
    yield _checkpoints(run, folder, step_seconds)
    yield from _objective(run)
    yield from _input(run)
    yield from _samples(run, folder)
    yield from _skipped(run, folder, diverged)
    yield from _results(run, folder)


def _progress(run: Record, folder: RunReader, step_seconds: float, diverged: bool, now: float) -> Finding:
    if run.complete:
        return Finding("progress", f"complete at step {run.steps:,}")
    config = run.config
    last = folder.metrics_file if folder.metrics_file.exists() else folder.config_file
    age = max(now - last.stat().mtime, 0.0)
    late = age > max(_LATE * (config.log.every or config.steps) * step_seconds, _STALLED_SECONDS)
    left = (config.steps - run.steps) * step_seconds
    remaining = f", {format_duration(left)} left without evaluations" if left else ""
    text = f"step {run.steps:,} of {config.steps:,}{remaining}; the last line of metrics is {format_duration(age)} old"
    writer = folder.writer()
    if writer and late:
        remedy = "look at its output; stopping it (Ctrl-C) saves a checkpoint, and the same command resumes"
        return fail("progress", f"stalled? {text}, and {writer} is still at it", remedy)
    if writer:
        return Finding("progress", f"in progress by {writer}: {text}")
    if late or not is_remote(str(folder.path)):
        remedy = "see the skipped steps" if diverged else "run the same command to resume"
        return warning("progress", f"not running and not complete: {text}", remedy)
    return Finding("progress", text)


def _checkpoints(run: Record, folder: RunReader, step_seconds: float) -> Finding:
    faults: dict[int, str | None] = {}
    for step in folder.steps():
        try:
            faults[step] = checkpoint_files.find_fault(folder.checkpoints / str(step), step)
        except FileNotFoundError as error:
            faults[step] = f"{error.filename} is missing"
    # A run in progress may have deleted its oldest checkpoint.
    kept = folder.steps()
    faults = {step: fault for step, fault in faults.items() if step in kept}
    damaged = [f"{step} ({fault})" for step, fault in faults.items() if fault]
    if damaged:
        remedy = "restore it; a run that resumes moves it aside and goes on from the newest whole one"
        return fail("checkpoints", f"damaged in {folder.checkpoints}: {', '.join(damaged)}", remedy)
    newest = max(kept, default=0)
    text = ", ".join(f"step {step:,}" for step in faults)
    text = text or (f"step {newest:,}, written meanwhile" if newest else "none yet")
    lost = run.steps - newest
    if lost > 0 and not run.complete:
        seconds = f", {format_duration(lost * step_seconds)}" if step_seconds else ""
        text += f"; a kill now would lose {lost:,} steps{seconds}"
    return Finding("checkpoints", text)


def _objective(run: Record) -> Iterator[Finding]:
    """Yield the checks of the objective's terms; the report's health section shows the same."""
    for name in run.objective.terms:
        warnings = Warnings.collect(run, name)
        for check in warnings.health.checks:
            # A complete run is judged even if it was short.
            last = warnings.last(check.name) or (check.warning if check.failed and run.complete else "")
            answer = last.partition(": ")[2] if last else f"no. {check.measurement}"
            text = f"{name}, {check.name}: {answer} {warnings.history(check.name)}".removesuffix(".")
            yield fail("objective", text) if last else Finding("objective", text)


def _input(run: Record) -> Iterator[Finding]:
    shares = [row["data/wait_share"] for row in run.training if "data/wait_share" in row]
    recent = shares[len(shares) // 2 :]
    if recent:
        share = statistics.fmean(recent)
        text = f"the devices waited {share:.0%} of the time for data in the last {len(recent):,} logged steps"
        slow = warning("input", text, "raise data.threads, or store smaller images")
        yield slow if share > INPUT_BOUND else Finding("input", text)


def _samples(run: Record, folder: RunReader) -> Iterator[Finding]:
    last = run.training[-1] if run.training else {}
    if "data/bad_share" not in last:
        return
    share = last["data/bad_share"]
    allowed = run.config.data.max_bad_fraction
    reasons = collections.Counter(entry.get("reason", "") for entry in folder.read_bad_samples())
    text = f"{share:.2%} bad, the limit is {allowed:.2%}"
    if reasons:
        text += f" ({', '.join(f'{reason}: {count:,}' for reason, count in reasons.most_common(3))})"
    if share > _MANY_BAD * allowed:
        remedy = f"see {folder.bad_samples_file} and repair the data, or raise data.max_bad_fraction"
        yield warning("samples", f"{text}; more of them stop the run", remedy)
    else:
        yield Finding("samples", text)


def _diverged(run: Record, folder: RunReader) -> list[int]:
    """Return the skipped steps that stopped the run, or []."""
    row: list[int] = []
    for line in folder.read_skipped_steps():
        row = [] if "rewound_to" in line else [*row, int(line["step"])]
    row = row[-MOST_SKIPPED - 1 :]
    in_a_row = len(row) > MOST_SKIPPED and row[-1] - row[0] == MOST_SKIPPED
    return row if in_a_row and row[-1] > run.steps else []


def _skipped(run: Record, folder: RunReader, row: list[int]) -> Iterator[Finding]:
    """Yield the number of steps skipped for non-finite values; `row` stopped the run."""
    steps = [int(line["step"]) for line in folder.read_skipped_steps() if "rewound_to" not in line]
    samples = f"look at their samples in {folder.skipped_steps_file}; lower optim.lr"
    if row:
        text = f"the last {len(row):,} steps, to step {row[-1]:,}, were skipped in a row, for which the run stopped"
        remedy = f"{samples}, lengthen optim.warmup or set optim.grad_clip_norm=1, under a different --config.run"
        yield fail("skipped steps", text, remedy)
    elif steps:
        total = f"{len(steps):,} of {max([run.steps, *steps]):,} steps"
        text = f"{total} were skipped: their loss or gradient was not finite"
        remedy = f"{samples} or set optim.grad_clip_norm=1"
        yield warning("skipped steps", text, remedy)


def _results(run: Record, folder: RunReader) -> Iterator[Finding]:
    failed = (folder.read_results() or {}).get("failed") or {}
    for name, reason in failed.items():
        yield fail("results", f"{name} could not be evaluated: {reason}", "run the same command to evaluate again")
    judged = collect.verdicts(run.results)
    above = sum(verdict == collect.ABOVE for verdict in judged.values())
    text = f"{above} of {len(judged)} sets are above chance"
    if judged and not above:
        remedy = "see the objective's lines; too few steps, a wrong tokenizer, or captions of other images do this"
        yield warning("results", text, remedy)
    elif judged:
        yield Finding("results", text)
