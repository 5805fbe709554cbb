"""Provokes every fault that a run is promised to survive, and prints what was expected and what came.

    python -m tests.torture.faults                    all of them, the slow ones too
    python -m tests.torture.faults --only checkpoints

The tables of docs/reliability.md name the tests of each promise; this command runs them. The last line is "N of M
promises hold"; status 1 if not all do.
"""

import argparse
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "reliability.md"


class Promise(NamedTuple):
    """A row of the page: the heading above it, the fault, the expected outcome, and names of tests for pytest."""

    area: str
    fault: str
    expected: str
    tests: list[str]


def promises() -> list[Promise]:
    """Return the rows of the page."""
    area, rows = "", []
    for line in PAGE.read_text().splitlines():
        if line.startswith("### "):
            area = line.removeprefix("### ").lower()
        elif match := re.fullmatch(r"\| (.+) \| (.+) \| (`.+::.+`) \|", line):
            names = [re.fullmatch(r"`(?:(.+)/)?(\w+)::(test_\w+)`", name) for name in match[3].split("<br>")]
            tests = [f"tests/{name[1]}/test_{name[2]}.py::{name[3]}" for name in names]
            rows.append(Promise(area, match[1], match[2], tests))
    return rows


def run(promise: Promise) -> tuple[bool, str]:
    """Run the tests of a promise; return whether it holds, and the last line of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "--tb=line", *promise.tests]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (result.stdout + result.stderr).strip().splitlines()[-1]
    return result.returncode == 0 and "passed" in last, last


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    areas = list(dict.fromkeys(promise.area for promise in promises()))
    parser.add_argument("--only", choices=areas, help="one area")
    only = parser.parse_args().only
    chosen = [promise for promise in promises() if only in (None, promise.area)]
    held = 0
    for promise in chosen:
        print(f"{promise.area}: {promise.fault}\n  expected: {promise.expected}", flush=True)
        holds, came = run(promise)
        held += holds
        print(f"  came:     {'as expected' if holds else 'NOT SO'} ({came})", flush=True)
    print(f"{held} of {len(chosen)} promises hold")
    sys.exit(0 if held == len(chosen) else 1)


if __name__ == "__main__":
    main()
