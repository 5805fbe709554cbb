"""Faults of a run that is in progress or has ended, judged by its folder, in which nothing is changed."""

import collections
import statistics
import time
from collections.abc import Iterator

from xclip_jax.config.schema import Config
from xclip_jax.core.console import format_duration
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import is_remote
from xclip_jax.models.two_towers import TOWERS
from xclip_jax.report import collect
from xclip_jax.report.collect import Record, Warnings, complete_rows
from xclip_jax.train import checkpoint_files, cost, weights
from xclip_jax.train.checks import Finding, attempt, fail, warning
from xclip_jax.train.clock import INPUT_BOUND
from xclip_jax.train.recovery import MOST_SKIPPED

# A run counts as stalled after this many times the usual time between lines of metrics, and after these seconds at
# least: an evaluation may come in between.
_LATE, _STALLED_SECONDS = 10, 15 * 60
_MANY_BAD = 0.5  # share of data.max_bad_fraction


def check_run(path: str, now: float | None = None) -> Iterator[Finding]:
    """Yield what is right and wrong with the run in the folder `path`.

    Args:
      path: of the run's folder.
      now: seconds since the epoch; the present by default.

    Raises:
      UserError: not a run's folder, or a damaged file in it.
    """
    run, folder = collect.read(path), RunFolder(path)
    yield from _progress(run, folder, time.time() if now is None else now)
    yield from _checkpoints(run, folder)
    heads, problem = attempt("heads", lambda: list(check_heads(weights.run_config(folder))))
    yield from heads or filter(None, [problem])
    if run.training:
        for name in run.objective.terms:
            yield from _health(run, name)
        (start, first), (end, last) = ((int(row["step"]), row["loss"]) for row in (run.training[0], run.training[-1]))
        text = f"{first:.3f} at step {start:,}, {last:.3f} at step {end:,}"
        yield Finding("loss", text, values={"first": first, "last": last})
        yield from _input(run)
        yield from _samples(run, folder)
    yield from _skipped(run, folder)
    yield from _results(run, folder)


def check_heads(config: Config) -> Iterator[Finding]:
    """Yield a warning if the cluster heads of a run have more parameters than its towers, and a price in time."""
    if not (names := cost.cluster_heads(config)):
        return
    counts, share = cost.num_parameters(config), cost.heads_share(config)
    heads = sum(counts[name] for name in names)
    towers = sum(counts.get(name, 0) for name in TOWERS)
    if heads > towers and (share is None or share > cost.HEADS_SHARE):
        text = f"the cluster heads have {heads:,} parameters, and the towers {towers:,}"
        text += f"; all heads take {share:.1%} of a step's FLOPs" if share else ""
        remedy = "lower model.cluster_head.clusters and .hidden, or set model.cluster_head.layers=0 for linear heads"
        yield warning("heads", text, remedy, cluster_heads=heads, towers=towers, flops_share=share)


def _speed(run: Record) -> float:
    """Samples a second of the last logged step; 0 where none is known."""
    return run.training[-1].get("samples_per_second", 0.0) if run.training else 0.0


def _progress(run: Record, folder: RunFolder, now: float) -> Iterator[Finding]:
    """Whether the run is complete, in progress, stalled or stopped, and how long it takes until its end."""
    config, step, writer, speed = run.config, run.steps, folder.writer(), _speed(run)
    at = f"step {step:,} of {config.steps:,}"
    left = (config.steps - step) * config.data.batch / speed if speed else None
    values = {"step": step, "steps": config.steps, "seconds_left": left}
    if run.complete:
        yield Finding("progress", f"complete at step {step:,}", values=values)
        return
    remaining = f", {format_duration(left)} left without evaluations" if left else ""
    last = folder.metrics_file if folder.metrics_file.exists() else folder.config_file
    age = max(now - last.stat().mtime, 0.0)
    text = f"{at}{remaining}; the last line of metrics is {format_duration(age)} old"
    values |= {"seconds_since_last_line": age}
    every = config.log.every or config.steps
    due = max(_LATE * every * config.data.batch / speed if speed else 0.0, _STALLED_SECONDS)
    late = age > due
    if writer and late:
        remedy = "look at its output; stopping it (Ctrl-C) saves a checkpoint, and the same command resumes"
        yield fail("progress", f"stalled? {text}, and {writer} is still at it", remedy, **values)
    elif writer:
        yield Finding("progress", f"in progress by {writer}: {text}", values=values)
    elif late or not is_remote(str(folder.path)):
        remedy = "see the skipped steps" if _diverged(run, folder) else "run the same command to resume"
        yield warning("progress", f"not running and not complete: {text}", remedy, **values)
    else:
        yield Finding("progress", text, values=values)


def _checkpoints(run: Record, folder: RunFolder) -> Iterator[Finding]:
    """Which checkpoints are whole, and what a kill would lose."""
    faults = _examine(folder)
    newest, speed = folder.latest_step() or 0, _speed(run)
    lost = max(run.steps - newest, 0)
    seconds = lost * run.config.data.batch / speed if speed else 0.0
    values = {"checkpoints": list(faults), "steps_lost": lost, "seconds_lost": seconds}
    if damaged := [f"{step} ({fault})" for step, fault in faults.items() if fault]:
        text = f"damaged in {folder.checkpoints}: {', '.join(damaged)}"
        remedy = "restore it; a run that resumes moves it aside and goes on from the newest whole one"
        yield fail("checkpoints", text, remedy, **values)
        return
    listed = ", ".join(f"step {step:,}" for step in faults)
    text = listed or (f"step {newest:,}, written meanwhile" if newest else "none yet")
    if lost > 0 and not run.complete:
        text += f"; a kill now would lose {lost:,} steps" + (f", {format_duration(seconds)}" if seconds else "")
    yield Finding("checkpoints", text, values=values)


