"""Write the report of a run, one self-contained HTML page: RUN/report.html.

    python -m xclip_jax.report RUN
    python -m xclip_jax.report RUN --sets imagenet_v2,coco_retrieval --data-dir /data/tfds

A run in progress has curves, and examples as soon as it has a checkpoint. Where training occupies the accelerators, set
JAX_PLATFORMS=cpu.
"""

import argparse
from collections.abc import Sequence

from absl import logging
from etils import epath

from xclip_jax.console import log0
from xclip_jax.errors import Parser, UserError, exit_with_message
from xclip_jax.evaluators import registry
from xclip_jax.report import html, record
from xclip_jax.report.examples import Examples
from xclip_jax.run_folder import RunFolder
from xclip_jax.storage import is_remote
from xclip_jax.train.encoder import make_encoder
from xclip_jax.train.weights import load


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m xclip_jax.report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--sets", default="", help="evaluation sets to show, separated by commas; by default the run's")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the newest by default")
    parser.add_argument("--data-dir", default="", help="root of the data sets")
    parser.add_argument("--seed", type=int, default=0, help="of the examples that are shown")
    parser.add_argument("--output", default="", help="file of the page, RUN/report.html by default")
    return parser.parse_args(argv)


def make(flags: argparse.Namespace) -> epath.Path:
    """Write the page, without examples where there is no checkpoint yet; return its path."""
    run = record.read(flags.run)
    path = epath.Path(flags.output or RunFolder(run.folder).report_file)
    _check_writable(path)
    specs = tuple(filter(None, map(str.strip, flags.sets.split(","))))
    for spec in specs:
        registry.check(spec)
    try:
        _, experiment, variables, _ = load(flags.run, flags.step)
    except UserError as error:
        if flags.step is not None:
            raise
        path.write_text(html.render(run, Examples(flags.seed, missing=[str(error)])))
        return path
    html.make(
        flags.run,
        experiment,
        make_encoder(experiment),
        variables,
        specs or (*experiment.config.eval.final_sets, *experiment.config.eval.sets),
        data_dir=flags.data_dir,
        output=path,
        seed=flags.seed,
    )
    return path


def _check_writable(path: epath.Path) -> None:
    """Raise `UserError` where `path` cannot be written, before the predictions, which take a while."""
    if is_remote(str(path)):
        return
    if path.is_dir():
        raise UserError(f"--output {str(path)!r} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise UserError(f"--output {str(path)!r}: folder {str(path.parent)!r} does not exist; create it first.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        log0(f"report: {make(_arguments(argv))}")


if __name__ == "__main__":
    main()
