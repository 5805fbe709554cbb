"""Where the time of a training step on a CPU goes: the wall time of `benchmarks.step`'s step by part of the model.

    JAX_PLATFORMS=cpu python -m benchmarks.account                      # CLIP, texts that fill their context
    JAX_PLATFORMS=cpu python -m benchmarks.account --captions natural   # context 77, lengths as in CC12M

Takes --steps steps under JAX's profiler. Each instant goes to the operation that runs then, or in equal parts to the
operations that run at once, by the names that the compiler keeps of the source. Prints milliseconds of a step as a
Markdown table; its total is the wall time.
"""

import argparse
import collections
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence

import jax

from benchmarks import step as benchmark
from xclip_jax.parallel.mesh import batch_sharding
from xclip_jax.train import build

_THREAD = "XLAEigen"  # lines of a trace that are the threads of XLA's pool
_SOURCE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name=\"([^\"]*)\"", re.MULTILINE)
# The first pattern that is part of an operation's source name decides its row.
_ROWS = (
    ("matrix products of the MLPs", r"/mlp/(up|down)/dot_general"),
    ("GELU, biases and residuals of the MLPs", r"/mlp/"),
    ("matrix products of q, k, v and output", r"/attention/(qkv|out)/dot_general"),
    ("scores, softmax and values of attention", r"/attention/[^/]*bhn|/attention/(reduce_max|exp|sub|div|reduce_sum)"),
    ("biases and copies of q, k, v", r"/attention/"),
    ("LayerNorm", r"/norm|_norm"),
    ("residuals", r"/block_\d+/"),
    ("patches, vocabulary, pooling, projections", r"encode_(image|text)"),
)
OTHER = "loss, gradient norm, optimizer"
COLUMNS = ("image, forward", "image, backward", "text, forward", "text, backward", "neither")


def row_of(source: str) -> tuple[str, str]:
    """Row and column of an operation by its name in the source, such as
    "jit(step)/transpose(jvp(TwoTowers.encode_text))/txt/transformer/block_3/mlp/up/dot_general"."""
    tower = re.search(r"encode_(image|text)", source)
    if not tower:
        return OTHER, "neither"
    row = next(name for name, pattern in _ROWS if re.search(pattern, source))
    return row, f"{tower[1]}, {'backward' if 'transpose(' in source else 'forward'}"


def _spans(trace: pathlib.Path) -> list[tuple[float, float, str]]:
    """Beginning and end, ns, and name of each operation that a thread of XLA's pool began."""
    begins, ends = collections.defaultdict(list), collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            if _THREAD in line.name:
                for event in line.events:
                    if event.name.startswith("end: "):  # of what other threads may have gone on with
                        ends[event.name.removeprefix("end: ")].append(event.start_ns)
                    elif "hlo_op" in dict(event.stats):
                        begins[event.name].append(event.start_ns)
    return [
        (begin, end, name)
        for name, times in begins.items()
        for begin, end in zip(sorted(times), sorted(ends[name]), strict=True)
    ]


def shares(spans: Sequence[tuple[float, float, str]]) -> dict[str, float]:
    """Nanoseconds that go to each name where an instant is shared by the spans that are open then."""
    edges = sorted(
        edge for begin, end, name in spans if end > begin for edge in ((begin, 1, name), (end, 0, name))
    )  # fmt: skip
    open_now: collections.Counter[str] = collections.Counter()
    result: dict[str, float] = collections.defaultdict(float)
    before = 0.0
    for instant, begins, name in edges:
        for other, count in open_now.items():
            result[other] += (instant - before) * count / open_now.total()
        if begins:
            open_now[name] += 1
        elif open_now[name] == 1:
            del open_now[name]
        else:
            open_now[name] -= 1
        before = instant
    return dict(result)


def account(objective: str, kind: str, steps: int) -> tuple[dict[tuple[str, str], float], float]:
    """Milliseconds of a step by (row, column), and its wall time in ms under the profiler."""
    made = {}

    def build_and_keep(*arguments: object) -> build.Experiment:
        made["experiment"] = original(*arguments)
        return made["experiment"]

    original, build.build = build.build, build_and_keep
    try:
        step = benchmark.ours(objective, kind, "auto")
    finally:
        build.build = original
    experiment = made["experiment"]
    image, text = (jax.device_put(x, batch_sharding(experiment.mesh)) for x in benchmark.batch(kind))
    lowered = experiment.compiled.lower(experiment.abstract, {"image": image, "text": text})
    sources = dict(_SOURCE.findall(lowered.compile().as_text()))
    for _ in range(3):
        step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            began = time.perf_counter()
            for _ in range(steps):
                step()
            wall = 1e3 * (time.perf_counter() - began) / steps
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        times = shares(_spans(trace))
    cells: dict[tuple[str, str], float] = collections.defaultdict(float)
    for name, ns in times.items():
        cells[row_of(sources.get(name, ""))] += ns / 1e6 / steps
    return dict(cells), wall


def table(cells: dict[tuple[str, str], float], wall: float) -> str:
    """A Markdown table of the cells, its rows by their sum, and what no operation took."""
    rows = [name for name, _ in _ROWS] + [OTHER]
    sums = {row: sum(cells.get((row, column), 0.0) for column in COLUMNS) for row in rows}
    lines = [f"| ms | {' | '.join(COLUMNS)} | sum |", f"|---|{'---|' * (len(COLUMNS) + 1)}"]
    for row in sorted(rows, key=lambda name: -sums[name]):
        values = [cells.get((row, column), 0.0) for column in COLUMNS]
        lines.append(f"| {row} | {' | '.join(f'{v:.0f}' if v else '' for v in values)} | {sums[row]:.0f} |")
    lines.append(f"| no operation |{' |' * len(COLUMNS)} {wall - sum(sums.values()):.0f} |")
    return "\n".join([*lines, f"| a step |{' |' * len(COLUMNS)} {wall:.0f} |"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("clip", "xclip"), default="clip")
    parser.add_argument("--captions", choices=tuple(benchmark.CONTEXT), default="full", help="how long texts are")
    parser.add_argument("--steps", type=int, default=5)
    flags = parser.parse_args()
    print(table(*account(flags.objective, flags.captions, flags.steps)))


if __name__ == "__main__":
    main()
