"""Write the report of a run, or of several side by side: one HTML page that needs no other file.

    xclip-jax report RUN
    xclip-jax report RUN --sets imagenet_v2,coco_retrieval --data-dir /data/tfds
    xclip-jax report RUN --strip strip.png
    xclip-jax report RUN_A RUN_B RUN_C --output comparison.html

A run in progress has curves, and examples as soon as it has a checkpoint. Where training occupies the accelerators, set
JAX_PLATFORMS=cpu.

The page of several runs, comparison.html in the current folder, has their curves over one another, the same images and
texts by each, the config keys that differ, and the paired difference of each run to the first, with its interval:
of sets that `xclip-jax evaluate` has evaluated for both. Held-out and training pairs, templates and class names come
from the first run.
"""

import argparse
from collections.abc import Sequence

from absl import logging
from etils import epath

from xclip_jax.core.console import log0
from xclip_jax.core.errors import Parser, UserError, exit_with_message
from xclip_jax.core.imports import add_trust, named_by, trusting
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import is_remote
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.report import html, picture, record, several
from xclip_jax.report.examples import Examples, collect_examples
from xclip_jax.train.encoder import make_encoder, profile_of_run
from xclip_jax.train.weights import load


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="xclip-jax report", description=__doc__, hints={"checkpoint": "write RUN without --checkpoint"}
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run directory; the first is what others are compared to"
    )
    parser.add_argument("--sets", default="", help="evaluation sets to show, separated by commas; by default the run's")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the newest by default")
    parser.add_argument("--data-dir", default="", help="root of the data sets")
    parser.add_argument("--seed", type=int, default=0, help="of the examples that are shown")
    parser.add_argument("--output", default="", help="file of the page, by default RUN/report.html")
    parser.add_argument("--strip", default="", help="PNG file for a strip: four names, a search and a cluster of RUN")
    add_trust(parser)
    flags = parser.parse_args(argv)
    if flags.strip and len(flags.runs) > 1:
        parser.error("--strip shows one run; name one RUN")
    return flags


def make(flags: argparse.Namespace) -> epath.Path:
    """Write the page, without examples where there is no checkpoint yet; return its path."""
    if len(flags.runs) > 1:
        return _make_several(flags)
    run = record.read(flags.runs[0])
    path = epath.Path(flags.output or RunFolder(run.folder).report_file)
    _check_writable(path)
    specs = _specs(flags)
    try:
        _, experiment, variables, _ = load(flags.runs[0], flags.step)
    except UserError as error:
        if flags.step is not None or flags.strip:
            raise
        path.write_text(html.render(run, Examples(flags.seed, missing=[str(error)])))
        return path
    with named_by(run.folder / "config.json"):  # sets and sources; what --sets names has been imported
        examples = html.make(
            flags.runs[0],
            experiment,
            make_encoder(experiment),
            variables,
            specs or (*experiment.config.eval.final_sets, *experiment.config.eval.sets),
            data_dir=flags.data_dir,
            output=path,
            seed=flags.seed,
        )
    if flags.strip:
        picture.strip(flags.strip, examples)
        log0(f"strip: {flags.strip}")
    return path


def _specs(flags: argparse.Namespace) -> tuple[str, ...]:
    """The sets of --sets, checked."""
    specs = tuple(filter(None, map(str.strip, flags.sets.split(","))))
    for spec in specs:
        registry.check(spec)
    return specs


def _make_several(flags: argparse.Namespace) -> epath.Path:
    """Write the page of several runs; return its path."""
    names = several.short_names(flags.runs)
    records = [record.read(run) for run in flags.runs]
    path = epath.Path(flags.output or "comparison.html")
    _check_writable(path)
    of_runs = [(*run.config.eval.final_sets, *run.config.eval.sets) for run in records]
    specs = _specs(flags) or tuple(spec for spec in of_runs[0] if all(spec in own for own in of_runs))
    runs, profile = [], profile_of_run(records[0].config)
    for color, (name, run) in enumerate(zip(names, records, strict=True)):
        log0(f"predictions of {name}")
        runs.append(several.Run(name, color, run, _examples(flags, run, specs, records[0], profile)))
    path.write_text(several.render(runs, step=flags.step))
    return path


def _examples(
    flags: argparse.Namespace, run: record.Record, specs: Sequence[str], first: record.Record, profile: Profile
) -> Examples:
    """Predictions of a run's model; a sentence in their place where there is no checkpoint yet.

    Args:
      flags: of the command.
      run: whose model predicts.
      specs: evaluation sets.
      first: run that says which pairs these sets have, the same for all runs.
      profile: templates and class names, likewise.
    """
    try:
        _, experiment, variables, _ = load(str(run.folder), flags.step)
    except UserError as error:
        if flags.step is not None:
            raise
        return Examples(flags.seed, missing=[str(error)])
    with named_by(first.folder / "config.json"):
        return collect_examples(
            make_encoder(experiment),
            variables,
            specs,
            data=first.config.data,
            data_dir=flags.data_dir,
            data_seed=first.config.seed,
            pairs=not first.objective.labelled,
            seed=flags.seed,
            profile=profile,
        )


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
    flags = _arguments(argv)
    with exit_with_message(), trusting(flags.trust):
        log0(f"report: {make(flags)}")


if __name__ == "__main__":
    main()
