"""Trains CLIP, nCLIP and xCLIP on the demo's emoji with the same settings and compares their evaluations.

    pip install '.[demo]' && python -m examples.compare_objectives

Takes about ten minutes on two cores. The default of 120 steps each only shows the method; it is too short to say which
objective is better. --steps 680 is the demo's length, for which README shows results; with one seed differences of two
or three points are noise. The first run prepares the data. After an interruption the same command continues.
"""

import argparse
from collections.abc import Sequence

from xclip_jax.commands.evaluate import evaluate
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import exit_with_message
from xclip_jax.evaluators import tables
from xclip_jax.train import trainer

SUITE = "emoji/test_concepts,emoji/test_rendering,emoji/test_retrieval,emoji/test_aliases"


def main(argv: Sequence[str] | None = None) -> None:
    """The example; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--objectives", default="clip,nclip,xclip", help="the others are compared with the first")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", default=SUITE, help="sets, as in xclip-jax evaluate --suite")
    parser.add_argument("--runs", default="runs/compare", help="folder of the runs")
    options = parser.parse_args(argv)
    runs = {name: f"{options.runs}/{name}-{options.steps}" for name in options.objectives.split(",")}
    for name, run in runs.items():
        config = load_config(f"demo:objective={name},steps={options.steps}")
        config.run, config.seed, config.data.batch = run, options.seed, options.batch
        config.eval.sets, config.eval.sets_at_end, config.eval.report = (), (), False  # `evaluate` follows below
        trainer.run(config)
        evaluate(run, options.suite)
    first, *others = runs.values()
    for other in others:
        print(tables.render_comparison(tables.compare(first, other), first, other))


if __name__ == "__main__":
    with exit_with_message():
        main()
