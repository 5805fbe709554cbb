"""Hostile inputs for everything that reads what others wrote: is each read, or refused with a sentence, in bounds?

    JAX_PLATFORMS=cpu python -m tests.torture.fuzz --inputs 100000 --seed 0 [--only READER ...] [--failures FOLDER]

An input is a function of the seed, the reader's name and its number, see `tests.torture.fuzz_inputs`. One of the
readers of `tests.torture.fuzz_readers` gets it, in a process with bounded memory that is killed if it takes too long.
Prints a row for each reader and `N inputs, K failures`, and leaves with 1 where there are any: exceptions
other than a sentence or a reason, hangs, crashes, more memory. Their inputs are written to FOLDER/READER/;
tests/fuzz_cases holds one for each fault that was corrected. Linux alone.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence

from tests.torture import fuzz_readers
from tests.torture.fuzz_readers import READERS
from xclip_jax.core.errors import UserError

# Bounds on one input: of processor time, of time, and of memory besides what all readers need.
CPU_SECONDS, SECONDS, MEMORY = 10, 300, 2 << 30
BATCH = 250  # inputs of one process
READ, REFUSED = "read", "refused"


@dataclasses.dataclass
class Tally:
    """What became of a reader's inputs; `failures` is (number of the input, what happened)."""

    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failures: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    peak: float = 0.0  # MiB
    slowest: float = 0.0  # s


def make(name: str, seed: int, number: int) -> bytes:
    """Input `number` of a reader."""
    reader = READERS[name]
    return reader.make(random.Random(f"{seed}/{name}/{number}"), reader.seeds())


def outcome(name: str, data: bytes, folder: pathlib.Path) -> tuple[str, str]:
    """`READ`, `REFUSED`, or the class of another exception; and its message."""
    try:
        READERS[name].read(data, folder)
    except (UserError, SystemExit) as error:
        text = str(error)
        if isinstance(error, UserError) or text.startswith("error: "):
            return (REFUSED, text[:200]) if text.strip() else ("empty message", "")
        return "SystemExit", text[:200]
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return type(error).__name__, f"{str(error)[:200]!r} in {where.filename}:{where.lineno}"
    return READ, ""


def _status(key: str) -> int:
    """A number of KiB about this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _serve(name: str, seed: int, numbers: range, pipe: int) -> None:
    """Reads inputs, and writes a line of JSON for each to `pipe`: number, outcome, message, peak memory, seconds."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # ends the process, also within a library
    bound = 1024 * _status("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="xclip_fuzz_", dir=shared) as root:
        os.environ["XCLIP_CACHE"] = f"{root}/cache"
        folder = pathlib.Path(root, "input")
        folder.mkdir()
        for number in numbers:
            data = make(name, seed, number)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            began = time.process_time()
            kind, message = outcome(name, data, folder)
            seconds = time.process_time() - began
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            fuzz_readers.empty(folder)
            line = json.dumps([number, kind, message, (_status("VmHWM") - before) / 1024, seconds])
            os.write(pipe, line.encode() + b"\n")


def _child(name: str, seed: int, numbers: range, tally: Tally) -> range:
    """Give inputs to a reader in a process; add what became of them, and return the ones that it has not come to."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            _serve(name, seed, numbers, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        lines = [json.loads(line) for line in pipe.read().splitlines() if line.endswith(b"]")]
    _, status = os.waitpid(pid, 0)
    for number, kind, message, peak, seconds in lines:
        tally.outcomes[kind] += 1
        tally.peak = max(tally.peak, peak)
        tally.slowest = max(tally.slowest, seconds)
        if kind not in (READ, REFUSED):
            tally.failures.append((number, f"{kind}: {message}"))
    left = numbers[len(lines) :]
    if left:
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        kind = "hang" if killed in (signal.SIGPROF, signal.SIGALRM) else f"crash by signal {killed}"
        tally.outcomes[kind] += 1
        tally.failures.append((left[0], kind))
    return left[1:]


def run(names: Sequence[str], inputs: int, seed: int) -> dict[str, Tally]:
    """Give each of `names` its share of `inputs`."""
    tallies = {}
    for i, name in enumerate(names):
        tallies[name] = Tally()
        count = inputs // len(names) + (i < inputs % len(names))
        for first in range(0, count, BATCH):
            numbers = range(first, min(first + BATCH, count))
            while numbers:
                numbers = _child(name, seed, numbers, tallies[name])
    return tallies


def table(tallies: dict[str, Tally]) -> Iterator[str]:
    """Yield the rows of the table."""
    titles = "reader, inputs, read, one sentence or a reason, other exceptions, hangs and crashes, peak MiB, slowest s"
    yield f"| {titles.replace(', ', ' | ')} |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, tally in tallies.items():
        counts = dict(tally.outcomes)
        total, read, refused = sum(counts.values()), counts.pop(READ, 0), counts.pop(REFUSED, 0)
        died = sum(counts.pop(kind) for kind in list(counts) if kind.startswith(("hang", "crash")))
        others = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())) or "0"
        counted = f"{total:,} | {read:,} | {refused:,} | {others} | {died}"
        yield f"| {name} | {counted} | {tally.peak:.0f} | {tally.slowest:.1f} |"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(READERS), metavar="READER", help=", ".join(READERS))
    parser.add_argument("--failures", default="fuzz_failures", help="folder for the inputs that fail (%(default)s)")
    options = parser.parse_args(arguments)
    fuzz_readers.prepare()
    tallies = run(options.only or list(READERS), options.inputs, options.seed)
    print("\n".join(table(tallies)))
    failures = [(name, number, what) for name, tally in tallies.items() for number, what in sorted(tally.failures)]
    for name, number, what in failures:
        file = pathlib.Path(options.failures, name, f"{options.seed}-{number}")
        with contextlib.suppress(FileExistsError):
            file.parent.mkdir(parents=True)
        file.write_bytes(make(name, options.seed, number))
        print(f"{file}: {what}")
    print(f"{options.inputs} inputs, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
