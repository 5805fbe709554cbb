"""Trains CLIP, nCLIP and xCLIP alike on the demo's emoji and puts their evaluations side by side.

    pip install '.[demo]' && python -m examples.compare_objectives

Takes about ten minutes on two cores: 120 steps of each, too short to say which is better, only to see how it is done.
--steps 680 is the demo's length, for which README shows results; one seed of it says little about a point or two. The
first run prepares the data. The same command again goes on where it was cut off.
"""

import argparse
from collections.abc import Sequence

from xclip_jax import evaluation
from xclip_jax.configs import demo
from xclip_jax.errors import exit_with_message
from xclip_jax.evaluators import comparison
from xclip_jax.train import trainer

SUITE = "emoji/test_concepts,emoji/test_rendering,emoji/test_retrieval,emoji/test_aliases"


def main(argv: Sequence[str] | None = None) -> None:
    """The example; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--objectives", default="clip,nclip,xclip", help="the others are held against the first")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", default=SUITE, help="sets of python -m xclip_jax.evaluate --suite")
    parser.add_argument("--runs", default="runs/compare", help="folder of the runs")
    options = parser.parse_args(argv)
    runs = {name: f"{options.runs}/{name}-{options.steps}" for name in options.objectives.split(",")}
    for name, run in runs.items():
        config = demo.get_config(f"objective={name},steps={options.steps}")
        config.run, config.seed, config.data.batch = run, options.seed, options.batch
        config.eval.sets, config.eval.final_sets, config.eval.report = (), (), False  # `evaluate` follows below
        trainer.run(config)
        evaluation.evaluate(run, options.suite)
    first, *others = runs.values()
    for other in others:
        print(comparison.render(comparison.compare(first, other), first, other))


if __name__ == "__main__":
    with exit_with_message():
        main()
