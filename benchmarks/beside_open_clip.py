"""The recipe small and open_clip, trained on your pairs for equal time on a CPU, and scored by the same evaluator.

    pip install '.[bench]' && python -m benchmarks.beside_open_clip --pairs /my/pairs --out runs/beside
    python -m benchmarks.beside_open_clip --table --out runs/beside    # prints the table again

Ours is `small:pairs=PAIRS` with as many steps as take --seconds at the speed of a short run. open_clip trains the same
towers in float32 with its published recipe: AdamW (betas 0.9 and 0.98, eps 1e-6, weight decay 0.2, none for gains and
biases), a cosine after a warm-up, and a logit scale of at most 100. Its steps are found in the same way; a tenth of
them is warm-up, at most open_clip's default of 10,000. Compilation, evaluation and saving are not timed.

Both sides get the same batches from our loader: with equal seeds the same pairs, without the held-out ones, in the same
order, with the same captions and crops. Crops have 0.5 to 1 of an image's area, like in the recipe; open_clip's default
is 0.9 to 1. So neither side pays for another decoding or has another augmentation.

The best of --rates is chosen with the first seed, by R@1 on the recipe's held-out pairs, mean of both directions, and
trained with every seed. These pairs also give scores, which favours open_clip; sets in --evaluate may be independent.
Each run is one process, leaves OUT/NAME.json and its model in OUT/NAME, and is not repeated.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from etils import epath

from benchmarks import step as cpu
from xclip_jax.config import load, schema
from xclip_jax.core import environment
from xclip_jax.core.errors import exit_with_message
from xclip_jax.core.storage import write_json
from xclip_jax.data import ledger, loader, records, sources
from xclip_jax.data.base import Source
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.parallel import compiler
from xclip_jax.train import prepare, weights
from xclip_jax.train.build import Experiment, build, make_encoder, profile_of_run
from xclip_jax.train.learner import Learner

TIMED = 20  # steps of a short run that are timed
WARM_UP, MOST_WARM_UP = 0.1, 10_000  # of open_clip: share of the steps, and most steps
RECALLS = ("image_to_text/r1", "text_to_image/r1", "image_to_text/r5", "text_to_image/r5")
RECIPE = ("pairs", "image", "text", "objective")  # arguments of the recipe
KEPT = (*RECIPE, "seconds", "evaluate")  # settings that all runs of a folder share
OURS, THEIRS = "small", "open_clip"
Record = dict[str, Any]


class Job(NamedTuple):
    """A process: a run or, for a negative seed, the search for the number of steps. `rate` is open_clip's."""

    arm: str
    seed: int = -1
    rate: float = 0.0

    @property
    def name(self) -> str:
        """Name of its files."""
        rate = f"-{self.rate:g}" if self.rate else ""
        return f"{self.arm}-steps" if self.seed < 0 else f"{self.arm}{rate}-seed{self.seed}"


class Ours:
    """Our train step on batches of the loader."""

    def __init__(self, experiment: Experiment) -> None:
        self.learner = Learner(experiment)
        self.state = self.learner.init()
        self.rate = experiment.config.optim.lr

    def __call__(self, batch: dict[str, np.ndarray]) -> None:
        self.state, metrics = self.learner.step(self.state, batch)
        metrics["loss"].block_until_ready()

    def save(self, folder: pathlib.Path) -> None:
        self.learner.save(folder, self.state)


class OpenClip:
    """open_clip's train step on batches of the loader, with the towers of an experiment."""

    def __init__(self, experiment: Experiment, rate: float) -> None:
        import open_clip
        import torch
        from open_clip_train.scheduler import cosine_lr

        torch.manual_seed(experiment.config.seed)
        torch.set_num_threads(records.cores())
        sizes = schema.to_dict(experiment.config)["model"]
        config = cpu.open_clip_config(sizes["embed"], sizes["img"], sizes["txt"])
        view = experiment.preprocessing
        self.content = {"model_cfg": config, "preprocess_cfg": {"mean": view.mean, "std": view.std}}
        self.model = open_clip.model.CLIP(**config)
        groups: dict[float, list[Any]] = {0.0: [], 0.2: []}
        for x in self.model.parameters():
            groups[0.2 if x.ndim > 1 else 0.0].append(x)
        decayed = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
        optimizer = torch.optim.AdamW(decayed, lr=rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
        steps = experiment.config.steps
        self.rate = rate
        self.set_rate = cosine_lr(optimizer, rate, min(int(WARM_UP * steps), MOST_WARM_UP), steps)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (view.mean, view.std))
        self.step = cpu.open_clip_step(self.model, optimizer, mean, std)
        self.taken = 0

    def __call__(self, batch: dict[str, np.ndarray]) -> None:
        self.set_rate(self.taken)
        self.step(batch["image"], batch["text"])
        self.taken += 1

    def save(self, folder: pathlib.Path) -> None:
        """Write the model in open_clip's format."""
        import torch

        torch.save(self.model.state_dict(), folder / "open_clip_pytorch_model.bin")
        (folder / "open_clip_config.json").write_text(json.dumps(self.content))


