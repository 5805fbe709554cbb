"""A signal at every second of a run's start, each in a new process with an empty compilation cache.

    JAX_PLATFORMS=cpu python -m tests.torture.signals                  60 processes, about 20 minutes on two cores
    JAX_PLATFORMS=cpu python -m tests.torture.signals --seconds 0.5 8 16

Prints for each signal what the run was doing by its last line, the exit status, the step of the checkpoint that it
left, and the seconds from the signal to its end. Status 1 if one ended in any other way than docs/train.md says.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from xclip_jax.core.errors import EXIT_INTERRUPTED, EXIT_RESUMABLE
from xclip_jax.core.run_folder import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS = tuple(0.5 + second for second in range(30))  # the interpreter itself starts in the first half second
# Statuses of a process that ends before the run handles signals.
_EARLY = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: 128 + signal.SIGTERM}
_LIMIT = 120  # seconds in which a process has to end


@dataclasses.dataclass(frozen=True)
class End:
    """How a run ended after a signal.

    Attributes:
      second: when the signal came, after the start.
      number: the signal.
      phase: what the run was doing.
      status: as a shell reports it; None where the run went on.
      saved: step of its checkpoint.
      took: seconds from the signal to the end.
    """

    second: float
    number: signal.Signals
    phase: str
    status: int | None
    saved: int | None
    took: float

    @property
    def right(self) -> bool:
        """Whether it is what docs/train.md says."""
        if self.phase == "training":
            return self.status == EXIT_RESUMABLE and self.saved is not None
        return self.status in (EXIT_RESUMABLE, _EARLY[self.number])

    def row(self) -> str:
        """Return the line of the table."""
        cells = (f"{self.second:g}", self.number.name, self.phase, self.status, self.saved, f"{self.took:.1f}")
        return _row(*("-" if cell is None else str(cell) for cell in cells)) + ("" if self.right else "  WRONG")


def _row(second: str, name: str, phase: str, status: str, saved: str, took: str) -> str:
    return f"{second:>6}  {name:<7}  {phase:<11}  {status:>6}  {saved:>5}  {took:>10}"


HEADER = _row("second", "signal", "phase", "status", "saved", "ends after")


def make_pairs(folder: pathlib.Path) -> pathlib.Path:
    """Write a few images with captions."""
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (200, 24, 24, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture {i}")
    return folder


def _phase(output: str) -> str:
    """What a run is doing whose output is `output` so far."""
    marks = {"\nstep ": "training", " parameters, ": "compilation", "small: ": "preparation"}
    return next((phase for mark, phase in marks.items() if mark in f"\n{output}"), "imports")


def meet(pairs: pathlib.Path, folder: pathlib.Path, second: float, number: signal.Signals) -> End:
    """Start a run in `folder`, which is made, send it a signal after `second` seconds, and return how it ended."""
    folder.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    env |= {"XCLIP_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    run, log = folder / "run", folder / "log"
    config = [f"small:pairs={pairs},epochs=10000,device=cpu", f"--config.run={run}", "--config.log.every=1"]
    with log.open("w") as file:
        command = [sys.executable, "-m", "xclip_jax.main", "--config", *config]
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    time.sleep(second)
    phase, began = _phase(log.read_text()), time.monotonic()
    process.send_signal(number)
    try:
        status = process.wait(_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        status = None
    took, saved = time.monotonic() - began, RunFolder(run).latest_step()
    return End(second, number, phase, status if status is None or status >= 0 else 128 - status, saved, took)


def table(folder: pathlib.Path, seconds: Sequence[float] = SECONDS, at_once: int = 2) -> list[End]:
    """Send each signal at each second to a run in `folder`, print the table, and return its rows."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a job in the background; processes would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    pairs, ends = make_pairs(folder / "pairs"), []
    print(HEADER, flush=True)
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        cases = [(second, number) for number in SIGNALS for second in seconds]
        for end in pool.map(lambda case: meet(pairs, folder / f"{case[1].name}-{case[0]:g}", *case), cases):
            ends.append(end)
            print(end.row(), flush=True)
    print(f"{sum(end.right for end in ends)} of {len(ends)} as documented")
    return ends


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.signals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=SECONDS, help="after the start (default: 0.5 to 29.5)"
    )
    parser.add_argument("--at-once", type=int, default=2, help="processes (default: %(default)s)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = table(pathlib.Path(folder), flags.seconds, flags.at_once)
    sys.exit(0 if all(end.right for end in ends) else 1)


if __name__ == "__main__":
    main()
