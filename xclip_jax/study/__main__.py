"""Runs a declared study and writes its page: python -m xclip_jax.study.

    python -m xclip_jax.study --dry-run              the matrix, with what is done and the hours that are left
    python -m xclip_jax.study                        runs what is missing, in the order of worth, and writes the page
    python -m xclip_jax.study --only core --max-hours 8
    python -m xclip_jax.study --page                 docs/study.md and its charts, from the run files alone
    python -m xclip_jax.study --study cc12m --collect RUN ...   run files of runs that were made elsewhere

Each finished run is a file in docs/study/runs, which is recognised by its config; commit them. After a kill, or in
another checkout that has the run files, the same command goes on. Recipes are tuned on validation sets; test sets are
evaluated once, at the end of a run.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from xclip_jax.config.fields import nearest
from xclip_jax.config.load import load_config
from xclip_jax.errors import Parser, UserError, exit_with_message
from xclip_jax.study import cc12m, icons, page, records, schedule
from xclip_jax.study.collect import collect
from xclip_jax.study.declaration import DEFAULT, SECTIONS
from xclip_jax.study.matrix import Matrix, Snapshot
from xclip_jax.study.runner import HOME, Runner
from xclip_jax.train.interrupt import EXIT_RESUMABLE

STUDIES = {"icons": icons, "cc12m": cc12m}  # their function `study` makes the declaration


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m xclip_jax.study", description=__doc__)
    parser.add_argument("--study", default=DEFAULT, choices=STUDIES, help="which (default: %(default)s)")
    parser.add_argument("--recipe", default="", help="its recipe with other arguments, as study_cc12m:root=/my/data")
    parser.add_argument("--only", default="", help=f"sections ({', '.join(SECTIONS)}) or arms, joined by commas")
    parser.add_argument("--max-hours", type=float, help="save and stop what is running after this time")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time; their seconds say so")
    parser.add_argument("--dry-run", action="store_true", help="print the matrix and run nothing")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    parser.add_argument("--collect", nargs="+", metavar="RUN", help="write run files of these finished runs' folders")
    parser.add_argument("--diverged", default="", metavar="WHY", help="of --collect: why runs ended without results")
    parser.add_argument("--allow-dirty", action="store_true", help="run code that is not committed; run files say so")
    parser.add_argument("--commit", default="", help="commit of the code, where it is not in a git checkout")
    parser.add_argument("--keep", action="store_true", help="keep the folders of finished runs")
    parser.add_argument("--docs", default=str(HOME / "docs"), help="folder of the page, study.md, and of study/runs")
    parser.add_argument("--scratch", default=str(HOME / "runs" / "study"), help="folder of runs in progress")
    return parser.parse_args(argv)


def _runner(matrix: Matrix, runs: pathlib.Path, only: Sequence[str], flags: argparse.Namespace) -> Runner:
    options = {"max_hours": flags.max_hours, "workers": flags.workers, "keep": flags.keep, "commit": flags.commit}
    return Runner(matrix, runs, pathlib.Path(flags.scratch), only=only, allow_dirty=flags.allow_dirty, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _arguments(argv)
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        make, docs = STUDIES[flags.study].study, pathlib.Path(flags.docs)
        matrix = Matrix(make(flags.recipe) if flags.recipe else make(), load_config)
        study = matrix.study
        runs, only = docs / study.page / "runs", tuple(filter(None, flags.only.split(",")))
        known = [*SECTIONS, *(arm.name for arm in study.arms)]
        if unknown := [name for name in only if name not in known]:
            raise UserError(f"--only {unknown[0]!r} is unknown; did you mean {nearest(unknown[0], known)!r}?")
        if flags.workers < 1:
            raise UserError(f"--workers is {flags.workers}; expected at least 1.")
        if flags.dry_run:
            print(schedule.table(matrix, Snapshot(matrix, records.read_all(runs)), only))
            return
        if study.recipe and study.name == DEFAULT and docs.resolve() == (HOME / "docs").resolve():
            raise UserError(
                f"the pages in {docs} and the README's finding are of the study's own recipe, not of "
                f"--recipe {study.recipe}; pass --docs FOLDER for others."
            )
        failed, complete, work = None, True, None
        if not flags.collect and not flags.page:
            work = _runner(matrix, runs, only, flags)
            work.check()
        try:
            if flags.collect:
                options = {"commit": flags.commit, "diverged": flags.diverged, "allow_dirty": flags.allow_dirty}
                for path in collect(matrix, runs, flags.collect, **options):
                    print(path)
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
