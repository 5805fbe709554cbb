"""What each process reads of a checkpoint; tests/processes/test_runtime.py restores one with two processes."""

import chex
import jax
import pytest

from tests.helpers import tiny
from xclip_jax.train import build, checkpoint_files
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.memory import bytes_on_device
from xclip_jax.train.state import create

pytestmark = pytest.mark.long

WIDE = {"model__img__width": 256, "model__txt__width": 256}
MESHES = [
    ("dp", 1, 1),
    pytest.param("dp", 4, 2, marks=pytest.mark.slow),
    pytest.param("zero1", 2, 1, marks=pytest.mark.slow),
    pytest.param("fsdp", 4, 1, marks=pytest.mark.slow),
    pytest.param("fsdp_tp", 2, 2, marks=pytest.mark.slow),
]


def make(strategy="dp", fsdp=1, model=1):
    c = tiny.config("xclip", **WIDE, mesh__strategy=strategy, mesh__fsdp=fsdp, mesh__model=model)
    return build.build(c)


@pytest.mark.parametrize(("strategy", "fsdp", "model"), MESHES)
def test_many_processes_read_each_byte_once(strategy, fsdp, model, monkeypatch, tmp_path):
    experiment = make(strategy, fsdp, model)
    assert checkpoint_files.split_for_reading(experiment.abstract) is experiment.abstract  # one process reads all of it
    monkeypatch.setattr(checkpoint_files, "_spans_processes", lambda _: True)
    parts = checkpoint_files.split_for_reading(experiment.abstract)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parts))
    # Small arrays are read by all.
    assert size <= 8 * bytes_on_device(parts) < 1.2 * size
    state = create(experiment.init, experiment.abstract)
    read = []
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, {"samples": 0})
    with Checkpointer(tmp_path) as checkpointer:
        saved = jax.tree.leaves(checkpointer._manager.item_metadata(0)["state"])
        written = [x.storage.chunk_shape for x in saved if hasattr(x, "storage")]
        monkeypatch.setattr(
            checkpoint_files, "gather_parts", lambda arrays, abstract: read.append(arrays) or gather(arrays, abstract)
        )
        restored, _ = checkpointer.restore(experiment.abstract)
    layouts = [jax.tree.map(lambda x: x.sharding, tree) for tree in (read[0], parts, restored, experiment.abstract)]
    assert layouts[0] == layouts[1] != layouts[3] == layouts[2]
    chex.assert_trees_all_equal(restored, state)
    # A part as it is read is one that was written, which would be read whole.
    large = [x for x in jax.tree.leaves(read[0]) if x.size >= 1 << 14]
    assert len(large) > 10
    assert {x.sharding.shard_shape(x.shape) for x in large} <= set(written)


gather = checkpoint_files.gather_parts
