"""Faults of a run that is in progress or has ended, judged by its folder, in which nothing is changed."""

import collections
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence

from etils import epath

from xclip_jax.core.console import command, format_bytes, format_duration
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import REWRITE_SECONDS
from xclip_jax.objectives.clip import Contrastive
from xclip_jax.report import collect
from xclip_jax.report.collect import Record, Warnings, complete_rows
from xclip_jax.train import checkpoint_files
from xclip_jax.train.checks import Finding, fail, warning
from xclip_jax.train.clock import INPUT_BOUND

# A run counts as stalled after this many times the usual time between lines of metrics, and after these seconds at
# least: an evaluation may come in between.
_LATE, _STALLED_SECONDS = 10, 15 * 60
_MANY_BAD = 0.5  # share of data.max_bad_fraction
_HOUR = 3600
# [ours] A spike is this many times the usual deviation of the logged steps before it above their median, and at least
# a share of the range that the loss has gone through.
_WINDOW, _DEVIATIONS, _LEAST_SHARE = 10, 6.0, 0.15
_EXPLODING, _VANISHING = 10.0, 1 / 200  # [ours] times the median gradient norm of the steps before
_SLOWER = 0.2
_FEWEST = 20  # logged steps that a judgement needs
_SHOWN = 3


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
    if run.training:
        for name in run.objective.terms:
            yield from _health(run, name)
            yield from _scale(run, name)
        yield from check_loss(run)
        yield from check_gradients(run)
        yield from check_speed(run)
        yield from _input(run)
        yield from _bad_samples(run, folder)
        yield from _skipped(run, folder)
    yield from _results(run, folder)


def _speed(run: Record) -> float:
    """Samples a second of the last logged step; 0 where none is known."""
    return run.training[-1].get("samples_per_second", 0.0) if run.training else 0.0


def _progress(run: Record, folder: RunFolder, now: float) -> Iterator[Finding]:
    """Whether the run is complete, in progress, stalled or stopped, and how long it takes until its end."""
    config, step, writer, speed = run.config, run.steps, folder.writer(), _speed(run)
    at = f"step {step:,} of {config.steps:,}"
    left = (config.steps - step) * config.data.batch / speed if speed else None
    values = {"step": step, "steps": config.steps, "seconds_left": left}
    if run.complete and step >= config.steps:
        yield Finding("progress", f"complete at step {step:,}", values=values)
        return
    remaining = f", {format_duration(left)} left without evaluations" if left else ""
    last = folder.metrics_file if folder.metrics_file.exists() else folder.config_file
    age = max(now - last.stat().mtime, 0.0)
    text = f"{at}{remaining}; the last line of metrics is {format_duration(age)} old"
    values |= {"seconds_since_last_line": age}
    every = config.log.every or config.steps
    due = max(_LATE * every * config.data.batch / speed if speed else 0.0, _STALLED_SECONDS, _LATE * REWRITE_SECONDS)
    late = age > due
    if writer and late:
        remedy = (
            "look at its output and its machine; stopping it (Ctrl-C) saves a checkpoint, and the same command resumes"
        )
        yield fail("progress", f"stalled? {text}, and {writer} is still at it", remedy, **values)
    elif writer:
        yield Finding("progress", f"in progress by {writer}: {text}", values=values)
    elif late or not str(folder.path).count("://"):
        yield warning("progress", f"not running and not complete: {text}", "run the same command to resume", **values)
    else:
        yield Finding("progress", text, values=values)


