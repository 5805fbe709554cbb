"""Run files of studies, made up for tests."""

import json

from studies import records
from studies.matrix import Snapshot
from xclip_jax.config import schema
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import write_json
from xclip_jax.evaluators.results import VALIDATION, Provenance, Result, to_json


def record(run, value, *, validation=None, commit="0" * 40, seconds=100.0, error=""):
    """A record with these headlines of the tests and of the validation sets."""
    flat = schema.flatten(schema.to_dict(schema.resolve(run.config)))
    numbers = dict.fromkeys(records.short(run.config.eval.sets), value if validation is None else validation)
    numbers |= dict.fromkeys(records.short(run.config.eval.final_sets), value)
    results = [
        Result(
            name, "zeroshot", "top1", number, n=24, chance=25.0, headline=True,
            protocol=Provenance(role=VALIDATION if "validation" in name else ""),
        )
        for name, number in numbers.items()
    ]  # fmt: skip
    return records.RunRecord(
        arm=run.arm.name,
        section=run.arm.section,
        seed=run.seed,
        config={name: x for name, x in flat.items() if name != "run"},
        commit=commit,
        environment={"devices": "1 x cpu", "versions": {"jax": "0.10"}, "workers": 1},
        seconds={"training": seconds, "evaluation": 5.0},
        final={"loss": 2.0 + run.seed},
        curve={"step": [1.0, 4.0], "clip/loss": [3.0, 2.0 + run.seed], "clip/ln_b": [2.77, 2.77]},
        results=[] if error else results,
        error=error,
    )


def write_folder(path, saved, *, value=7.0, commits=("a" * 40,), results=True):
    """Make the folder of a finished run with this nested config, or one without results; commits are of its starts."""
    folder = RunFolder(str(path))
    path.mkdir(exist_ok=True)
    first, *later = [{"commit": commit, "versions": {"jax": "1"}} for commit in commits]
    starts = [{"step": 1, "environment": environment} for environment in later]
    write_json(folder.config_file, {"config": saved, "environment": first, "starts": starts})
    folder.metrics_file.write_text(json.dumps({"step": 1, "loss": 1.0, "samples_per_second": 32.0}) + "\n")
    role, sets = Provenance(role=VALIDATION), saved["eval"]
    made = [Result(name, "zeroshot", "top1", value, headline=True, protocol=role) for name in sets["sets"]]
    made += [Result(name, "zeroshot", "top1", value, headline=True) for name in sets["final_sets"]]
    last = {"commit": commits[-1], "versions": {"jax": "1"}}
    if results:
        write_json(
            folder.results_file,
            {"results": {}, "records": to_json(made), "environment": last, "seconds": 1.0, "config": saved},
        )


def finished(matrix, values):
    """Records of the runs of the arms in `values`: {arm: value, or {seed: value}}; tuning first."""
    made = {}
    for _ in range(2):
        for run in Snapshot(matrix, made).runs:
            if run.key and run.arm.name in values and run.key not in made:
                value = values[run.arm.name]
                value = value[run.seed] if isinstance(value, dict) else value
                made[run.key] = record(run, value)
    return made


TUNED = {"tuning_0.001": 10.0, "tuning_0.002": 20.0}
CORE = {"clip": {0: 20.0, 1: 22.0}, "xclip": {0: 24.0, 1: 27.0}}
