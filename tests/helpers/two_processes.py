"""Trains and encodes a little, alone or as one of several processes; each writes what it saw.

python -m tests.helpers.two_processes FOLDER OUT [COORDINATOR PROCESSES PROCESS]
python -m tests.helpers.two_processes run FOLDER OUT DATA MODEL [COORDINATOR PROCESSES PROCESS]
"""

import dataclasses
import sys

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from tests.helpers import tiny
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import loader, sources
from xclip_jax.parallel.mesh import replicated
from xclip_jax.processes import runtime
from xclip_jax.train import build, trainer, weights
from xclip_jax.train.build import make_encoder
from xclip_jax.train.checkpoint import Checkpointer

STEPS, BATCH, IMAGES = 2, 16, 13
BROKEN = 20  # of twice IMAGES


class Broken(list):
    def __getitem__(self, index):
        if index == BROKEN:
            raise BadSample("broken")
        return super().__getitem__(index)


def main(folder, out, *others, devices=None):
    if others:
        runtime.join(False, others[0], int(others[1]), int(others[2]))
    # The kernels of the hidden layer are whole on each device, and large enough for each process to read a part.
    head = {"clusters": 64, "hidden": 1024, "layers": 1}
    changes = {"model__img__drop_path": 0.5, "model__img__depth": 2, "model__cluster_head": head}
    config = tiny.config("xclip", data__batch=BATCH, data__sources=(f"folder:{folder}",), **changes)
    p = build.build(config, devices)
    order = loader.sample_order(sources.open_sources(p.config.data), p.config.data, config.seed)
    transform = loader.Transform(p.config.data, p.image_size, p.tokenizer, p.context_length)
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
    batches = loader.batches(order, transform, batch=BATCH, start=0, stop=STEPS, seed=0, **hosts)
    # An optimizer that keeps the gradient as its state, followed by the run's: one program for both.
    catch = optax.GradientTransformation(lambda params: params, lambda grads, _, params=None: (grads, grads))
    abstract = p.abstract.replace(opt_state=(p.abstract.params, p.abstract.opt_state))
    with_gradients = dataclasses.replace(p, tx=optax.chain(catch, p.tx), abstract=abstract)
    s, losses, rows = tiny.drawn(with_gradients), [], []
    for i, local in enumerate(batches):
        rows.append(len(local["text"]))
        s, metrics = with_gradients.compiled(s, loader.to_global(local, p.mesh))
        losses.append(float(metrics["loss"]))
        if i == 0:
            whole = jax.jit(lambda x: x, out_shardings=replicated(p.mesh))(s.opt_state[0])
            flat = jax.tree_util.tree_leaves_with_path(whole)
            # Copied, as the next step takes the memory.
            grads = {f"grad{jax.tree_util.keystr(path)}": np.array(x.addressable_data(0)) for path, x in flat}
    s = s.replace(opt_state=s.opt_state[1])
    with Checkpointer(f"{out}.run") as checkpointer:
        checkpointer.save(s, {"samples": STEPS * BATCH, "batch": BATCH, "seed": 0})
    with Checkpointer(f"{out}.run") as checkpointer:
        restored, position = checkpointer.restore(p.abstract)
    fell_back = falls_back(f"{out}.run", p.abstract, s)
    same = all(
        np.array_equal(x.addressable_data(0), y.addressable_data(0))
        for x, y in zip(jax.tree.leaves(s.params), jax.tree.leaves(restored.params), strict=True)
    )
    encoder = make_encoder(p)
    # The last batch is not full: with IMAGES rows the second process has fewer of its own than the first.
    images = [tiny.batch(i, b=1)["image"][0] for i in range(IMAGES)]
    features = encoder.images(s.variables(), images)
    texts = encoder.texts(s.variables(), [f"text number {i}" for i in range(3)])
    unreadable = np.isnan(encoder.images(s.variables(), Broken(2 * images))["embedding"]).all(axis=1)
    found = {"losses": losses, "rows": rows, "restored": [same, position["samples"] == STEPS * BATCH]}
    found |= {"fell_back": fell_back, "unreadable": np.flatnonzero(unreadable), "counted": [*encoder.unreadable]}
    found |= {"image": features["embedding"], "clusters": features["cluster_logits"], "text": texts["embedding"]}
    np.savez(f"{out}.{jax.process_index()}.npz", **found, **grads)


def falls_back(run, abstract, s):
    """Whether a newer checkpoint that is damaged is noticed in every process, and the one before is restored."""
    with Checkpointer(run) as checkpointer:
        checkpointer.save(s.replace(step=s.step + 1), {"samples": 0})
    if jax.process_index() == 0:
        files = (path for path in (RunReader(run).checkpoints / str(STEPS + 1) / "state" / "d").iterdir())
        path = max(files, key=lambda path: path.stat().length)
        path.write_bytes(path.read_bytes()[:-1])
    multihost_utils.sync_global_devices("damaged")
    errors = []
    with Checkpointer(run, read_only=True) as checkpointer:
        try:
            checkpointer.restore(abstract)
        except UserError as error:
            errors.append(str(error))
    with Checkpointer(run) as checkpointer:
        state, position = checkpointer.restore_good(abstract)
        steps = [int(state.step), checkpointer.latest()]
    return [f"the newest whole one is of step {STEPS}" in errors[0], steps == [STEPS] * 2, position["samples"] > 0]


def run(folder, out, data, model, *others):
    """A run of two steps on a mesh of these sizes; keeps the rows of each batch that this process's devices hold."""
    if others:
        runtime.join(False, others[0], int(others[1]), int(others[2]))
    changes = {"data__batch": 8, "data__sources": (f"folder:{folder}",), "data__max_bad_fraction": 0.5}
    changes |= {"mesh__data": int(data), "mesh__model": int(model), "optim__eps": 1e-3}
    config = tiny.config("xclip", run=f"{out}.run", steps=2, **changes)
    to_global, shapes, texts = loader.to_global, [], []

    def spy(batch, mesh):
        placed = to_global(batch, mesh)
        shapes.append(placed["text"].shape)
        texts.append(np.asarray(placed["text"].addressable_data(0)))
        return placed

    loader.to_global = spy
    trainer.run(config)
    _, experiment, variables, *_ = weights.load(config.run)
    weights_read = weights.fingerprint(experiment, variables)
    np.savez(f"{out}.{jax.process_index()}.npz", shapes=shapes, texts=texts, weights=weights_read)


if __name__ == "__main__":
    (run if sys.argv[1] == "run" else main)(*sys.argv[1 + (sys.argv[1] == "run") :])