def _checkpoints(run: Record, folder: RunFolder) -> Iterator[Finding]:
    """Which checkpoints are whole, and what a kill would lose."""
    config, every = run.config, run.config.checkpoint.every
    sizes, faults = _examine(folder)
    newest = folder.latest_step() or 0
    lost = max(run.steps - newest, 0)
    speed = _speed(run)
    seconds = lost * config.data.batch / speed if speed else 0.0
    values = {"checkpoints": sizes, "steps_lost": lost, "seconds_lost": seconds}
    if damaged := [f"{step} ({fault})" for step, fault in faults.items()]:
        text = f"damaged in {folder.checkpoints}: {', '.join(damaged)}"
        remedy = "restore it; a run that resumes moves it aside and goes on from the newest whole one"
        yield fail("checkpoints", text, remedy, **values)
        return
    listed = ", ".join(f"step {step:,} of {format_bytes(size)}" for step, size in sizes.items())
    text = listed or (f"step {newest:,}, written meanwhile" if newest else "none yet")
    if lost > 0 and not run.complete:
        text += f"; a kill now would lose {lost:,} steps" + (f", {format_duration(seconds)}" if seconds else "")
    # The second checkpoint is started when the first is on disk.
    if (run.complete and not sizes) or (every and lost > 2 * every):
        remedy = f"see whether the disk of {folder.checkpoints} is full or a checkpoint was deleted"
        yield fail("checkpoints", f"{text}; checkpoint.every={every} should have left a later one", remedy, **values)
    elif seconds > _HOUR and not run.complete:
        remedy = f"set checkpoint.every to {max(int(lost * _HOUR / 2 / seconds), 1):,} when the run resumes"
        yield warning("checkpoints", text, remedy, **values)
    else:
        yield Finding("checkpoints", text, values=values)


def _examine(folder: RunFolder) -> tuple[dict[int, int], dict[int, str]]:
    """Size of each checkpoint, and the faults of those that are damaged.

    A run in progress deletes its oldest meanwhile: what is not there any more at the end does not count.
    """
    sizes, faults = {}, {}
    for step in folder.steps():
        path = folder.checkpoints / str(step)
        try:
            sizes[step] = _bytes(path)
            fault = checkpoint_files.find_fault(path, step)
        except FileNotFoundError as error:
            fault = f"{error.filename} is missing"
        if fault:
            faults[step] = fault
    for gone in {*sizes, *faults} - {*folder.steps()}:
        sizes.pop(gone, None)
        faults.pop(gone, None)
    return sizes, faults


def _bytes(path: epath.Path) -> int:
    """Bytes of all files below a folder, which may be in a bucket."""
    return sum(_bytes(item) if item.is_dir() else item.stat().length for item in path.iterdir())


def _health(run: Record, name: str) -> Iterator[Finding]:
    """The term's own judgement of its metrics, as in the report."""
    term = run.objective.terms[name]
    if not run.objective.weights[name]:
        return
    rows = complete_rows(run.objective, name, run.training)
    warnings = Warnings.collect(run, name, rows)
    for check in term.report.health(rows[-1]).checks if rows else ():
        # A complete run is judged however short it was.
        last = warnings.last(check.name) or (check.warning if check.failed and run.complete else "")
        text, history = last.partition(": ")[2], warnings.history(check.name)
        label = f"{name}, {check.name}"
        if check.impossible:
            continue
        if last:
            yield fail("objective", f"{label}: {text}{f' {history}' if warnings.steps else ''}".rstrip("."))
        elif check.name in warnings.names:
            now = f"not at the last step; {history}"
            yield warning("objective", f"{label}: {now.rstrip('.')}", f"look at its chart, {command('report')} RUN")
        else:
            judged = "no" if warnings.steps else "not judged yet"
            sentences = " ".join(filter(None, (f"{judged}.", check.measured, history)))
            yield Finding("objective", f"{label}: {sentences}".rstrip("."))


def _scale(run: Record, name: str) -> Iterator[Finding]:
    """Whether the logit scale is at its bound early: it ends there in long runs on large data."""
    term = run.objective.terms[name]
    if not isinstance(term, Contrastive) or not run.objective.weights[name]:
        return
    points = [(row["step"], value) for row in run.training if (value := row.get(f"{name}/scale")) is not None]
    if not points:
        return
    scale, bound = points[-1][1], term.max_scale
    if bound == math.inf:
        yield Finding("logit scale", f"{name}: {scale:.1f}, which has no bound", values={"scale": scale})
        return
    values = {"scale": scale, "bound": bound}
    first = next((step for step, value in points if value > 0.999 * bound), None)
    if first is None or scale < 0.999 * bound:
        yield Finding("logit scale", f"{name}: {scale:.1f}, below its bound of {bound:g}", values=values)
    elif 2 * first > run.config.steps:
        yield Finding("logit scale", f"{name}: at its bound of {bound:g} since step {first:,}", values=values)
    else:
        text = f"{name}: at its bound of {bound:g} since step {first:,}, in the first half of the run: batches are "
        remedy = "lower optim.lr, raise data.batch or add data, and look for pairs that the model knows by heart"
        yield warning("logit scale", f"{text}too easy to tell apart, or the rate is too high", remedy, **values)


