"""Shared by the benchmarks: seconds of a function, and new processes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def result_of(benchmark: str, *arguments: object) -> dict[str, Any] | None:
    """Run a benchmark in a new process; return its last line, JSON, or None after printing why it failed."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])
