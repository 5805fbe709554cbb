"""Write the report of one or several runs: a self-contained HTML page.

    xclip-jax report RUN
    xclip-jax report RUN --sets imagenet_v2,coco_retrieval --data-dir /data/tfds
    xclip-jax report RUN_A RUN_B RUN_C --output comparison.html

A run in progress has curves, and examples from its first checkpoint on. While training occupies the accelerators, set
JAX_PLATFORMS=cpu.

Several runs are compared in comparison.html in the current folder: their curves, their predictions on the same images
and texts, differing config keys, and each run's paired differences to the first, with intervals, on sets evaluated by
`xclip-jax evaluate` for both. Held-out pairs, templates and class names come from the first run.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from xclip_jax.core.console import log0
from xclip_jax.core.errors import Parser, UserError, exit_with_message
from xclip_jax.core.imports import add_trust, named_by, trusting
from xclip_jax.core.outputs import check_file
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import write_whole
from xclip_jax.evaluators import registry
from xclip_jax.report import collect, page
from xclip_jax.report.collect import Record, Run
from xclip_jax.report.examples import Examples, collect_examples
from xclip_jax.train.build import make_encoder, profile_of_run
from xclip_jax.train.weights import load, run_config

_MOST_RUNS = 8  # the page has eight colours


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(prog="xclip-jax report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directory; others are compared with the first")
    parser.add_argument("--sets", default="", help="evaluation sets to show, separated by commas; by default the run's")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the newest by default")
    parser.add_argument("--data-dir", default="", help="root of the data sets")
    parser.add_argument(
        "--output", type=os.path.expanduser, default="", help="by default RUN/report.html, or comparison.html of runs"
    )
    add_trust(parser)
    flags = parser.parse_args(argv)
    with exit_with_message(), trusting(flags.trust):
        log0(f"report: {make(flags)}")


def make(flags: argparse.Namespace) -> epath.Path:
    """Write the page, without examples for runs without a checkpoint; return its path."""
    names = short_names(flags.runs)
    records = [collect.read(run) for run in flags.runs]
    several = len(records) > 1
    output = flags.output or ("comparison.html" if several else RunReader(flags.runs[0]).report_file)
    path = check_file("--output", output, page.MARK.encode())  # before the predictions
    specs = registry.expand_suites(flags.sets) if flags.sets.strip(" ,") else ()
    of_runs = [(*record.config.eval.sets_at_end, *record.config.eval.sets) for record in records]
    specs = specs or tuple(spec for spec in of_runs[0] if all(spec in own for own in of_runs))
    first = records[0].config
    profile = profile_of_run(run_config(RunReader(flags.runs[0])))  # with the run's copy of class names
    options = {"data": first.data, "data_dir": flags.data_dir, "profile": profile}
    runs = []
    for color, (name, record) in enumerate(zip(names, records, strict=True)):
        if several:
            log0(f"predictions of {name}")
        runs.append(Run(name, color, record, *_predict(flags, record, specs, options)))
    write_whole(path, page.render(runs, step=flags.step))
    return path


def short_names(folders: Sequence[str]) -> list[str]:
    """Return the shortest distinct ends of the paths; raises `UserError` for equal or too many paths."""
    parts = [folder.rstrip("/").split("/") for folder in folders]
    if len(parts) > _MOST_RUNS or len(set(map(tuple, parts))) < len(parts):
        raise UserError(f"runs {', '.join(folders)}: name at most {_MOST_RUNS} different runs.")
    depth = 1
    while len({tuple(p[-depth:]) for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _predict(
    flags: argparse.Namespace, record: Record, specs: Sequence[str], options: Mapping[str, Any]
) -> tuple[Examples, int | None, int | None]:
    """Return a run's predictions by `collect_examples`, or the reason for their absence, its size, and its step."""
    try:
        _, experiment, variables, step, _ = load(str(record.folder), flags.step)
    except UserError as error:
        if flags.step is not None:
            raise
        return Examples(missing=[str(error)]), None, None
    with named_by(RunReader(flags.runs[0]).config_file):  # sets and sources; those in --sets were imported before
        examples = collect_examples(make_encoder(experiment), variables, specs, **options)
    return examples, experiment.num_parameters, step


if __name__ == "__main__":
    main()