def _input(run: Record) -> Iterator[Finding]:
    """How long the devices waited for data, over the last half of the logged steps."""
    shares = [row["data/wait_share"] for row in run.training if "data/wait_share" in row]
    if not shares:
        return
    recent = shares[len(shares) // 2 :]
    share = statistics.fmean(recent)
    text = f"the devices waited {share:.0%} of the time for data in the last {len(recent):,} logged steps"
    values = {"wait_share": share}
    if share > INPUT_BOUND:
        remedy = (
            "raise data.workers (at most the cores) or data.threads, store smaller images, or read from a faster disk"
        )
        yield warning("input", text, remedy, **values)
    else:
        yield Finding("input", text, values=values)


def _skipped(run: Record, folder: RunFolder) -> Iterator[Finding]:
    """Steps that were skipped because their values were not finite, or spikes."""
    skipped, steps = int(run.training[-1].get("skipped_steps", 0)), run.training[-1]["step"]
    values = {"skipped_steps": skipped}
    text = f"{skipped:,} of {steps:,} steps were skipped"
    if not skipped:
        yield Finding("skipped steps", "none", values=values)
    else:
        remedy = f"look at their samples in {folder.skipped_steps_file}; lower optim.lr or set optim.grad_clip_norm=1"
        yield warning("skipped steps", f"{text}: their loss or gradient was not finite, or a spike", remedy, **values)


def _bad_samples(run: Record, folder: RunFolder) -> Iterator[Finding]:
    last = run.training[-1]
    if "data/bad_share" not in last:
        return
    share, allowed = last["data/bad_share"], run.config.data.max_bad_fraction
    values = {"bad": last.get("data/bad", 0), "bad_share": share, "allowed_share": allowed}
    reasons = collections.Counter(entry.get("reason", "") for entry in folder.read_bad_samples())
    text = f"{share:.2%} bad, allowed are {allowed:.2%}"
    if reasons:
        text += f" ({', '.join(f'{reason}: {count:,}' for reason, count in reasons.most_common(3))})"
    remedy = f"see {folder.bad_samples_file} and repair the data, or raise data.max_bad_fraction"
    if share > _MANY_BAD * allowed:
        yield warning("samples", f"{text}; more of them stop the run", remedy, **values)
    else:
        yield Finding("samples", text, values=values)


def _results(run: Record, folder: RunFolder) -> Iterator[Finding]:
    """Sets that failed, and whether results are above chance."""
    failed = (folder.read_results() or {}).get("failed") or {}
    for name, reason in failed.items():
        yield fail("results", f"{name} could not be evaluated: {reason}", "run the same command to evaluate again")
    judged = collect.verdicts(run.results)
    if not judged:
        return
    above = [name for (name, _), verdict in judged.items() if verdict == "above chance"]
    when = "of the last evaluation"
    values = {"sets": len(judged), "above_chance": len(above)}
    if above:
        yield Finding("results", f"{len(above)} of {len(judged)} sets {when} are above chance", values=values)
    else:
        names = ", ".join(sorted({name for name, _ in judged}))
        remedy = "see the objective's lines; too few steps, a wrong tokenizer, or captions of other images do this"
        yield warning("results", f"no set {when} is above chance ({names})", remedy, **values)


def _points(run: Record, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), row[name]) for row in run.training if name in row]


def spikes(values: Sequence[float]) -> list[int]:
    """Return the indices of values that stand out above the ten before them."""
    if len(values) <= _WINDOW:
        return []
    medians = [statistics.median(values[i : i + _WINDOW]) for i in range(len(values) - _WINDOW + 1)]
    least = _LEAST_SHARE * (max(medians) - min(medians))
    indices = []
    for i in range(_WINDOW, len(values)):
        window = values[i - _WINDOW : i]
        middle = statistics.median(window)
        deviation = 1.4826 * statistics.median(abs(x - middle) for x in window)  # of a normal distribution
        if values[i] - middle > max(_DEVIATIONS * deviation, least) > 0:
            indices.append(i)
    return indices


