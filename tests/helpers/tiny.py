"""A run small enough for tests: config, batches, a folder of pairs, a run that is cut off, and what the run logs."""

import contextlib
import functools
import json
import math
import operator
import pathlib
import shutil
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from xclip_jax.config import recipes
from xclip_jax.data import loader
from xclip_jax.train import build
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.run_writer import RunWriter
from xclip_jax.train.weights import Origin

BATCH, SIZE, LENGTH = 16, 16, 12


def config(objective="xclip", steps=10, run="runs/tiny", **changes):
    """A config of towers of one or two narrow layers; `changes` are dotted keys with __ for the dot."""
    c = recipes.base(objective, "Ti/12")
    c.run, c.steps = str(run), steps
    narrow = {"width": 32, "depth": 1, "heads": 2}
    c.model.img = c.model.img.to_dict() | narrow | {"image_size": SIZE, "patch": 8}
    c.model.txt = c.model.txt.to_dict() | narrow | {"context_length": LENGTH}
    c.model.embed, c.model.scan = 16, False
    c.model.cluster_head = {"clusters": 24, "hidden": 32, "layers": 1}
    c.model.dtype = "float32"
    c.optim.warmup, c.optim.lr, c.optim.eps = 1, 1e-3, 1e-6
    c.data.batch, c.data.tokenizer, c.data.threads = BATCH, "bytes", 2
    c.data.flip_prob, c.data.color_jitter = 0.5, 0.2
    c.eval.sets, c.eval.sets_at_end = (), ()
    c.log.every, c.checkpoint.every = 1, 5
    return changed(c, changes)


def changed(config, changes, separator="__"):
    """Set keys of a config or of nested dicts, and return it."""
    for key, value in changes.items():
        *path, last = key.split(separator)
        functools.reduce(operator.getitem, path, config)[last] = value
    return config


def short(pairs, run, **changes):
    """A config of four steps on a folder of pairs, with checkpoints of steps 2 and 4."""
    defaults = {"data__sources": (f"folder:{pairs}",), "steps": 4, "checkpoint__every": 2, "optim__warmup": 0}
    return config(run=run, **defaults | changes)


def drawn(experiment, noise=0.0):
    """A state before the first step with values drawn by NumPy: the initialisation takes seconds to compile.

    Values depend on names and seed alone. Kernels, embeddings and positions have a deviation of 0.2, scales, biases and
    statistics that of `noise`, and averages are others than the parameters.
    """
    means = {"scale": 1.0, "var": 1.0, "log_scale": math.log(1 / 0.07)}
    abstract, seed = experiment.abstract, experiment.config.seed

    def place(x, value):
        value = np.broadcast_to(value, x.shape).astype(x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])

    def draw(path, x):
        rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        name = path[-1].key
        deviation = noise if name in (*means, "bias", "mean") else 0.2
        value = means.get(name, 0.0) + deviation * rng.normal(size=x.shape)
        return place(x, abs(value) if name == "var" else value)

    state = jax.tree.map(lambda x: place(x, 0), abstract).replace(seed=place(abstract.seed, seed))
    names = ("params", "batch_stats", "ema_params", "ema_batch_stats")
    trees = {name: getattr(abstract, name) for name in names}
    return state.replace(**jax.tree_util.tree_map_with_path(draw, trees))


def untrained(run, objective="xclip", noise=0.0, origin=None, **changes):
    """What a run leaves in the folder `run` before its first step, with weights of `drawn`. Returns the folder."""
    c = config(objective, run=run, data__batch=8, **changes)
    made = build.build(c)
    with RunWriter(run).claimed(made.config, [], origin=origin or Origin()):
        pass
    with Checkpointer(run) as checkpointer:
        checkpointer.save(drawn(made, noise), {"samples": 0})
    return run


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run `trained`."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


def batch(seed=0, b=BATCH, eot=257):
    """Random images, and texts of random lengths that end in `eot`."""
    rng = np.random.default_rng(seed)
    text = rng.integers(1, 200, (b, LENGTH)).astype(np.int32)
    for row, end in enumerate(rng.integers(2, LENGTH, b)):
        text[row, end], text[row, end + 1 :] = eot, 0
    return {"image": rng.integers(0, 256, (b, SIZE, SIZE, 3), dtype=np.uint8), "text": text}


def assert_same_step(one, other, batch, *names):
    """The first steps of two experiments have the same loss, norm of the gradient and metrics `names`; returns them."""
    expected, metrics = (jax.device_get(p.compiled(drawn(p), loader.to_global(batch, p.mesh))[1]) for p in (one, other))
    for name in ("loss", "grad_norm", *names):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
    return metrics


def folder(path, n=40, seed=0):
    """Writes `n` little images with captions under `path` and returns it."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (20 + i % 5, 24, 3), dtype=np.uint8)).save(path / f"{i:03d}.png")
        (path / f"{i:03d}.txt").write_text(f"picture {i}\n" + (f"number {i}\n" if i % 3 == 0 else ""))
    return path


def classes(path, n=10, names=("cat", "dog"), size=20):
    """Writes `n` random images for each name into folders under `path` and returns it."""
    rng = np.random.default_rng(0)
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(n):
            image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(image).save(path / name / f"{i}.png")
    return path


def lines(run, name="metrics.jsonl"):
    """The lines of a file of JSON lines in a run's folder."""
    return [json.loads(line) for line in (pathlib.Path(run) / name).read_text().splitlines()]


def losses(run):
    """The loss of each step that a run logged."""
    return [line["loss"] for line in lines(run) if "loss" in line]


def restored(c, step=None):
    """State and position in a checkpoint of the run of a config, by default the last one."""
    with Checkpointer(c.run, read_only=True) as checkpointer:
        return checkpointer.restore(build.build(c).abstract, step)


class CutOff(Exception):
    """Ends a run between two steps."""


@contextlib.contextmanager
def cut_off(after):
    """Expect that the run trained in this context ends when it asks for a batch after its first `after`."""
    batches, to_global = [], loader.to_global

    def counted(batch, mesh):
        if len(batches) == after:
            raise CutOff
        batches.append(batch)
        return to_global(batch, mesh)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(loader, "to_global", counted)
        yield
