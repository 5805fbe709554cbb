"""Runs the study of photographs: python -m studies photographs.

    PHOTOGRAPHS=FOLDER python -m studies photographs --list             finished runs of each arm, and decisions
    PHOTOGRAPHS=FOLDER python -m studies photographs --run --workers 2  the next missing runs, stage by stage
    PHOTOGRAPHS=FOLDER python -m studies photographs --run --only search
    python -m studies photographs --page                                docs/photographs/tables.md and charts

Finished runs are lines of studies/photographs/runs.jsonl, recognised by their configs; interrupted runs resume at their
last checkpoints. Costs of steps are measured between stages, while nothing else runs, and stored in costs.jsonl. Commit
both files.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence

from studies import cost, page, records
from studies.photographs import page as pages
from studies.photographs import spaces, stages
from studies.runner import ROOT, Runner, code_version
from xclip_jax.core.errors import Parser, UserError
from xclip_jax.processes.interrupt import EXIT_RESUMABLE

HOME = pathlib.Path(__file__).parent


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m studies photographs", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the arms and run nothing")
    what.add_argument("--run", action="store_true", help="run missing runs, stage by stage")
    what.add_argument("--page", action="store_true", help="write tables and charts, and run nothing")
    parser.add_argument("--only", default="", metavar="PREFIX", help="arms whose names begin so")
    parser.add_argument("--workers", type=int, default=1, help="simultaneous runs, each on its share of the cores")
    parser.add_argument("--max-hours", type=float, help="save and stop runs in progress after this time")
    parser.add_argument("--home", default=str(HOME), help="folder of the records")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "photographs"), help="folder of the page")
    parser.add_argument("--scratch", default=str(ROOT / "runs" / "photographs"), help="folder of runs in progress")
    return parser.parse_args(argv)


def declared(home: pathlib.Path) -> stages.Photographs:
    """Return the study as the records and costs in a folder decide it."""
    return stages.Photographs(records.read_all(home / "runs.jsonl"), cost.read(home / "costs.jsonl"))


def overview(matrix: stages.Photographs) -> str:
    """Return the text of --list: one line for each arm, and the decisions."""
    arms = matrix.study.arms
    width = max(len(arm.name) for arm in arms)
    lines = [f"{a.name:<{width}}  {len(matrix.finished(a.name))} of {len(a.seeds)}  {a.title}" for a in arms]
    lines += [f"{arm.name}: the cost of its step is not measured" for arm, _ in matrix.to_measure]
    lines.append(f"length of finals: {matrix.length or 'open'}")
    lines += [f"{team}: {matrix.chosen.get(team, 'open')}" for team in spaces.TEAMS]
    return "\n".join(lines)


def _measure(matrix: stages.Photographs, home: pathlib.Path) -> None:
    """Measure missing costs, while no run is in progress."""
    for arm, clock in matrix.to_measure:
        measured = cost.measure(matrix.config(arm, 0), matrix.config(clock, 0))
        cost.write(home / "costs.jsonl", arm.name, clock.name, code_version(), measured)
        print(
            f"cost of {arm.name}: {measured['ratio']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]", flush=True
        )


def _run(home: pathlib.Path, flags: argparse.Namespace) -> bool:
    """Run stage after stage; return whether no runnable run is left."""
    began = time.monotonic()
    while True:
        matrix = declared(home)
        names = [name for name in matrix.missing() if name.startswith(flags.only)]
        if names:
            # The records of one stage decide the next one.
            stage = names[0].partition("_")[0]
            left = None if flags.max_hours is None else max(flags.max_hours - (time.monotonic() - began) / 3600, 0)
            runner = Runner(
                matrix, home / "runs.jsonl", pathlib.Path(flags.scratch),
                only=[name for name in names if name.partition("_")[0] == stage],
                max_hours=left, workers=flags.workers,
            )  # fmt: skip
            if not runner.run():
                return False
        elif matrix.to_measure and not flags.only:
            _measure(matrix, home)
        else:
            return True


def _write_page(home: pathlib.Path, docs: pathlib.Path) -> None:
    matrix = declared(home)
    charts = pages.charts_of(matrix)
    page.write(docs / "tables.md", pages.lines(matrix, charts), charts)
    print(f"{docs / 'tables.md'}: {sum(matrix.missing().values())} runs of the declared arms are missing")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _arguments(argv)
    home = pathlib.Path(flags.home)
    if flags.workers < 1:
        raise UserError(f"--workers is {flags.workers}; expected at least 1.")
    if flags.list:
        print(overview(declared(home)))
    elif flags.page:
        _write_page(home, pathlib.Path(flags.docs))
    elif not _run(home, flags):
        sys.exit(EXIT_RESUMABLE)
