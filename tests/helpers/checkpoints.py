"""A small state, checkpoints of it, and what tests of them share."""

import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.state import TrainState

# Orbax writes them last, and reads no state from them.
HARMLESS = ("_CHECKPOINT_METADATA", "commit_success.txt")


def make_state(step, size=64):
    rng = np.random.default_rng(step)
    params = {name: jnp.asarray(rng.normal(size=(size, size)), jnp.float32) for name in ("a", "b", "c")}
    step, empty = jnp.asarray(step, jnp.int32), {"batch_stats": {}, "loss_state": {}}
    empty |= {"ema_params": None, "ema_batch_stats": None, "seed": jnp.asarray(0, jnp.uint32)}
    return TrainState(step=step, params={"img": params}, opt_state=(jax.tree.map(jnp.square, params), step), **empty)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ABSTRACT = abstract(make_state(0))


def save(run, *steps, **options):
    with Checkpointer(run, **options) as checkpointer:
        for step in steps:
            checkpointer.save(make_state(step), {"samples": 8 * step, "batch": 8})


def restore(run, step=None):
    with Checkpointer(run, read_only=True) as checkpointer:
        return checkpointer.restore(ABSTRACT, step)


def resume(run):
    with Checkpointer(run) as checkpointer:
        return checkpointer.restore_good(ABSTRACT)


def check_is(restored, step):
    chex.assert_trees_all_equal(restored[0], make_state(step))
    assert restored[1] == {"samples": 8 * step, "batch": 8}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 2 and 4. To be copied, not changed."""
    run = tmp_path_factory.mktemp("saved")
    save(run, 2, 4)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def damage(folder):
    """Change one bit of the largest file of a checkpoint, and return its name."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.relative_to(folder).as_posix()
