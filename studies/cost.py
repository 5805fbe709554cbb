"""The cost of a training step: two configs, each in its own process, take steps in turn and wait for each other.

python -m studies.cost CONFIG.json      # the process of one config: reads numbers of steps, prints seconds
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import strict_json
from xclip_jax.parallel.mesh import batch_sharding
from xclip_jax.train import build, state

_ROOT = pathlib.Path(__file__).parents[1]
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


def child(path: str) -> None:
    """For each line N of stdin take N steps, and print their seconds."""
    experiment = build.build(schema.complete(json.loads(pathlib.Path(path).read_text())))
    current = state.create(experiment.init, experiment.abstract)
    inputs = {name: jax.device_put(x, batch_sharding(experiment.mesh)) for name, x in batch(experiment).items()}
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            current, metrics = experiment.compiled(current, inputs)
            float(metrics["loss"])
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


def _start(config: ml_collections.ConfigDict, path: pathlib.Path) -> subprocess.Popen[str]:
    path.write_text(json.dumps(config.to_dict()))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "studies.cost", str(path)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _take(process: subprocess.Popen[str], steps: int) -> float:
    """Return the median seconds of `steps` steps."""
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise UserError("a process that takes timed steps ended; its error stands above.")
    return statistics.median(json.loads(line))


def measure(
    config: ml_collections.ConfigDict, clock: ml_collections.ConfigDict, *, turns: int = 48, steps: int = 3
) -> dict[str, Any]:
    """Return "ratio", the median over turns of the ratio of the median steps, and its quartiles "low" and "high".

    Neighbouring turns share the machine's other load, so that ratios scatter less than seconds.

    Args:
      config, clock: the timed config, and the config for comparison.
      turns: number of turns; in each, both configs take `steps` steps.
      steps: steps per turn.

    Raises:
      UserError: a process ended.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pair = []
        for name, content in (("config", config), ("clock", clock)):
            pair.append(_start(content, pathlib.Path(folder, f"{name}.json")))
            stack.enter_context(pair[-1])
            _take(pair[-1], 3)  # the first compiles
        medians = np.array([[_take(process, steps) for process in pair] for _ in range(turns)])
    low, ratio, high = (round(float(x), 4) for x in np.quantile(medians[:, 0] / medians[:, 1], (0.25, 0.5, 0.75)))
    step, of_clock = (round(float(x), 4) for x in np.median(medians, axis=0))
    return {"ratio": ratio, "low": low, "high": high, "turns": turns, "seconds": {"step": step, "clock": of_clock}}


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
    child(sys.argv[1])