def _examine(folder: RunFolder) -> dict[int, str]:
    """The fault of each checkpoint, "" of a whole one.

    A run in progress deletes its oldest meanwhile: what is not there any more at the end does not count.
    """
    faults = {}
    for step in folder.steps():
        try:
            faults[step] = checkpoint_files.find_fault(folder.checkpoints / str(step), step) or ""
        except FileNotFoundError as error:
            faults[step] = f"{error.filename} is missing"
    return {step: fault for step, fault in faults.items() if step in folder.steps()}


def _health(run: Record, name: str) -> Iterator[Finding]:
    """The term's own judgement of its metrics, as in the report."""
    term = run.objective.terms[name]
    rows = complete_rows(run.objective, name, run.training) if run.objective.weights[name] else []
    warnings = Warnings.collect(run, name, rows)
    for check in term.report.health(rows[-1]).checks if rows else ():
        label, history = f"{name}, {check.name}", warnings.history(check.name)
        # A complete run is judged however short it was.
        last = warnings.last(check.name) or (check.warning if check.failed and run.complete else "")
        if last:
            text = f"{last.partition(': ')[2]}{f' {history}' if warnings.steps else ''}"
            yield fail("objective", f"{label}: {text}".rstrip("."))
        elif check.name in warnings.names:
            remedy = "look at its chart, xclip-jax report RUN"
            yield warning("objective", f"{label}: not at the last step; {history}".rstrip("."), remedy)
        else:
            judged = f"no. {check.measurement}" if warnings.steps else "not judged yet."
            yield Finding("objective", f"{label}: {judged} {history}".rstrip("."))


def _input(run: Record) -> Iterator[Finding]:
    """How long the devices waited for data, over the last half of the logged steps."""
    shares = [row["data/wait_share"] for row in run.training if "data/wait_share" in row]
    if not shares:
        return
    recent = shares[len(shares) // 2 :]
    share = statistics.fmean(recent)
    text = f"the devices waited {share:.0%} of the time for data in the last {len(recent):,} logged steps"
    if share > INPUT_BOUND:
        remedy = "raise data.workers (at most the cores) or data.threads, or store smaller images"
        yield warning("input", text, remedy, wait_share=share)
    else:
        yield Finding("input", text, values={"wait_share": share})


def _samples(run: Record, folder: RunFolder) -> Iterator[Finding]:
    """The share of bad samples, by reason."""
    last = run.training[-1]
    if "data/bad_share" not in last:
        return
    share, allowed = last["data/bad_share"], run.config.data.max_bad_fraction
    values = {"bad": last.get("data/bad", 0), "bad_share": share, "allowed_share": allowed}
    reasons = collections.Counter(entry.get("reason", "") for entry in folder.read_bad_samples())
    text = f"{share:.2%} bad, allowed are {allowed:.2%}"
    if reasons:
        text += f" ({', '.join(f'{reason}: {count:,}' for reason, count in reasons.most_common(3))})"
    if share > _MANY_BAD * allowed:
        remedy = f"see {folder.bad_samples_file} and repair the data, or raise data.max_bad_fraction"
        yield warning("samples", f"{text}; more of them stop the run", remedy, **values)
    else:
        yield Finding("samples", text, values=values)


def _diverged(run: Record, folder: RunFolder) -> list[int]:
    """The skipped steps in a row at the end of a run that stopped for them; [] if it did not."""
    row: list[int] = []
    for line in folder.read_skipped_steps():  # a rewind begins a new row
        step = int(line["step"])
        row = [] if "rewound_to" in line else [*row, step] if row and step == row[-1] + 1 else [step]
    stops = len(row) > MOST_SKIPPED or len(row) == run.config.steps
    return row if row and stops and row[-1] > run.steps else []


def _skipped(run: Record, folder: RunFolder) -> Iterator[Finding]:
    """Steps that were skipped because their values were not finite."""
    steps = [int(line["step"]) for line in folder.read_skipped_steps() if "rewound_to" not in line]
    skipped, row, last = len(steps), _diverged(run, folder), max([run.steps, *steps])
    samples = f"look at their samples in {folder.skipped_steps_file}; lower optim.lr"
    if row:
        text = f"the last {len(row):,} steps, to step {row[-1]:,}, were skipped in a row, for which the run stopped"
        remedy = f"{samples}, lengthen optim.warmup or set optim.grad_clip_norm=1, under a different --config.run"
        yield fail("skipped steps", text, remedy, skipped_steps=skipped)
    elif skipped:
        text = f"{skipped:,} of {last:,} steps were skipped: their loss or gradient was not finite"
        yield warning("skipped steps", text, f"{samples} or set optim.grad_clip_norm=1", skipped_steps=skipped)


def _results(run: Record, folder: RunFolder) -> Iterator[Finding]:
    """Sets that failed, and whether results are above chance."""
    failed = (folder.read_results() or {}).get("failed") or {}
    for name, reason in failed.items():
        yield fail("results", f"{name} could not be evaluated: {reason}", "run the same command to evaluate again")
    judged = collect.verdicts(run.results)
    above = sum(verdict == collect.ABOVE for verdict in judged.values())
    text, values = f"{above} of {len(judged)} sets are above chance", {"sets": len(judged), "above_chance": above}
    if judged and not above:
        remedy = "see the objective's lines; too few steps, a wrong tokenizer, or captions of other images do this"
        yield warning("results", text, remedy, **values)
    elif judged:
        yield Finding("results", text, values=values)
