"""A study of two arms with their recipe, and records and folders of its runs, made for tests."""

import os

from studies import records
from studies.declaration import Arm, Measure, Study
from studies.matrix import Matrix
from tests.helpers import tiny
from xclip_jax.config import recipes, schema
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import write_json
from xclip_jax.evaluators.results import VALIDATION, Provenance, Result, to_json

RECIPE = "tests/studies/made.py"
VALIDATION_SET, TEST_SET = "tests.extension.greys:Greys/20", "tests.extension.greys:Greys/30"
ONE = Arm("one", "", RECIPE, {}, (0,))
ARMS = tuple(Arm(name, name, f"{RECIPE}:objective={name}", {}, (0, 1)) for name in ("clip", "xclip"))
MEASURES = (
    Measure("top1", "top-1", TEST_SET),
    Measure("both", "mean", TEST_SET, ("top1", "rank")),
    Measure("rank", "rank", TEST_SET, ("rank",), higher=False, ratio=True),
)


def get_config(arg):
    """The recipe of this file, of four steps on the pairs of STUDY_PAIRS."""
    args = recipes.parse_arg(arg, objective="clip")
    return tiny.config(args.objective, steps=4, data__sources=(f"folder:{os.environ.get('STUDY_PAIRS', 'pairs')}",))


def matrix(*arms, values=None, claims=()):
    """A matrix of `arms`, by default of CLIP and xCLIP with two seeds, and of results {arm: {seed: accuracy}}."""
    changes = {"optim.warmup": 1, "eval.sets": (VALIDATION_SET,), "eval.sets_at_end": (TEST_SET,)}
    made = Matrix(Study("A tiny study", list(arms or ARMS), changes, (VALIDATION_SET,), MEASURES, claims), {})
    runs = [run for run in made.runs() if run.seed in (values or {}).get(run.arm.name, {})]
    made.records = {run.key: record(run, values[run.arm.name][run.seed]) for run in runs}
    return made


def results(config, value):
    """Results of the sets in a config; the rank is twice the accuracy."""
    made = []
    for name in (*config["eval"]["sets"], *config["eval"]["sets_at_end"]):
        card = Provenance(role=VALIDATION if name == VALIDATION_SET else "")
        made.append(Result(name, "zeroshot", "top1", value, n=24, chance=25.0, headline=True, protocol=card))
        made.append(Result(name, "zeroshot", "rank", 2 * value, protocol=card))
    return made


def write_folder(path, config, value=7.0):
    """The folder of a finished run."""
    folder = RunReader(str(path))
    about = {"command": "x", "commit": "y", "versions": {"jax": "1"}}
    write_json(folder.config_file, {"config": config, "environment": about})
    made = to_json(results(config, value))
    write_json(folder.results_file, {"results": {}, "records": made, "environment": about, "config": config})


def record(run, value):
    config = schema.to_dict(schema.resolve(run.config))
    flat = {name: x for name, x in schema.flatten(config).items() if name != "run"}
    return records.RunRecord(run.arm.name, run.seed, flat, "c", {}, results(config, value))
