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

# Hosts may keep the same files in different places, and differ in how they read them.
_OF_A_HOST = (
    "data.buffer", "data.cache", "data.dir", "data.sources", "data.threads", "data.tokenizer", "data.workers",
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
        content = json.dumps(fingerprint, sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        facts[f"source {number}"] = f"{fingerprint.get('samples')} samples, hash {digest}"
    processes.check_same(facts, "all processes have to read the same data.sources and data.tokenizer")
