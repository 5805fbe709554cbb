"""The cost of a training step: two configs take steps in turn, in a process of their own (python -m studies.cost)."""

import json
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from studies.worker import stop_with_parent
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import strict_json
from xclip_jax.parallel.mesh import batch_sharding
from xclip_jax.train import build, state

_WORDS = 8  # tokens of a made text, with start and end: names have one to five words


def batch(experiment: build.Experiment) -> dict[str, np.ndarray]:
    """Return a made batch with the objective's fields: noise, and short texts that end with the end-of-text token."""
    rng = np.random.default_rng(0)
    size = experiment.image_size
    b = experiment.config.data.batch
    text = np.zeros((b, experiment.context_length), np.int32)
    text[:, :_WORDS] = rng.integers(1, experiment.tokenizer.eot_id, (b, _WORDS))
    text[:, _WORDS - 1] = experiment.tokenizer.eot_id
    made = {"image": rng.integers(0, 256, (b, size, size, 3), np.uint8), "text": text}
    for name in ("text_key", "image_key"):
        made[name] = rng.integers(0, 2**31 - 1, (b, 2)).astype(np.int32)
    return {name: made[name] for name in experiment.objective.fields}


def stepper(config: ml_collections.ConfigDict) -> Callable[[], float]:
    """Return a function that takes a training step on a made batch and returns its seconds; the step is compiled."""
    experiment = build.build(config)
    current = state.create(experiment.init, experiment.abstract)
    inputs = {name: jax.device_put(x, batch_sharding(experiment.mesh)) for name, x in batch(experiment).items()}

    def step() -> float:
        nonlocal current
        began = time.perf_counter()
        current, metrics = experiment.compiled(current, inputs)
        float(metrics["loss"])
        return time.perf_counter() - began

    for _ in range(3):
        step()
    return step


def compare(
    config: ml_collections.ConfigDict, clock: ml_collections.ConfigDict, *, turns: int = 192, steps: int = 3
) -> dict[str, Any]:
    """Return "ratio", the median over turns of the ratio of the median steps, and its quartiles "low" and "high".

    Neighbouring turns share the machine's other load, so that ratios scatter less than seconds.

    Args:
      config, clock: the timed config, and the config for comparison.
      turns: number of turns; in each, both configs take `steps` steps.
      steps: steps per turn.
    """
    pair = [stepper(config), stepper(clock)]
    medians = np.array([[statistics.median(step() for _ in range(steps)) for step in pair] for _ in range(turns)])
    low, ratio, high = (round(float(x), 4) for x in np.quantile(medians[:, 0] / medians[:, 1], (0.25, 0.5, 0.75)))
    step, of_clock = (round(float(x), 4) for x in np.median(medians, axis=0))
    return {"ratio": ratio, "low": low, "high": high, "turns": turns, "seconds": {"step": step, "clock": of_clock}}


def measure(config: ml_collections.ConfigDict, clock: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return `compare` of another process, which leaves the accelerator to later runs.

    Raises:
      UserError: the process ended.
    """
    command = [sys.executable, "-m", "studies.cost"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        print(json.dumps([config.to_dict(), clock.to_dict()]), file=process.stdin, flush=True)
        line = process.stdout.readline()
    if not line:
        raise UserError("the process that takes timed steps ended; its error stands above.")
    return json.loads(line)


def write(path: pathlib.Path, arm: str, against: str, commit: str, measured: Mapping[str, Any]) -> None:
    """Append a line to a costs.jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(f"{strict_json({'arm': arm, 'against': against, 'commit': commit, **measured})}\n")


def read(path: pathlib.Path) -> dict[str, float]:
    """Return {arm: ratio} from a costs.jsonl; the last line of an arm counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["arm"]: line["ratio"] for line in map(json.loads, lines)}


if __name__ == "__main__":
    configs = [schema.complete(values) for values in json.loads(sys.stdin.readline())]
    threading.Thread(target=stop_with_parent, daemon=True).start()
    print(json.dumps(compare(*configs)), flush=True)
