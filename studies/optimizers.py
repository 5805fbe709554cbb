"""Compares optimizers on icons, each at the best of some learning rates: python -m studies.optimizers.

CLIP for 500 steps of 256 pairs with one seed. The learning rate is chosen on validation, by the share of drawings of
unseen concepts that are named right; the test set is read once, by the chosen run. Finished runs are lines of
studies/optimizers.jsonl, and the command goes on from there; `--table` prints the table of docs/train.md. `--cost`
prints how long a step takes over AdamW's, and does nothing else.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from studies.duel import cost
from studies.icons.recipe import SET
from xclip_jax.commands.evaluate import evaluate
from xclip_jax.config import schema
from xclip_jax.config.load import load_config
from xclip_jax.core.environment import capture
from xclip_jax.core.errors import exit_with_message
from xclip_jax.parallel import compiler
from xclip_jax.train import build, trainer

# AdamW's are around the icons' recipe's. Lion's updates are longer, and LAMB's are relative to the parameter's length.
RATES = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "muon": (1e-3, 2e-3, 4e-3, 8e-3),
    "lamb": (2.5e-3, 5e-3, 1e-2, 3e-2),
    "adafactor": (1e-3, 2e-3, 4e-3),
    "lion": (1e-5, 3e-5, 1e-4, 3e-4, 9e-4),
}
RECORDS = pathlib.Path(__file__).with_suffix(".jsonl")
VALIDATION, TEST = "validation_concepts", "test_concepts"


def make_config(name: str, lr: float, steps: int) -> Any:
    """Return the icons' recipe for CLIP with an optimizer and its rate, evaluated at its end on validation."""
    config = load_config(f"studies/icons/recipe.py:objective=clip,steps={steps}")
    config.optim.name, config.optim.lr = name, lr
    config.run = f"runs/optimizers/{name}-{lr:g}-{steps}"
    config.eval.sets, config.eval.final_sets, config.eval.every = (), (f"{SET}/{VALIDATION}",), 0
    config.eval.report, config.checkpoint.every = False, 0
    return config


def state_bytes(config: Any) -> float:
    """Return the bytes of the optimizer's state a parameter."""
    experiment = build.build(schema.resolve(config))
    state = experiment.abstract
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))
    return size / sum(x.size for x in jax.tree.leaves(state.params))


def records() -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def append(**record: Any) -> None:
    """Write a line of a finished run."""
    about = capture()
    with RECORDS.open("a") as file:
        file.write(json.dumps(record | {"commit": about["commit"], "versions": about["versions"]}) + "\n")


def run(steps: int, names: Sequence[str]) -> None:
    """Train with each rate that has no record, and then read the test set by the best run of each optimizer."""
    for name in names:
        for lr in RATES[name]:
            if not any((x["name"], x["lr"], x["steps"]) == (name, lr, steps) for x in records()):
                config = make_config(name, lr, steps)
                value = _only(trainer.run(config), f"/{VALIDATION}/top1")
                append(name=name, lr=lr, steps=steps, validation=value, state_bytes=state_bytes(config))
        best = best_run(name, steps)
        if "test" not in best:
            (tested,) = evaluate(make_config(name, best["lr"], steps).run, [f"{SET}/{TEST}"])["results"]
            append(**best | {"test": tested["value"]})


def best_run(name: str, steps: int) -> dict[str, Any]:
    """Return the record of an optimizer's best run on validation, with its test if that has been read."""
    finished = [x for x in records() if (x["name"], x["steps"]) == (name, steps)]
    return max(finished, key=lambda x: (x["validation"], "test" in x))


def _only(results: Mapping[str, Any], ending: str) -> float:
    (value,) = (value for key, value in results.items() if key.endswith(ending))
    return float(value)


def table(steps: int) -> str:
    """Return the table of docs/train.md."""
    rows = [
        "| optimizer | learning rate, of | validation | test | bytes of state a parameter |",
        "|---|---|---|---|---|",
    ]
    for name in RATES:
        finished = [x for x in records() if (x["name"], x["steps"]) == (name, steps)]
        if not finished or "test" not in (x := best_run(name, steps)):
            continue
        tried = ", ".join(f"{rate:g}" for rate in sorted({x["lr"] for x in finished}))
        rows.append(
            f"| {name} | {x['lr']:g} of {tried} | {x['validation']:.1f} | {x['test']:.1f} | {x['state_bytes']:.1f} |"
        )
    return "\n".join(rows)


def print_costs(names: Sequence[str]) -> None:
    """Print each optimizer's step over AdamW's: the median of turns, and quartiles."""
    clock = make_config("adamw", RATES["adamw"][0], 9)
    for name in names:
        measured = cost.measure(make_config(name, RATES[name][0], 9), clock)
        print("{}: {ratio:.3f} [{low:.3f}, {high:.3f}], {turns} turns".format(name, **measured), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The comparison; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="of each run")
    parser.add_argument("--only", default=",".join(RATES), help="names of optimizers, joined by commas")
    parser.add_argument("--table", action="store_true", help="print the table of finished runs")
    parser.add_argument("--cost", action="store_true", help="measure steps over AdamW's, on an idle machine")
    options = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    if options.cost:
        print_costs([name for name in options.only.split(",") if name != "adamw"])
        return
    if not options.table:
        compiler.enable_cache()
        run(options.steps, options.only.split(","))
    print(table(options.steps))


if __name__ == "__main__":
    with exit_with_message():
        main()
