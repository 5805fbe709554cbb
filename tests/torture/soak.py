"""Kills a small run again and again and compares its end, bit for bit, with an undisturbed run.

    JAX_PLATFORMS=cpu python -m tests.torture.soak --kills 50 --terms 20

Each kill hits a phase of the run (start-up, compilation, a step, the writing of a checkpoint, an evaluation) at a
random moment; the phases take turns. The same command then resumes the run, until the next kill or the end. `--kills`
are by SIGKILL; `--terms` by SIGTERM, after which the last step must be saved and the status be 75.

The comparison covers the SHA-256 of all arrays of the last checkpoint (parameters, moments, BatchNorm statistics,
moving average, step, seed), the data position, every logged metric and all results.

The first line names the processor, followed by one line per kill; the last line is "N of N bit-identical". The status
is 1 if any run ended otherwise.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from xclip_jax.core import environment
from xclip_jax.processes.interrupt import EXIT_RESUMABLE

# Metrics of metrics.jsonl that measure time: two runs that learn the same differ in them.
CLOCKS = (
    "samples_per_second", "data/wait_share", "model_flops_per_second", "mfu", "goodput", "wall_seconds",
    "useful_seconds",
)  # fmt: skip
STEPS = 40
# Seconds within which the kill comes, after the run has said that it enters a phase; about as long as each lasts.
PHASES = {"start": 2.0, "compile": 3.0, "step": 0.5, "checkpoint": 0.05, "evaluation": 0.3}
_KILLS_PER_RUN = 5
_PATIENCE = 600.0  # seconds


def config(run: str, pairs: str, classes: str) -> ml_collections.ConfigDict:
    """xCLIP with everything stateful: BatchNorm, a moving average, stochastic depth."""
    from tests.helpers import tiny

    c = tiny.config("xclip", STEPS, run, data__sources=(f"folder:{pairs}",), optim__warmup=5, checkpoint__keep=2)
    c.model.img.patch, c.model.img.depth, c.model.img.drop_path = 4, 2, 0.25
    c.objective.nclip.target = "ema"
    c.data.flip_prob = 0.0
    c.eval.sets, c.eval.every = (f"zeroshot/folder:{classes}",), 8
    return c


def make_data(folder: pathlib.Path) -> tuple[str, str]:
    """Write pairs and a zero-shot set of random pictures; return their folders."""
    from tests.helpers import tiny

    pairs, classes = tiny.folder(folder / "pairs", 100), folder / "classes"
    for i in range(5):
        for caption in tiny.folder(classes / f"class {i}", 20, seed=i + 1).glob("*.txt"):
            caption.unlink()
    return str(pairs), str(classes)


def child(run: str, pairs: str, classes: str) -> None:
    """Train, or resume, and say on stdout which phase begins."""
    print("start", flush=True)
    from xclip_jax.core.errors import exit_with_message
    from xclip_jax.evaluators import registry
    from xclip_jax.train import loop, trainer
    from xclip_jax.train.checkpoint import Checkpointer

    def announced(phase: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            print(phase, flush=True)
            return function(*args, **options)

        return call

    save: Any = Checkpointer.save
    Checkpointer.save = announced("checkpoint", save)
    registry.measure = announced("evaluation", registry.measure)
    first, place = [True], loop.loader.to_global

    def to_global(*args: Any) -> Any:
        print("compile" if first else "step", flush=True)
        first.clear()
        return place(*args)

    loop.loader.to_global = to_global
    with exit_with_message():
        trainer.run(config(run, pairs, classes))


def digest_of(run: pathlib.Path) -> str:
    """Return a hash of the last checkpoint, metrics and results of a run."""
    import jax
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    checkpoint = (run / "checkpoints" / str(step)).absolute()
    reader = ocp.PyTreeCheckpointer()
    saved = reader.metadata(checkpoint / "state").item_metadata.tree
    as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    state = reader.restore(checkpoint / "state", restore_args=as_arrays)
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(x)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    digest.update((checkpoint / "position" / "metadata").read_bytes())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in (*records, json.loads((run / "results.json").read_text())["results"]):
        kept = {key: value for key, value in record.items() if key not in CLOCKS}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


class Soak:
    """Runs in a scratch folder, with one compilation cache for all of them."""

    def __init__(self, folder: pathlib.Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.pairs, self.classes = make_data(folder)
        self._phases = itertools.cycle(PHASES)

    def start(self, run: pathlib.Path) -> subprocess.Popen[str]:
        """Start or resume a run."""
        settings = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", "tests.torture.soak", "--child", str(run), self.pairs, self.classes]
        with open(run.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=settings)

    def end(self, run: pathlib.Path) -> str:
        """Let a run come to its end, and return its digest."""
        process = self.start(run)
        process.communicate()
        if process.returncode:
            raise SystemExit(f"{run} does not come to its end: {_last_line(run)}")
        return digest_of(run)

    def kills(self, number: signal.Signals, count: int) -> Iterator[tuple[str, str]]:
        """Kill runs `count` times in all and yield (what was done, the digest of its run) for each kill."""
        done, numbers = 0, itertools.count()
        while done < count:
            # Runs are counted, not kills: one may end before its first, and the next must not be the same again.
            run, texts = self.folder / f"{number.name}-{next(numbers)}", []
            for _ in range(min(_KILLS_PER_RUN, count - done)):
                if (text := self._kill(run, next(self._phases), number)) is None:
                    break  # it came to its end before its turn
                texts.append(text)
            digest = self.end(run)
            yield from ((text, digest) for text in texts)
            done += len(texts)

    def _kill(self, run: pathlib.Path, phase: str, number: signal.Signals) -> str | None:
        """Kill a run at a random moment of a phase; None where it ended first."""
        process = self.start(run)
        # The first evaluation and checkpoint come early in every start: any of them may be hit.
        skip = self.random.randrange(4) if phase in ("step", "checkpoint", "evaluation") else 0
        phases, reached = ["start"], threading.Event()

        def listen() -> None:
            for line in process.stdout or ():
                if line.strip() in PHASES:  # other lines are what the run prints
                    phases.append(line.strip())
                if phases[1:].count(phase) > skip:
                    reached.set()
            reached.set()

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        reached.wait(_PATIENCE)
        time.sleep(self.random.uniform(0, PHASES[phase]))
        moment, partial = phases[-1], bool(list((run / "checkpoints").glob("*tmp*")))
        process.send_signal(number)
        status = process.wait(_PATIENCE)
        listener.join()
        if status == 0:
            return None
        if status not in ((-number,) if number == signal.SIGKILL else (-number, EXIT_RESUMABLE)):
            raise SystemExit(f"{run} met {number.name} with status {status}: {_last_line(run)}")
        return f"{number.name} in {moment}{', a checkpoint half written' if partial else ''}"


def _last_line(run: pathlib.Path) -> str:
    lines = run.with_suffix(".log").read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'nothing said'} (see {run.with_suffix('.log')})"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="by SIGKILL (default: %(default)s)")
    parser.add_argument("--terms", type=int, default=20, help="by SIGTERM (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--child", nargs=3, metavar=("RUN", "PAIRS", "CLASSES"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(*flags.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(environment.capture()), flush=True)
        soak = Soak(pathlib.Path(folder), flags.seed)
        expected, number, identical = soak.end(pathlib.Path(folder, "undisturbed")), 0, 0
        for kind, count in ((signal.SIGKILL, flags.kills), (signal.SIGTERM, flags.terms)):
            for text, digest in soak.kills(kind, count):
                number += 1
                identical += digest == expected
                print(f"{number:>3}  {text}: {'identical' if digest == expected else 'DIFFERS'}", flush=True)
        print(f"{identical} of {number} bit-identical")
    sys.exit(identical != number)


if __name__ == "__main__":
    main()
