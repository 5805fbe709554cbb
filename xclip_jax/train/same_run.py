"""Processes of one run agree on what they run: config, code, packages and data, compared before anything is trained."""

import hashlib
import json
from typing import Any

from etils import epath

from xclip_jax import environment
from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.data import tokenizer
from xclip_jax.parallel import processes
from xclip_jax.train.job import Job
from xclip_jax.train.run_folder import OUTCOMES

# Hosts may keep the same files in different places, and differ in how they read them.
_OF_A_HOST = (
    "data.buffer", "data.dir", "data.sources", "data.threads", "data.tokenizer", "data.workers",
)  # fmt: skip


def check_config(config: Config) -> None:
    """Compare config, code and packages of all processes.

    Raises:
      UserError: names the keys that differ, in the processes that differ from process 0.
    """
    if processes.peers() is None:
        return
    keys = schema.flatten(schema.to_dict(config))
    facts = {key: value for key, value in keys.items() if key not in _OF_A_HOST}
    captured = environment.capture()
    facts |= {f"code's {key}": captured[key] for key in ("commit", "python", "platform")}
    facts |= {f"version of {package}": version for package, version in captured["versions"].items()}
    processes.check_same(facts, "start all processes with the same command, code and packages")


def check_data(job: Job) -> None:
    """Compare sources and tokenizer files of all processes.

    Raises:
      UserError: names the source that differs.
    """
    facts: dict[str, Any] = {}
    if (name := job.experiment.data.tokenizer) not in tokenizer.NAMES:
        facts["tokenizer file"] = hashlib.sha256(epath.Path(name).read_bytes()).hexdigest()[:12]
    for number, fingerprint in enumerate(job.fingerprints):
        whole = {key: value for key, value in fingerprint.items() if key not in OUTCOMES}
        content = json.dumps(whole, sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        facts[f"source {number}"] = f"{fingerprint.get('samples')} samples, hash {digest}"
        for key in OUTCOMES.keys() & fingerprint.keys():
            facts[f"{OUTCOMES[key]} of source {number}"] = fingerprint[key]["digest"]
    remedy = "all processes have to read the same data.sources and data.tokenizer"
    if any(OUTCOMES.keys() & fingerprint.keys() for fingerprint in job.fingerprints):
        remedy += ", and all of their records: see that the files can be read, and start again"
    processes.check_same(facts, remedy)