def opened(settings: Record, steps: int, seed: int) -> tuple[Experiment, list[Source]]:
    """Return the experiment of the recipe, and its training pairs; for 0 steps the recipe chooses their number."""
    given = [f"{key}={settings[key]}" for key in RECIPE if settings[key]] + [f"steps={steps}"] * bool(steps)
    config = load.load_config(f"small:{','.join(given)}")
    config.seed = seed
    experiment = build(config)
    samples = sources.open_sources(experiment.config.data, fields=experiment.objective.fields)
    groups = prepare.choose_length_groups(experiment, samples)
    return dataclasses.replace(experiment, length_groups=groups), samples


def train(
    job: Job, experiment: Experiment, samples: Sequence[Source], steps: int, untimed: int, folder: pathlib.Path
) -> tuple[Ours | OpenClip, float]:
    """Train for the first `steps` of a run; return the model, and mean seconds of the steps after the first ones."""
    config = experiment.config
    side = Ours(experiment) if job.arm == OURS else OpenClip(experiment, job.rate)
    order = loader.sample_order(samples, config.data, config.seed)
    bad = ledger.BadSampleLog(epath.Path(folder), max_bad_fraction=config.data.max_bad_fraction)
    sizes = {"batch": config.data.batch, "start": 0, "stop": steps, "seed": config.seed}
    began = time.perf_counter()
    for taken, batch in enumerate(loader.batches(order, experiment.transform(), **sizes, ledger=bad), 1):
        side(batch)
        if taken == untimed:
            began = time.perf_counter()
    return side, (time.perf_counter() - began) / (steps - untimed)


def fitting_steps(settings: Record, job: Job, folder: pathlib.Path) -> Record:
    """Return the number of steps that take the seconds of the settings, from a short run."""
    seconds: dict[Any, float] = {}
    steps = 0
    for _ in range(3):  # whether texts are encoded in groups of lengths depends on the number of steps
        experiment, samples = opened(settings, steps, 0)
        groups = experiment.length_groups
        if groups not in seconds:
            evaluators(settings, experiment, experiment)  # finds faults of evaluation sets before the training
            untimed = max(experiment.config.data.threads, loader.BUFFER) + 2  # batches read during the compilation
            seconds[groups] = train(job, experiment, samples, untimed + TIMED, untimed, folder)[1]
        steps = max(int(settings["seconds"] / seconds[groups]), 2)
    return {"steps": steps, "seconds_per_step": seconds[groups]}


def evaluators(settings: Record, experiment: Experiment, model: Experiment) -> list[Evaluator]:
    """Return the evaluators of `model`, with the data and the preprocessing of the training."""
    config = experiment.config
    suite = registry.expand_suites([*config.eval.sets, *settings["evaluate"]])
    encoder = make_encoder(dataclasses.replace(model, preprocessing=experiment.preprocessing))
    return registry.open_all(suite, encoder, None, profile_of_run(config), config.data)


def run(settings: Record, job: Job, out: pathlib.Path) -> Record:
    """Return the record of a job; scores are each set's headline, and recalls of retrieval."""
    folder = out / job.name
    folder.mkdir(exist_ok=True)
    if job.seed < 0:
        return fitting_steps(settings, job, folder)
    steps = json.loads((out / f"{Job(job.arm).name}.json").read_text())["steps"]
    experiment, samples = opened(settings, steps, job.seed)
    side, seconds = train(job, experiment, samples, steps, 1, folder)
    side.save(folder)
    loaded = weights.load(str(folder))
    opened_sets = evaluators(settings, experiment, loaded.experiment)
    results = [result for each in opened_sets for result in registry.measure(each, loaded.variables)]
    return {
        "rate": side.rate, "steps": steps, "seconds": seconds * steps,
        "pairs_per_second": experiment.config.data.batch / seconds,
        "scores": {result.name: result.value for result in results if result.headline or result.key in RECALLS},
        "config": schema.to_dict(experiment.config), "environment": environment.capture(),
        "versions": {name: metadata.version(name) for name in ("open_clip_torch", "torch")},
    }  # fmt: skip


def launch(job: Job, out: pathlib.Path) -> Record:
    """Return the record of a job, after running it in its own process if there is none."""
    file = out / f"{job.name}.json"
    if not file.exists():
        print(f"{job.name} ...", flush=True)
        command = [sys.executable, "-m", "benchmarks.beside_open_clip", "--out", str(out), "--job", *map(str, job)]
        environment_of_job = os.environ | {"JAX_PLATFORMS": "cpu"}
        if subprocess.Popen(command, stdin=subprocess.PIPE, env=environment_of_job).wait():
            sys.exit(f"{job.name} failed, see above; the same command tries again")
    return json.loads(file.read_text())


