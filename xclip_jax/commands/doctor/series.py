"""What a run's metrics show over time: spikes of the loss, the norm of the gradient, the speed."""

import itertools
import statistics
from collections.abc import Iterator, Sequence

from xclip_jax.commands.doctor.finding import Finding, warning
from xclip_jax.report.collect import Record

# [ours] A spike is this many times the usual deviation of the logged steps before it above their median, and at least
# a share of the range that the loss has gone through.
_WINDOW, _DEVIATIONS, _LEAST_SHARE = 10, 6.0, 0.15
# [ours] Of the median norm of the steps before.
_EXPLODING, _VANISHING = 10.0, 1 / 200
_SLOWER = 0.2
_FEWEST = 20  # logged steps that a judgement needs
_SHOWN = 3


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
