"""Kills a small run again and again and compares its end, bit for bit, with an undisturbed run.

    JAX_PLATFORMS=cpu python -m tests.torture.soak --kills 50 --terms 20 --moves 4

Each kill hits a phase of the run (start-up, compilation, a step, the writing of a checkpoint, an evaluation) at a
random moment; the phases take turns. The same command then resumes the run, until the next kill or the end. `--kills`
are by SIGKILL; `--terms` by SIGTERM, after which the last step must be saved and the status be 75; with `--moves` the
number of simulated devices changes at each kill, between 1, 2 and 4.

The comparison covers the SHA-256 of all arrays of the last checkpoint (parameters, moments, BatchNorm statistics,
moving average, step, seed), the data position, every logged metric and all results. Other numbers of devices change the
order of sums and thus the rounding. In this case the data position must be equal, and each array, losses, ranks of
features and gradient norms may differ by 5e-3 of the largest number of their array or curve. Rounding changed them by
up to 2.5e-4 on an AMD EPYC, one wrong image or caption in one step by 0.12 or more. Biases of attention keys are left
out: the softmax does not depend on them, their gradient is only rounding, and AdamW divides it by its magnitude. Counts
are also left out, since ties may fall either way.

The first line names the processor, followed by one line per kill; the last line is "N of N bit-identical", where N
counts `--kills` and `--terms`. The status is 1 if any run ended otherwise.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
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
from PIL import Image

from xclip_jax.core import environment
from xclip_jax.processes.interrupt import EXIT_RESUMABLE

# Metrics of metrics.jsonl that measure time: two runs that learn the same differ in them.
CLOCKS = (
    "samples_per_second", "data/wait_share", "model_flops_per_second", "mfu", "goodput", "wall_seconds",
    "useful_seconds",
)  # fmt: skip
STEPS = 40
PHASES = ("start", "compile", "step", "checkpoint", "evaluation")
# Seconds within which the kill comes, after the run has said that it enters a phase; about as long as each lasts.
_WITHIN = {"start": 2.0, "compile": 3.0, "step": 0.5, "checkpoint": 0.05, "evaluation": 0.3}
_DEVICES = (1, 2, 4)
_KILLS_PER_RUN = 5
_TOLERANCE = 5e-3
_COMPUTED = re.compile(r"(.*/)?loss|rank/.*|grad_norm")  # metrics that are no counts
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
    rng = np.random.default_rng(0)
    pairs, classes = folder / "pairs", folder / "classes"

    def picture(path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)

    for i in range(100):
        picture(pairs / f"{i:03d}.png")
        (pairs / f"{i:03d}.txt").write_text(f"picture {i}\n" + (f"number {i}\n" if i % 3 == 0 else ""))
        picture(classes / f"class {i % 5}" / f"{i:03d}.png")
    return str(pairs), str(classes)


# --- the run, in a process of its own


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


# --- what is left of it


@dataclasses.dataclass(frozen=True)
class End:
    """What a finished run left.

    Attributes:
      digest: a hash of all of it.
      position: of the data, as the checkpoint has it.
      arrays: those of the state, and the curves of metrics that are no counts.
    """

    digest: str
    position: bytes
    arrays: dict[str, np.ndarray]


def end_of(run: pathlib.Path) -> End:
    """Read the last checkpoint, metrics and results of a run."""
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    import jax

    path, reader = (run / "checkpoints" / str(step) / "state").absolute(), ocp.PyTreeCheckpointer()
    # As arrays of the host: the run may have had more devices than this process.
    to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree)
    state = reader.restore(path, restore_args=to_host)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves if hasattr(x, "shape")}
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode() + x.tobytes())
    position = (run / "checkpoints" / str(step) / "position" / "metadata").read_bytes()
    digest.update(position)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        digest.update(_without_clocks(row))
    digest.update(_without_clocks(json.loads((run / "results.json").read_text())["results"]))
    curves = {name: np.array([row[name] for row in rows if name in row]) for name in set().union(*rows)}
    return End(digest.hexdigest(), position, arrays | {n: x for n, x in curves.items() if _COMPUTED.fullmatch(n)})


def _without_clocks(record: dict[str, Any]) -> bytes:
    return json.dumps({key: x for key, x in record.items() if key not in CLOCKS}, sort_keys=True).encode()


def largest_difference(a: End, b: End) -> float:
    """Of the arrays of two ends, as a share of the largest number of each, without the biases of attention keys.

    It is infinite where the positions, the arrays' names or their shapes differ.
    """
    if a.position != b.position or {n: x.shape for n, x in a.arrays.items()} != {
        n: x.shape for n, x in b.arrays.items()
    }:
        return float("inf")

    def kept(end: End, name: str) -> np.ndarray:
        x = end.arrays[name].astype(np.float64)
        return x[[0, 2]] if name.endswith("['qkv']['bias']") else x  # (queries, keys, values)

    pairs = [(kept(a, name), kept(b, name)) for name, x in a.arrays.items() if x.size]
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-3)) for x, y in pairs)


# --- the killing


class Soak:
    """Runs in a scratch folder, with one compilation cache for all of them."""

    def __init__(self, folder: pathlib.Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.pairs, self.classes = make_data(folder)
        self._turn = 0

    def start(self, run: pathlib.Path, devices: int) -> subprocess.Popen[str]:
        """Start or resume a run."""
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", "tests.torture.soak", "--child", str(run), self.pairs, self.classes]
        with open(run.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)

    def undisturbed(self) -> End:
        """Return the end of a run that nobody kills."""
        run = self.folder / "undisturbed"
        process = self.start(run, _DEVICES[0])
        process.communicate()
        if process.returncode:
            raise SystemExit(f"the undisturbed run failed: {_last_line(run)}")
        return end_of(run)

    def kills(self, name: str, number: signal.Signals, count: int, *, moves: bool = False) -> Iterator[tuple[str, End]]:
        """Kill runs `count` times in all and yield (what was done, the end of its run) for each kill.

        With `moves` the number of devices changes at each start, and the last steps are computed on several: what a
        killed start computed after its last checkpoint is lost, and must not be all that other devices computed.
        """
        done, numbers = 0, itertools.count()
        while done < count:
            # Runs are counted, not kills: one may end before its first, and the next must not be the same again.
            run, texts, devices = self.folder / f"{name}-{next(numbers)}", [], _DEVICES[0]
            for _ in range(min(_KILLS_PER_RUN, count - done)):
                phase = PHASES[self._turn % len(PHASES)]
                self._turn += 1
                devices = self.random.choice([n for n in _DEVICES if n != devices]) if moves else devices
                if (text := self._kill(run, devices, phase, number)) is None:
                    break  # it came to its end before its turn
                texts.append(text)
            if moves:
                devices = self.random.choice([n for n in _DEVICES if n not in (1, devices)])
                texts = [f"{text}, and at last {devices}" for text in texts]
            process = self.start(run, devices)
            process.communicate()
            if process.returncode:
                raise SystemExit(f"{run} does not resume: {_last_line(run)}")
            end = end_of(run)
            yield from ((text, end) for text in texts)
            done += len(texts)

    def _kill(self, run: pathlib.Path, devices: int, phase: str, number: signal.Signals) -> str | None:
        """Kill a run at a random moment of a phase; None where it ended first."""
        process = self.start(run, devices)
        # The first evaluation and checkpoint come early in every start: any of them may be hit.
        skip = self.random.randrange(4) if phase in ("step", "checkpoint", "evaluation") else 0
        phases, last, reached = [], ["start"], threading.Event()

        def listen() -> None:
            for line in process.stdout or ():
                if (announced_phase := line.strip()) not in PHASES:
                    continue  # what the run prints
                last[0] = announced_phase
                phases.append(announced_phase)
                if phases.count(phase) > skip:
                    reached.set()
            reached.set()

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        reached.wait(_PATIENCE)
        time.sleep(self.random.uniform(0, _WITHIN[phase]))
        moment, partial = last[0], bool(list((run / "checkpoints").glob("*tmp*")))
        process.send_signal(number)
        status = process.wait(_PATIENCE)
        listener.join()
        if status == 0:
            return None
        if number == signal.SIGKILL and status != -signal.SIGKILL:
            raise SystemExit(f"{run} failed with status {status}: {_last_line(run)}")
        if number == signal.SIGTERM and status not in (EXIT_RESUMABLE, -signal.SIGTERM):
            raise SystemExit(f"{run} met SIGTERM with status {status}: {_last_line(run)}")
        where = f"{moment}{', a checkpoint half written' if partial else ''}"
        return f"{number.name} in {where}; {devices} device{'s' if devices > 1 else ''}"


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
    parser.add_argument("--moves", type=int, default=4, help="with another number of devices (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--folder", default="", help="scratch folder, empty, that is kept; a temporary one by default")
    parser.add_argument("--child", nargs=3, metavar=("RUN", "PAIRS", "CLASSES"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(*flags.child)
        return
    if flags.folder and any(pathlib.Path(flags.folder).glob("*")):
        parser.error(f"--folder {flags.folder} is not empty: older runs in it would be resumed; name another one")
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(environment.capture()), flush=True)
        soak = Soak(pathlib.Path(flags.folder or temporary), flags.seed)
        expected, number, identical, wrong = soak.undisturbed(), 0, 0, 0
        for name, kind, count in (("kill", signal.SIGKILL, flags.kills), ("term", signal.SIGTERM, flags.terms)):
            for text, end in soak.kills(name, kind, count):
                number += 1
                same = end.digest == expected.digest
                identical += same
                print(f"{number:>3}  {text}: {'identical' if same else 'DIFFERS'}", flush=True)
        for text, end in soak.kills("move", signal.SIGKILL, flags.moves, moves=True):
            difference = largest_difference(expected, end)
            wrong += difference > _TOLERANCE
            print(f"     {text}: differs by {difference:.1e}", flush=True)
        if wrong:
            print(f"{wrong} of {flags.moves} kills with other devices differ by more than {_TOLERANCE:g}")
        print(f"{identical} of {number} bit-identical")
    sys.exit(0 if identical == number and not wrong else 1)


if __name__ == "__main__":
    main()
