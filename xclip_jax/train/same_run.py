"""Processes of one run agree, before training, on what they run: config, code, packages, checkpoint and data."""

import hashlib
import json
from typing import Any

from etils import epath

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import environment
from xclip_jax.data import tokenizer
from xclip_jax.processes import runtime
from xclip_jax.train.job import Job
from xclip_jax.train.training_folder import OUTCOMES, TRANSPARENT, TrainingFolder

# Hosts may keep the same files in different places, and differ in how they read them.
_OF_A_HOST = (
    "data.buffer", "data.dir", "data.sources", "data.threads", "data.tokenizer", "data.workers",
)  # fmt: skip


def check_config(config: Config, folder: TrainingFolder) -> None:
    """Compare config, code and packages of all processes, and the newest checkpoint in the folder that each has.

    Raises:
      UserError: names the keys that differ, in the processes that differ from process 0.
    """
    if runtime.peers() is None:
        return
    keys = schema.flatten(schema.to_dict(config))
    facts = {key: value for key, value in keys.items() if key not in _OF_A_HOST}
    captured = environment.capture()
    facts |= {f"code's {key}": captured[key] for key in ("commit", "python", "platform")}
    facts |= {f"version of {package}": version for package, version in captured["versions"].items()}
    facts["newest checkpoint in --config.run"] = folder.latest_step()
    remedy = "start all processes with the same command, code and packages, and --config.run on storage that all share"
    runtime.check_same(facts, remedy)


def check_data(job: Job) -> None:
    """Compare sources, tokenizer files and evaluation sets of all processes.

    Raises:
      UserError: names the source or set that differs.
    """
    if runtime.peers() is None:
        return
    facts: dict[str, Any] = {}
    if (name := job.experiment.data.tokenizer) not in tokenizer.NAMES:
        facts["tokenizer file"] = hashlib.sha256(epath.Path(name).read_bytes()).hexdigest()[:12]
    for number, fingerprint in enumerate(job.fingerprints):
        whole = {key: value for key, value in fingerprint.items() if key not in (*OUTCOMES, TRANSPARENT)}
        content = json.dumps(whole, sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        for key in OUTCOMES.keys() & fingerprint.keys():
            facts[f"{OUTCOMES[key]} of source {number}"] = fingerprint[key]["digest"]
        facts[f"source {number}"] = f"{fingerprint.get('samples')} samples, hash {digest}"
    # Hosts with other items would wait for each other's batches, or measure a mixture.
    for number, evaluator in enumerate(job.final):
        count = sum(len(getattr(evaluator.data, part, ())) for part in evaluator.inputs)
        facts[f"evaluation set {number}, {evaluator.name}"] = f"{count} items, hash {evaluator.data.card.split_hash}"
    remedy = "all processes have to read the same data.sources, data.tokenizer and evaluation sets"
    if any(OUTCOMES.keys() & fingerprint.keys() for fingerprint in job.fingerprints):
        remedy += ", and all of their records: see that the files can be read, and start again"
    runtime.check_same(facts, remedy)
