"""Runs a declared study and writes its page: python -m studies.

    python -m studies --dry-run              the matrix, with what is done and the hours that are left
    python -m studies                        runs what is missing, in the order of worth, and writes the page
    python -m studies --only core --max-hours 8
    python -m studies --page                 docs/study.md and its charts, from the records
    python -m studies --study cc12m --collect RUN ...   records of runs that were made elsewhere
    python -m studies duel --list            the duel of two teams at equal cost, which has a command of its own
    python -m studies photographs --list     photographs with loose titles, which have one too

Each finished run is a line of studies/icons/runs.jsonl, which is recognised by its config; commit that file. After a
kill, or in another checkout that has the file, the same command goes on. Recipes are tuned on validation sets; test
sets are evaluated once, at the end of a run.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from studies import page, records
from studies.cc12m import study as cc12m
from studies.declaration import DEFAULT, SECTIONS
from studies.duel import command as duel
from studies.icons import study as icons
from studies.matrix import Matrix, Snapshot, overview
from studies.photographs import command as photographs
from studies.runner import ROOT, Runner, collect
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import Parser, UserError, exit_with_message
from xclip_jax.core.fields import nearest
from xclip_jax.processes.interrupt import EXIT_RESUMABLE

STUDIES = {"icons": icons, "cc12m": cc12m}  # their function `study` makes the declaration


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m studies", description=__doc__)
    parser.add_argument("--study", default=DEFAULT, choices=STUDIES, help="which (default: %(default)s)")
    parser.add_argument("--recipe", default="", help="its recipe with other arguments, as FILE.py:root=/my/data")
    parser.add_argument("--only", default="", help=f"sections ({', '.join(SECTIONS)}) or arms, joined by commas")
    parser.add_argument("--max-hours", type=float, help="save and stop what is running after this time")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time; their seconds say so")
    parser.add_argument("--dry-run", action="store_true", help="print the matrix and run nothing")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    parser.add_argument("--collect", nargs="+", metavar="RUN", help="record the finished runs in these folders")
    parser.add_argument("--diverged", default="", metavar="WHY", help="of --collect: why runs ended without results")
    parser.add_argument("--allow-dirty", action="store_true", help="run code that is not committed; records say so")
    parser.add_argument("--commit", default="", help="commit of the code, where it is not in a git checkout")
    parser.add_argument("--keep", action="store_true", help="keep the folders of finished runs")
    parser.add_argument(
        "--docs",
        default="",
        help="folder of study.md, with a runs.jsonl of its own; by default the study's own pages",
    )
    parser.add_argument("--scratch", default=str(ROOT / "runs" / "study"), help="folder of runs in progress")
    return parser.parse_args(argv)


def _runner(matrix: Matrix, runs: pathlib.Path, only: Sequence[str], flags: argparse.Namespace) -> Runner:
    options = {"max_hours": flags.max_hours, "workers": flags.workers, "keep": flags.keep, "commit": flags.commit}
    return Runner(matrix, runs, pathlib.Path(flags.scratch), only=only, allow_dirty=flags.allow_dirty, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    words = sys.argv[1:] if argv is None else list(argv)
    logging.set_verbosity(logging.ERROR)
    if words[:1] in (["duel"], ["photographs"]):
        with exit_with_message():
            {"duel": duel, "photographs": photographs}[words[0]].main(words[1:])
        return
    flags = _arguments(words)
    with exit_with_message():
        make = STUDIES[flags.study].study
        matrix = Matrix(make(flags.recipe) if flags.recipe else make(), load_config)
        study = matrix.study
        home = ROOT / "studies" / study.name
        docs = pathlib.Path(flags.docs) if flags.docs else ROOT / "docs" if study.name == DEFAULT else home
        runs = (docs / "study" if flags.docs else home) / "runs.jsonl"
        only = tuple(filter(None, flags.only.split(",")))
        known = [*SECTIONS, *(arm.name for arm in study.arms)]
        if unknown := [name for name in only if name not in known]:
            raise UserError(f"--only {unknown[0]!r} is unknown; did you mean {nearest(unknown[0], known)!r}?")
        if flags.workers < 1:
            raise UserError(f"--workers is {flags.workers}; expected at least 1.")
        if flags.dry_run:
            print(overview(Snapshot(matrix, records.read_all(runs)), only))
            return
        if study.recipe and study.name == DEFAULT and not flags.docs:
            raise UserError(
                f"the pages in {docs} and the README show the study's own recipe, not "
                f"--recipe {study.recipe}; pass --docs FOLDER for others."
            )
        failed, complete, work = None, True, None
        if not flags.collect and not flags.page:
            work = _runner(matrix, runs, only, flags)
            work.check()
        try:
            if flags.collect:
                options = {"commit": flags.commit, "diverged": flags.diverged, "allow_dirty": flags.allow_dirty}
                for name in collect(matrix, runs, flags.collect, **options):
                    print(name)
            elif work:
                complete = work.run()
        except UserError as error:  # the page has what is finished
            failed = error
        snapshot, readme = Snapshot(matrix, records.read_all(runs)), docs.parent / "README.md"
        print(f"page: {page.write(docs, snapshot)}")
        if study.name == DEFAULT and not study.recipe and readme.exists():
            page.write_finding(readme, snapshot)
        if failed:
            raise failed
        if not complete:
            sys.exit(EXIT_RESUMABLE)


if __name__ == "__main__":
    main()