def check_loss(run: Record) -> Iterator[Finding]:
    """Yield the loss, and the steps at which it jumps."""
    points = _points(run, "loss")
    (start, first), (end, last) = points[0], points[-1]
    text = f"{first:.3f} at step {start:,}, {last:.3f} at step {end:,}"
    jumps = [points[i] for i in spikes([value for _, value in points])]
    values = {"first": first, "last": last, "spikes": [step for step, _ in jumps]}
    if not jumps:
        yield Finding("loss", text, values=values)
        return
    listed = ", ".join(f"{value:.3f} at step {step:,}" for step, value in jumps[-_SHOWN:])
    text += f"; {len(jumps)} spike{'s' if len(jumps) > 1 else ''} among the logged steps, the last {listed}"
    remedy = "set optim.grad_clip_norm=1, lower optim.lr or optim.b2 (0.95), under a different --config.run"
    yield warning("loss", text, remedy, **values)


def check_gradients(run: Record) -> Iterator[Finding]:
    """Yield the norm of the gradient of the last tenth of the logged steps against those before."""
    norms = [value for _, value in _points(run, "grad_norm")]
    if not norms:
        return
    recent = max(len(norms) // 10, 1)
    last = statistics.median(norms[-recent:])
    values = {"grad_norm": last}
    if len(norms) < _FEWEST:
        yield Finding("gradient", f"norm {last:.3g}; too few logged steps to judge it", values=values)
        return
    before = statistics.median(norms[:-recent])
    text, values = (
        f"norm {last:.3g}, and {before:.3g} before the last {recent:,} logged steps",
        values | {"before": before},
    )
    if last > _EXPLODING * before:
        remedy = "set optim.grad_clip_norm=1, or lower optim.lr"
        yield warning("gradient", f"{text}: it explodes", remedy, **values)
    elif last < _VANISHING * max(before, max(norms[:recent])):
        remedy = (
            "see the objective's lines: nothing is learned from it any more; lengthen optim.warmup or lower optim.lr"
        )
        yield warning("gradient", f"{text}, {max(norms[:recent]):.3g} at the start: it vanishes", remedy, **values)
    else:
        yield Finding("gradient", text, values=values)


def _segments(points: Sequence[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    """Points of each process: the speed is 0 at its first step, which compiles."""
    segments: list[list[tuple[int, float]]] = []
    for point in points:
        if not segments or not point[1] or point[0] <= segments[-1][-1][0]:
            segments.append([])
        segments[-1].append(point)
    return [segment for segment in segments if segment]


def rates(points: Sequence[tuple[int, float]], batch: int) -> list[float]:
    """Samples a second between logged steps, from (step, mean speed since the first step) of one process."""
    (first, _), *rest = points
    times = [(step, (step - first) * batch / speed) for step, speed in rest if speed > 0]
    return [
        (b - a) * batch / (after - before) for (a, before), (b, after) in itertools.pairwise(times) if after > before
    ]


def check_speed(run: Record) -> Iterator[Finding]:
    """Yield the speed of the present process, and whether it falls: its last quarter against its second one."""
    points = _points(run, "samples_per_second")
    if not points:
        return
    between = rates(_segments(points)[-1], run.config.data.batch)
    if len(between) < _FEWEST:
        if points[-1][1]:
            yield Finding("speed", f"{points[-1][1]:,.0f} samples/s", values={"samples_per_second": points[-1][1]})
        return
    quarter = len(between) // 4
    early, late = statistics.median(between[quarter : 2 * quarter]), statistics.median(between[-quarter:])
    values = {"samples_per_second": late, "before": early}
    text = f"{late:,.0f} samples/s in the last {quarter:,} logged steps"
    if late < (1 - _SLOWER) * early:
        waits = [row.get("data/wait_share", 0.0) for row in run.training[-quarter:]]
        cause = (
            "reading has become slower, see input"
            if statistics.fmean(waits) > _SLOWER / 2
            else "look for other processes, a hot device, or swapped memory on its machine"
        )
        yield warning("speed", f"{text}, {1 - late / early:.0%} less than the {early:,.0f} before", cause, **values)
    else:
        yield Finding("speed", f"{text}, {early:,.0f} before", values=values)
