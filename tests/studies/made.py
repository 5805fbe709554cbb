"""A study of two arms, and records and folders of its runs, made for tests."""

import os

from studies import records
from studies.declaration import Arm, Measure, Study
from studies.matrix import Matrix
from tests.helpers import tiny
from tests.studies.greys import TEST_SET, VALIDATION_SET
from xclip_jax.config import schema
from xclip_jax.config.load import load_config
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import write_json
from xclip_jax.evaluators.results import VALIDATION, Provenance, Result, to_json

ARMS = tuple(Arm(name, name, f"tiny:objective={name}", {}, (0, 1)) for name in ("clip", "xclip"))
MEASURES = (
    Measure("top1", "top-1", TEST_SET),
    Measure("both", "mean", TEST_SET, ("top1", "rank")),
    Measure("rank", "rank", TEST_SET, ("rank",), higher=False, ratio=True),
)


def load(spec):
    """The recipe "tiny:objective=NAME", or one of the package."""
    name, _, objective = spec.partition(":objective=")
    if name != "tiny":
        return load_config(spec)
    return tiny.config(objective, steps=4, data__sources=(f"folder:{os.environ.get('STUDY_PAIRS', 'pairs')}",)).lock()


def matrix(*arms, **fields):
    """A matrix of `arms`, by default of CLIP and xCLIP with two seeds."""
    declared = {
        "title": "A tiny study",
        "arms": arms or ARMS,
        "changes": {"optim.warmup": 1},
        "validation": (VALIDATION_SET,),
        "tests": (TEST_SET,),
        "measures": MEASURES,
    }
    return Matrix(Study(**declared | fields), load)


def results(config, value):
    """Results of the sets in a config; the rank is twice the accuracy."""
    made = []
    for name in (*config["eval"]["sets"], *config["eval"]["sets_at_end"]):
        card = Provenance(role=VALIDATION if name == VALIDATION_SET else "")
        made.append(Result(name, "zeroshot", "top1", value, n=24, chance=25.0, headline=True, protocol=card))
        made.append(Result(name, "zeroshot", "rank", 2 * value, protocol=card))
    return made


def write_folder(path, config, value=7.0, finished=True):
    folder = RunReader(str(path))
    path.mkdir(exist_ok=True)
    about = {"command": "x", "commit": "y", "versions": {"jax": "1"}}
    write_json(folder.config_file, {"config": config, "environment": about})
    if finished:
        made = to_json(results(config, value))
        write_json(folder.results_file, {"results": {}, "records": made, "environment": about, "config": config})


def record(run, value, error=""):
    config = schema.to_dict(schema.resolve(run.config))
    flat = {name: x for name, x in schema.flatten(config).items() if name != "run"}
    made = [] if error else results(config, value)
    return records.RunRecord(run.arm.name, run.seed, flat, "c", {}, made, error)


def finished(of, values):
    """Records of runs by key, of {arm: {seed: accuracy}}."""
    made = {}
    for run in of.runs():
        if run.seed in values.get(run.arm.name, {}):
            made[run.key] = record(run, values[run.arm.name][run.seed])
    return made
