"""What a training step costs: two configs, each in a process of its own, take steps in turn and wait for each other.

python -m studies.cost CONFIG.json      # the process of one config; reads numbers of steps, prints seconds
"""

import contextlib
import itertools
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

STEPS, TURNS = 3, 48
_ROOT = pathlib.Path(__file__).parents[1]
_WORDS = 8  # tokens of a made text, with start and end: names have one to five words


def batch(experiment: build.Experiment) -> dict[str, np.ndarray]:
    """Return a made batch of the objective's fields: noise, and short texts that end with the end of text."""
    rng, b, size = np.random.default_rng(0), experiment.config.data.batch, experiment.image_size
    text = np.zeros((b, experiment.context_length), np.int32)
    text[:, :_WORDS] = rng.integers(1, experiment.tokenizer.eot_id, (b, _WORDS))
    text[:, _WORDS - 1] = experiment.tokenizer.eot_id
    made = {"image": rng.integers(0, 256, (b, size, size, 3), np.uint8), "text": text}
    for name in ("text_key", "image_key"):
        made[name] = rng.integers(0, 2**31 - 1, (b, 2)).astype(np.int32)
    return {name: made[name] for name in experiment.objective.fields}


def child(path: str) -> None:
    """Take one step, then for each line N of stdin N more, and print their seconds."""
    experiment = build.build(schema.complete(json.loads(pathlib.Path(path).read_text())))
    current = state.create(experiment.init, experiment.abstract)
    inputs = {name: jax.device_put(x, batch_sharding(experiment.mesh)) for name, x in batch(experiment).items()}
    for line in itertools.chain(["1"], sys.stdin):
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            current, metrics = experiment.compiled(current, inputs)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - began)
        print(strict_json({"seconds": seconds, "loss": loss}), flush=True)


class _Stepper:
    """The process of one config."""

    def __init__(self, config: ml_collections.ConfigDict, folder: pathlib.Path, name: str) -> None:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config.to_dict()))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        self.name, self.process = name, subprocess.Popen(
            [sys.executable, "-m", "studies.cost", str(path)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> list[float]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the process that times {self.name!r} ended; its error stands above.")
        return json.loads(line)["seconds"]

    def take(self, steps: int) -> list[float]:
        """Return the seconds of `steps` steps."""
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(
    config: ml_collections.ConfigDict, clock: ml_collections.ConfigDict, *, turns: int = TURNS, steps: int = STEPS
) -> dict[str, Any]:
    """Return "ratio", the median over turns of the ratio of the median steps, and its quartiles "low" and "high".

    Neighbouring turns share what else the machine does, so that their ratio scatters less than seconds do.

    Args:
      config, clock: the config that is timed, and the one that it is compared with.
      turns: of `steps` steps each, one config after the other.
      steps: of a turn.

    Raises:
      UserError: a process that ended.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pair = []
        for name, content in (("config", config), ("clock", clock)):
            pair.append(_Stepper(content, pathlib.Path(folder), name))
            stack.callback(pair[-1].close)
        for stepper in pair:
            stepper.take(2)
        medians = [[statistics.median(stepper.take(steps)) for stepper in pair] for _ in range(turns)]
    ratios = [a / b for a, b in medians]
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    seconds = {
        name: round(statistics.median(column), 4)
        for name, column in zip(("step", "clock"), zip(*medians, strict=True), strict=True)
    }
    return {"ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "turns": turns, "seconds": seconds}


def write(path: pathlib.Path, arm: str, against: str, commit: str, measured: Mapping[str, Any]) -> None:
    """Add a line to a costs.jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(f"{strict_json({'arm': arm, 'against': against, 'commit': commit, **measured})}\n")


def read(path: pathlib.Path) -> dict[str, float]:
    """Return {arm: ratio} from a costs.jsonl; of an arm measured twice, the last ratio."""
    lines = path.read_text().splitlines() if path.exists() else []
    measured = map(json.loads, lines)
    return {line["arm"]: line["ratio"] for line in measured}


if __name__ == "__main__":
    child(sys.argv[1])
