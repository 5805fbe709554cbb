import chex
import jax
import numpy as np
import pytest
from jax.experimental import topologies

from tests.helpers import tiny
from tests.train.test_step import catching
from xclip_jax.data import loader
from xclip_jax.parallel import sharding
from xclip_jax.parallel.mesh import AXES, make_mesh, replicated
from xclip_jax.train import build
from xclip_jax.train.cost.roofline import devices_of

pytestmark = pytest.mark.long

MESHES = {
    "dp": ("dp", 8, 1, 1),
    "dp-clusters": ("dp", 2, 2, 2),
    "zero1": ("zero1", 4, 2, 1),
    "zero1-clusters": ("zero1", 2, 2, 2),
    "fsdp": ("fsdp", 2, 4, 1),
    "fsdp-alone": ("fsdp", 1, 8, 1),
    "fsdp_tp": ("fsdp_tp", 2, 2, 2),
}
BATCH = 32


def make(objective, mesh=None, **changes):
    config = tiny.config(objective, data__batch=BATCH, **changes)
    if mesh:
        strategy, data, fsdp, model = MESHES[mesh]
        config.mesh = {"data": data, "fsdp": fsdp, "model": model, "strategy": strategy}
    return build.build(config, jax.devices()[: 8 if mesh else 1])


def gradients(p, step=0):
    """Metrics, gradients and statistics of a step; a teacher differs from the model."""
    caught, s = catching(p)
    s = s.replace(step=s.step + step)
    keys = np.arange(2 * BATCH).reshape(-1, 2) // 10
    batch = tiny.batch(b=BATCH, eot=p.tokenizer.eot_id) | {"text_key": keys, "image_key": keys}
    batch = {field: batch[field] for field in p.objective.fields}
    s, metrics = caught(s, loader.to_global(batch, p.mesh))
    return jax.device_get(({k: v for k, v in metrics.items() if k != "param_norm"}, s.opt_state, s.batch_stats))


def assert_same(found, expected):
    (metrics, grads, stats), (metrics_1, grads_1, stats_1) = found, expected
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads_1))
    assert largest > 1e-3
    chex.assert_trees_all_close(metrics, metrics_1, rtol=2e-5, atol=2e-5)
    # Relative to each tensor's own largest entry, with a floor where a gradient is zero up to rounding.
    for (path, g), g_1 in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads_1), strict=True):
        scale = max(np.abs(g_1).max(), 1e-2 * largest)
        np.testing.assert_allclose(g, g_1, rtol=0, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))
    chex.assert_trees_all_close(stats, stats_1, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def plain():
    known = {}

    def get(objective, **changes):
        key = (objective, *sorted(changes.items()))
        if key not in known:
            known[key] = gradients(make(objective, **changes))
        return known[key]

    return get


# zero1 is compared below, and xCLIP has the terms of CLIP and nCLIP.
@pytest.mark.parametrize(
    ("objective", "mesh"), [("siglip", "fsdp"), *(("xclip", mesh) for mesh in ("dp", "dp-clusters", "fsdp", "fsdp_tp"))]
)
def test_strategies(objective, mesh, plain):
    assert_same(gradients(make(objective, mesh)), plain(objective))


@pytest.mark.parametrize(
    ("objective", "mesh", "options"),
    [
        ("clip", "fsdp-alone", {"positives": "caption", "label_smoothing": 0.1}),
        ("clip", "dp", {"gce_q": 0.7}),
        ("siglip", "fsdp", {"positives": "image"}),
    ],
)
def test_options_of_losses(objective, mesh, options):
    """Halfway through a run, in microbatches and chunks, against the whole batch on one device."""
    changes = {f"objective__{objective}__{key}": value for key, value in options.items()}
    found = gradients(make(objective, mesh, optim__microbatches=2, loss__chunk_size=8, **changes), step=5)
    assert_same(found, gradients(make(objective, **changes), step=5))


def test_states_of_optimizers_are_split(monkeypatch):
    """Two updates of Muon, with moments of some parameters only, and of stacked blocks."""
    monkeypatch.setattr(sharding, "ZERO1_ELEMENTS", 1)

    def updated(mesh):
        p = make("clip", mesh, optim__name="muon", model__scan=True, model__img__depth=2)
        s = tiny.drawn(p)
        of_state = jax.tree.map(lambda x: x.sharding, p.abstract.opt_state)
        update = jax.jit(p.tx.update, out_shardings=(None, of_state))
        _, opt_state = update(s.params, s.opt_state, s.params)
        whole = sum(x.size for x in jax.tree.leaves(opt_state))
        held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(opt_state))
        return jax.device_get(update(s.params, opt_state, s.params)), held / whole

    expected, _ = updated(None)
    for mesh, largest in (("zero1", 0.2), ("fsdp", 0.6)):
        updates, share = updated(mesh)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
        assert share < largest


def test_zero1_splits_the_kernels_of_cluster_heads(plain, monkeypatch):
    monkeypatch.setattr(sharding, "ZERO1_ELEMENTS", 1)
    for mesh, shard in (("zero1-clusters", (32 // 4, 24 // 2)), ("zero1", (32 // 8, 24))):
        p = make("xclip", mesh, loss__chunk_size=8)
        kernel = p.abstract.params["clusters_img"]["clusters"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == shard
        moments = [x for x in jax.tree.leaves(p.abstract.opt_state) if x.shape == kernel.shape]
        assert moments and all(x.sharding == kernel.sharding for x in moments)
    assert_same(gradients(p), plain("xclip"))


@pytest.mark.parametrize(
    ("shape", "shard"),
    [
        ((130, 136), (130, 17)),  # all eight
        ((132, 134), (33, 134)),  # four of them divide 132
        ((133, 130), (133, 65)),  # two divide 130
        ((131, 133), (131, 133)),
        ((64, 64), (64, 64)),  # small
    ],
)
@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 4, 1)])
def test_zero1_splits_over_one_axis_what_all_devices_do_not_divide(shape, shard, sizes):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[:8])
    x = jax.ShapeDtypeStruct(shape, np.float32)
    split = sharding.zero1_shardings({"x": x}, {"x": replicated(mesh)}, mesh)["x"]
    assert split.shard_shape(shape) == shard


def test_slices_of_tpus_are_joined_by_the_data_axis():
    """zero1 splits within a slice if an axis of the mesh is one."""
    pytest.importorskip("libtpu")
    devices_of("v5e:2x2")  # sets the variables of libtpu
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    x = jax.ShapeDtypeStruct((256, 128), np.float32)
    for fsdp, shard in ((4, (64, 128)), (1, (32, 128))):
        mesh = make_mesh({"data": -1, "fsdp": fsdp, "model": 1}, chips)
        of_slice = [device.slice_index for device in mesh.devices.flat]
        assert of_slice == [of_slice[0]] * 4 + [of_slice[-1]] * 4 and len(set(of_slice)) == 2
        split = sharding.zero1_shardings({"x": x}, {"x": replicated(mesh)}, mesh)["x"]
        assert split.shard_shape(x.shape) == shard


def test_blocks_that_are_computed_again_and_an_average_as_teacher(plain):
    """As in recipes of full size: stacked blocks, in parts; one device keeps what these compute again."""
    teacher = {"objective__nclip__target": "ema", "model__img__drop_path": 0.5}
    tower = {"model__img__depth": 2, "model__scan": True}
    options = {"optim__microbatches": 4, "loss__chunk_size": 16, "model__img__remat": "dots"}
    p = make("xclip", "fsdp_tp", **options, **teacher, **tower)
    assert_same(gradients(p), plain("xclip", **teacher, **tower))