def best(tried: dict[float, Record]) -> float:
    """Return the rate of the best record {rate: record}."""
    names = [f"retrieval/holdout/{recall}" for recall in RECALLS[:2]]
    return max(tried, key=lambda rate: sum(tried[rate]["scores"][name] for name in names))


def estimate(values: Sequence[float], sign: str = "") -> str:
    """Return the mean and, for two values or more, its 95 % t-interval."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:{sign}.1f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{mean:{sign}.1f} [{mean - half:{sign}.1f}, {mean + half:{sign}.1f}]"


def column(label: str, runs: dict[int, Record], names: Sequence[str]) -> list[str]:
    """Return the cells of a column, means over seeds, with the scores `names`."""
    each = list(runs.values())
    formats = {"rate": "g", "steps": ",.0f", "seconds": ",.0f", "pairs_per_second": ",.1f"}
    rate, *means = (f"{np.mean([x[key] for x in each]):{shown}}" for key, shown in formats.items())
    return [label, rate, str(len(each)), *means, *(estimate([x["scores"][name] for x in each]) for name in names)]


def table(settings: Record, out: pathlib.Path) -> str:
    """Return the table of finished runs; differences are paired by seed, whose batches are the same."""

    def finished(arm: str, rate: float = 0.0) -> dict[int, Record]:
        files = {seed: out / f"{Job(arm, seed, rate).name}.json" for seed in settings["seeds"]}
        return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}

    first = settings["seeds"][0]
    ours = finished(OURS)
    tried = {rate: runs for rate in settings["rates"] for runs in [finished(THEIRS, rate)] if first in runs}
    if first not in ours or not tried:
        sys.exit(f"{out} has no finished runs of both sides with seed {first}; run the command without --table")
    rate = best({rate: runs[first] for rate, runs in tried.items()})
    theirs = tried.pop(rate)
    names = list(ours[first]["scores"])
    seeds = [seed for seed in ours if seed in theirs]
    apart = [[ours[seed]["scores"][name] - theirs[seed]["scores"][name] for seed in seeds] for name in names]
    columns = [
        ["", "rate", "seeds", "steps", "seconds", "pairs/s", *names],
        column("small", ours, names), column("open_clip, best rate", theirs, names),
        ["difference", "", str(len(seeds)), "", "", "", *(estimate(values, "+") for values in apart)],
        *(column("open_clip, another rate", {first: runs[first]}, names) for runs in tried.values()),
    ]  # fmt: skip
    head, *rows = (f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True))
    return "\n".join([head, "|---" * len(columns) + "|", *rows])


def settings_of(flags: argparse.Namespace) -> Record:
    """Return the settings of the folder, after an update by the flags of a comparison."""
    file = flags.out / "settings.json"
    if flags.table or flags.job:
        return json.loads(file.read_text())
    settings = {key: getattr(flags, key) for key in (*KEPT, "seeds", "rates")}
    saved = json.loads(file.read_text()) if (flags.out / f"{Job(OURS).name}.json").exists() else settings
    for key in KEPT:
        if saved[key] != settings[key]:
            sys.exit(f"{file} has --{key} {saved[key]!r}, not {settings[key]!r}; give the same, or another --out")
    flags.out.mkdir(parents=True, exist_ok=True)
    write_json(epath.Path(file), settings)
    return settings


def main() -> None:
    """Run missing jobs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", default="", help="image-text pairs, as in small:pairs=")
    add("--image", default="", help="column of images")
    add("--text", default="", help="column of captions, or several joined by commas")
    add("--objective", default="", help="of ours; clip by default")
    add("--seconds", type=float, default=1800, help="of a training")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3], help="learning rates of open_clip to try")
    add("--evaluate", nargs="*", default=[], metavar="SUITE", help="more sets, as in xclip-jax evaluate --suite")
    add("--out", type=pathlib.Path, required=True, help="folder of the results")
    add("--table", action="store_true", help="print the table of earlier runs")
    add("--job", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if not (flags.pairs or flags.table or flags.job):
        parser.error("--pairs is missing")
    with exit_with_message():
        settings = settings_of(flags)
        if flags.job:
            job = Job(flags.job[0], int(flags.job[1]), float(flags.job[2]))
            compiler.enable_cache()
            write_json(epath.Path(flags.out / f"{job.name}.json"), run(settings, job, flags.out))
            return
        seeds = settings["seeds"]
        if not flags.table:
            for job in (Job(OURS), Job(THEIRS), *(Job(OURS, seed) for seed in seeds)):
                launch(job, flags.out)
            rate = best({rate: launch(Job(THEIRS, seeds[0], rate), flags.out) for rate in settings["rates"]})
            for seed in seeds[1:]:
                launch(Job(THEIRS, seed, rate), flags.out)
        print(table(settings, flags.out))


def end_with_parent() -> None:
    """End this process if the command ends, which closes the pipe: two runs at once would not be timed fairly."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    if "--job" in sys.argv:
        threading.Thread(target=end_with_parent, daemon=True).start()
    main()
