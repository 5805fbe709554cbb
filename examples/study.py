"""Compares two recipes: several seeds of each, and the differences paired by seed with 95 % intervals.

    pip install '.[demo]' && python -m examples.study
    python -m examples.study --a demo:objective=clip --b mine.py --sets folder:test --seeds 0,1,2,3,4

Trains the recipes of --a and --b once for each seed, one run after another, and prints a Markdown table. A seed is one
order of the data and one initialisation in both recipes, so that their common luck cancels in the differences. The
default, CLIP and xCLIP on the demo's emoji for 120 steps, takes about twenty minutes on two cores; it shows the method
and is too short to say which is better. After an interruption the same command continues: finished runs are not
repeated.

Choose settings on validation sets, and evaluate test sets once, with the chosen settings.
"""

import argparse
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from xclip_jax.config.load import load_config
from xclip_jax.core.errors import UserError, exit_with_message
from xclip_jax.core.run_folder import RunReader
from xclip_jax.evaluators.results import from_json
from xclip_jax.train import trainer

LEVEL = 0.95
SETS = "emoji/test_concepts,emoji/test_rendering,emoji/test_retrieval"
Values = dict[str, float]  # {"SET METRIC": value}


def train(recipe: str, run: str, seed: int, sets: Sequence[str]) -> Values:
    """Train a run unless it is finished, and return the headline metric of each set at its end.

    Args:
      recipe: a recipe as for --config.
      run: the run's folder.
      seed: seed of the data order and of the initial parameters.
      sets: evaluation sets, instead of the recipe's.
    """
    config = load_config(recipe)
    config.run = run
    config.seed = seed
    config.eval.sets = ()
    config.eval.sets_at_end = tuple(sets)
    config.eval.every = 0
    config.eval.report = False
    trainer.run(config)  # resumes an interrupted run, and leaves a finished one as it is
    saved = RunReader(run).read_results()
    if saved is None:
        raise UserError(f"{run} has no results; run the same command again.")
    return {f"{r.set} {r.key}": r.value for r in from_json(saved["records"]) if r.headline}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of at least two values and the ends of its 95 % t-interval."""
    x = np.asarray(values)
    mean = float(x.mean())
    half = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return mean, mean - half, mean + half


def table(a: Mapping[int, Values], b: Mapping[int, Values]) -> str:
    """Return a table of the metrics of both recipes, {seed: values}, and of the differences b - a paired by seed."""
    seeds = sorted(a.keys() & b.keys())
    lines = [f"| metric | A | B | B - A, {len(seeds)} seeds [95 %] | above 0 |", "|---|---|---|---|---|"]
    for metric in a[seeds[0]]:
        left = [a[seed][metric] for seed in seeds]
        right = [b[seed][metric] for seed in seeds]
        differences = [y - x for x, y in zip(left, right, strict=True)]
        mean, low, high = interval(differences)
        above = sum(d > 0 for d in differences)
        sides = f"{np.mean(left):.1f} | {np.mean(right):.1f}"
        lines.append(f"| {metric} | {sides} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] | {above} of {len(seeds)} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--a", default="demo:objective=clip,steps=120", help="a recipe (default: %(default)s)")
    parser.add_argument("--b", default="demo:objective=xclip,steps=120", help="the other recipe (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="at least two; intervals of fewer than five are wide")
    parser.add_argument("--sets", default=SETS, help="evaluation sets, joined by commas")
    parser.add_argument("--runs", default="runs/two_recipes", help="folder of the runs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The example; see the module's docstring."""
    options = _arguments(argv)
    words = options.seeds.split(",")
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--seeds is {options.seeds!r}; expected numbers joined by commas, such as 0,1,2.")
    seeds = list(dict.fromkeys(map(int, words)))
    if len(seeds) < 2:
        raise UserError(f"--seeds {options.seeds} has one seed; an interval needs at least two.")
    results: dict[str, dict[int, Values]] = {"a": {}, "b": {}}
    for seed in seeds:  # both recipes of a seed before the next one, so that finished seeds can be compared
        for side, recipe in (("a", options.a), ("b", options.b)):
            run = f"{options.runs}/{side}-s{seed}"
            results[side][seed] = train(recipe, run, seed, options.sets.split(","))
    print(f"A: {options.a}\nB: {options.b}\n")
    print(table(results["a"], results["b"]))


if __name__ == "__main__":
    with exit_with_message():
        main()
