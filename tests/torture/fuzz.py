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
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

from tests.torture import fuzz_readers
from tests.torture.fuzz_readers import READERS
from xclip_jax.core.errors import UserError

# Bounds on one input: of processor time, of time, and of memory besides what all readers need.
CPU_SECONDS, SECONDS, MEMORY = 10, 300, 2 << 30
BATCH = 250  # inputs of one process
READ, REFUSED = "read", "refused"
_FORK: Any = multiprocessing.get_context("fork")


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


def _serve(name: str, seed: int, numbers: range, pipe: Any) -> None:
    """Reads inputs, and sends the outcome of each."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # ends the process, also within a library
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="xclip_fuzz_", dir=shared) as root:
        os.environ["XCLIP_CACHE"] = f"{root}/cache"
        for number in numbers:
            data = make(name, seed, number)
            with tempfile.TemporaryDirectory(dir=root) as folder:
                signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                result = outcome(name, data, pathlib.Path(folder))
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(result)


def outcomes(name: str, seed: int, numbers: range) -> list[tuple[str, str]]:
    """Return the outcomes of inputs, each process reading up to `BATCH` of them."""
    found: list[tuple[str, str]] = []
    while len(found) < len(numbers):
        ours, theirs = _FORK.Pipe(duplex=False)
        todo = numbers[len(found) : len(found) + BATCH]
        process = _FORK.Process(target=_serve, args=(name, seed, todo, theirs))
        process.start()
        theirs.close()
        came = []
        with contextlib.suppress(EOFError):
            while True:
                came.append(ours.recv())
        process.join()
        if len(came) < len(todo):
            timers = (-signal.SIGPROF, -signal.SIGALRM)
            came.append(("hang" if process.exitcode in timers else f"crash with status {process.exitcode}", ""))
        found += came
    return found


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
    names = options.only or list(READERS)
    failed = 0
    print("| reader | inputs | read | one sentence or a reason | failures |\n|---|---|---|---|---|")
    for i, name in enumerate(names):
        numbers = range(options.inputs // len(names) + (i < options.inputs % len(names)))
        results = outcomes(name, options.seed, numbers)
        counts = collections.Counter(kind for kind, _ in results)
        failures = len(results) - counts[READ] - counts[REFUSED]
        print(f"| {name} | {len(results):,} | {counts[READ]:,} | {counts[REFUSED]:,} | {failures} |", flush=True)
        for number, (kind, message) in zip(numbers, results, strict=True):
            if kind not in (READ, REFUSED):
                file = pathlib.Path(options.failures, name, f"{options.seed}-{number}")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(make(name, options.seed, number))
                print(f"{file}: {kind}: {message}")
        failed += failures
    print(f"{options.inputs} inputs, {failed} failures")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
