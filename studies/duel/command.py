"""Runs the duel: python -m studies duel.

    python -m studies duel --list                    stages, what is done, and the hours that are left
    python -m studies duel --run --workers 2         the next missing runs, stage by stage
    python -m studies duel --run --only rung1        only arms whose names begin so
    python -m studies duel --page                    docs/duel.md and its charts, from the records

A finished run is a line of studies/duel/runs.jsonl, recognised by its config; interrupted runs go on from their last
checkpoint. Costs of steps are measured between stages, when nothing else runs, and stand in costs.jsonl; what models
know of exchanged pairs stands in pairs.jsonl. Commit these files.
"""

import argparse
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from studies import records
from studies.declaration import Study
from studies.duel import cost, glyphs, page, stages, wrong
from studies.runner import ROOT, Runner, code_version
from studies.worker import DIVERGED
from xclip_jax.config.load import load_config
from xclip_jax.core import imports
from xclip_jax.core.errors import Parser, UserError
from xclip_jax.data import sources
from xclip_jax.processes.interrupt import EXIT_RESUMABLE
from xclip_jax.train import build

HOME = pathlib.Path(__file__).parent


class DuelRunner(Runner):
    """Runs the arms of a stage; those with wrong captions leave their AUC before their checkpoints are deleted."""

    def _record(self, active: Any) -> None:
        if active.run.arm.name.startswith("wrong") and not (active.folder / DIVERGED).exists():
            self._suspect(active)
        super()._record(active)

    def _suspect(self, active: Any) -> None:
        command = [sys.executable, "-m", "studies.duel.mechanism", str(active.folder), active.run.arm.name]
        done = subprocess.run([*command, str(self.runs.with_name("pairs.jsonl"))], cwd=ROOT, check=False)
        if done.returncode:
            self.keep = True
            again = " ".join([*command, str(self.runs.with_name("pairs.jsonl"))])
            print(f"{active.run.arm.name}: no AUC; folders of runs are kept from now on, then: {again}", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m studies duel", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the stages and run nothing")
    what.add_argument("--run", action="store_true", help="run what is missing, stage by stage, and write the page")
    what.add_argument("--page", action="store_true", help="write the page and run nothing")
    parser.add_argument("--only", default="", metavar="PREFIX", help="arms whose names begin so")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, each on its share of the cores")
    parser.add_argument("--max-hours", type=float, help="save and stop what is running after this time")
    parser.add_argument("--allow-dirty", action="store_true", help="run code that is not committed; records say so")
    parser.add_argument("--home", default=str(HOME), help="folder of the records")
    parser.add_argument("--docs", default="", help="folder of the page; docs, or --home where that is another")
    parser.add_argument("--scratch", default=str(ROOT / "runs" / "duel"), help="folder of runs in progress")
    return parser.parse_args(argv)


def declared(home: pathlib.Path) -> stages.Duel:
    """Return the duel as the records and costs in a folder decide it."""
    return stages.Duel(records.read_all(home / "runs.jsonl"), stages.read_costs(home / "costs.jsonl"))


def overview(duel: stages.Duel, only: str) -> str:
    """Return what --list prints: a line for each stage, and what is missing."""
    every = (*duel.progress(), glyphs.progress(duel))
    rows = [row for row in every if row[0].prefix.startswith(only) or only.startswith(row[0].prefix)]
    lines = [f"{'stage':<34}{'runs':>6}{'done':>6}{'hours left':>12}"]
    lines += [f"{stage.title:<34}{stage.runs:>6}{done:>6}{hours:>12.1f}" for stage, done, hours in rows]
    return "\n".join(
        [
            *lines,
            f"{'all':<34}{sum(hours for *_, hours in rows):>24.1f}",
            "",
            *duel.missing(only),
            *glyphs.missing(duel, only),
        ]
    )


def _measure(duel: stages.Duel, home: pathlib.Path) -> None:
    """Measure the costs that are missing, while none of its runs is in progress."""
    matrix = stages.DuelMatrix(stages.study_of(duel.arms), load_config)
    for arm, clock in duel.to_measure:
        measured = cost.measure(*(matrix.config(side, 0, {}) for side in (arm, clock)))
        cost.write(home / "costs.jsonl", arm.name, clock.name, code_version(), measured)
        text = f"{measured['ratio']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"
        print(f"cost of {arm.name} over {clock.name}: {text}", flush=True)


def _next(duel: stages.Duel, only: str) -> tuple[Study, list[str]]:
    """Return the study whose runs come next, and its arms that have some missing; the glyphs come last."""
    names = [arm.name for arm in duel.arms if arm.name.startswith(only) and duel.done(arm) < len(arm.seeds)]
    if not names and not duel.to_measure and (second := glyphs.snapshot(duel)):
        arms = [arm for arm in second.study.arms if arm.name.startswith(only)]
        return second.study, [arm.name for arm in arms if len(second.finished(arm.name)) < len(arm.seeds)]
    return stages.study_of(duel.arms), names


def _page(home: pathlib.Path, docs: pathlib.Path) -> pathlib.Path:
    return page.write(docs, declared(home), wrong.read_areas(home))


def _run(home: pathlib.Path, docs: pathlib.Path, flags: argparse.Namespace) -> bool:
    """Run stage after stage; returns whether nothing is left that can be run."""
    began = time.monotonic()
    while True:
        duel = declared(home)
        study, names = _next(duel, flags.only)
        left = None if flags.max_hours is None else max(flags.max_hours - (time.monotonic() - began) / 3600, 0)
        runner = DuelRunner(
            stages.DuelMatrix(study, load_config), home / "runs.jsonl", pathlib.Path(flags.scratch), only=names,
            max_hours=left, workers=flags.workers, allow_dirty=flags.allow_dirty,
        )  # fmt: skip
        if names or duel.to_measure:
            runner.check()
        if duel.to_measure:
            _measure(duel, home)
        elif not names:
            return True
        else:
            arm = next(arm for arm in study.arms if arm.name in names)
            with imports.trusting(True):  # built once, before workers look for it
                sources.open_sources(build.resolve(runner.matrix.config(arm, 0, {})).data)
            try:
                if not runner.run():
                    return False
            finally:
                _page(home, docs)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _arguments(argv)
    home = pathlib.Path(flags.home)
    docs = pathlib.Path(flags.docs or (ROOT / "docs" if home.resolve() == HOME else home))
    if flags.workers < 1:
        raise UserError(f"--workers is {flags.workers}; expected at least 1.")
    if flags.list:
        print(overview(declared(home), flags.only))
        return
    complete = _run(home, docs, flags) if flags.run else True
    print(f"page: {_page(home, docs)}")
    if not complete:
        sys.exit(EXIT_RESUMABLE)
