"""Every strategy, chunks and microbatches against one device's plain step: loss and every gradient."""

import dataclasses

import chex
import jax
import numpy as np
import optax
import pytest

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.data import loader
from xclip_jax.objectives import make_objective
from xclip_jax.parallel import sharding
from xclip_jax.parallel.mesh import AXES, make_mesh, replicated
from xclip_jax.train import build, state
from xclip_jax.train.checkpoint import Checkpointer

pytestmark = pytest.mark.long

MESHES = {
    "dp": ("dp", 8, 1, 1),
    "dp-clusters": ("dp", 2, 2, 2),
    "zero1": ("zero1", 4, 2, 1),
    "fsdp": ("fsdp", 2, 4, 1),
    "fsdp_tp": ("fsdp_tp", 2, 2, 2),
}
CLUSTERS_SPLIT_TWICE = {"zero1-clusters": ("zero1", 2, 2, 2)}
FSDP_ALONE = {"data": 1, "fsdp": 8, "model": 1, "strategy": "fsdp"}
# xCLIP holds the other two losses; by themselves they are minutes more of compilation.
OBJECTIVES = (
    pytest.param("clip", marks=pytest.mark.slow),
    "siglip",
    pytest.param("nclip", marks=pytest.mark.slow),
    "xclip",
)
# What is not slow: xCLIP with all strategies, and SigLIP's loss over two axes of devices.
STRATEGIES = [("siglip", "fsdp"), *(("xclip", mesh) for mesh in MESHES)]
BATCH = 32


def make(objective, mesh=None, devices=None, **changes):
    """Experiment on eight devices of `mesh`, or on one; `devices` are others than the simulated ones."""
    config = tiny.config(objective, data__batch=BATCH, **changes)
    if mesh:
        strategy, data, fsdp, model = (MESHES | CLUSTERS_SPLIT_TWICE)[mesh]
        config.mesh = {"data": data, "fsdp": fsdp, "model": model, "strategy": strategy}
    return build.build(config, devices or jax.devices()[: 8 if mesh else 1])


def gradients(p, step=0):
    """(loss, gradients) as the step makes them, caught by an optimizer that keeps the gradient as its state.

    A teacher differs from the model at a `step` above 0.
    """
    catch = optax.GradientTransformation(lambda params: params, lambda grads, _, params=None: (grads, grads))
    s = state.create(p.init, p.abstract)
    s = s.replace(opt_state=catch.init(s.params), step=s.step + step)
    s = s.replace(ema_params=jax.tree.map(lambda x: (1 + step / 50) * x, s.ema_params))
    batch = tiny.batch(b=BATCH, eot=p.tokenizer.eot_id) | {"text_key": np.arange(2 * BATCH).reshape(-1, 2) // 10}
    batch = {field: batch[field] for field in p.objective.fields}
    s, metrics = jax.jit(dataclasses.replace(p, tx=catch).step)(s, loader.to_global(batch, p.mesh))
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
    """Memoised results of one device."""
    known = {}

    def get(objective, **changes):
        key = (objective, *sorted(changes.items()))
        if key not in known:
            known[key] = gradients(make(objective, **changes))
        return known[key]

    return get


@pytest.mark.parametrize(
    ("objective", "mesh"),
    [
        pytest.param(objective, mesh, marks=() if (objective, mesh) in STRATEGIES else pytest.mark.slow)
        for objective in ("clip", "siglip", "nclip", "xclip")
        for mesh in MESHES
    ],
)
def test_strategies(objective, mesh, plain):
    assert_same(gradients(make(objective, mesh)), plain(objective))


@pytest.mark.parametrize(
    ("objective", "chunk"),
    [("clip", 8), ("siglip", 0), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("clip", 0), ("siglip", 8)))],
)
def test_captions_of_several_pairs(objective, chunk, plain):
    """Pairs of one caption are positives of each other wherever they are, in microbatches too."""
    changes = {f"objective__{objective}__positives": "caption"}
    p = make(objective, "fsdp", optim__microbatches=2, loss__chunk_size=chunk, **changes)
    assert_same(gradients(p), plain(objective, **changes))
    assert plain(objective, **changes)[0]["loss"] != plain(objective)[0]["loss"]
    config = tiny.config(objective, **{f"objective__{objective}__positives": "image"})
    assert "image_key" in make_objective(schema.resolve(config).objective).fields


@pytest.mark.parametrize(
    ("objective", "mesh", "changes"),
    [
        ("clip", "dp", {"objective__clip__gce_q": 0.7, "loss__chunk_size": 8}),
        ("clip", "fsdp", {"objective__clip__label_smoothing": 0.1}),
    ],
)
def test_robust_losses(objective, mesh, changes):
    """Halfway through a run, in microbatches, against the whole batch on one device."""
    found = gradients(make(objective, mesh, optim__microbatches=2, **changes), step=5)
    expected = gradients(make(objective, **changes | {"loss__chunk_size": 0}), step=5)
    assert_same(found, expected)


@pytest.mark.parametrize("mesh", ["zero1", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_states_of_optimizers_are_split(mesh, monkeypatch):
    """Two updates of Muon, with moments of some parameters only, and of stacked blocks."""
    monkeypatch.setattr(sharding, "ZERO1_ELEMENTS", 1)

    def updated(mesh):
        p = make("clip", mesh, optim__name="muon", model__scan=True, model__img__depth=2)
        s = state.create(p.init, p.abstract)
        of_state = jax.tree.map(lambda x: x.sharding, p.abstract.opt_state)
        update = jax.jit(p.tx.update, out_shardings=(None, of_state))
        _, opt_state = update(s.params, s.opt_state, s.params)
        whole = sum(x.size for x in jax.tree.leaves(opt_state))
        held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(opt_state))
        return jax.device_get(update(s.params, opt_state, s.params)), held / whole

    (expected, _), (updates, share) = updated(None), updated(mesh)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
    assert share < (0.2 if mesh == "zero1" else 0.6)


def test_states_of_optimizers_are_restored(tmp_path):
    """Saved after an update over eight devices, and read by one: all bits are equal."""
    p, one = (make("clip", mesh, optim__name="muon") for mesh in ("fsdp", None))
    s = state.create(p.init, p.abstract)
    _, opt_state = jax.jit(p.tx.update)(s.params, s.opt_state, s.params)
    s = s.replace(opt_state=jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), opt_state, s.opt_state))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(s, {"samples": 0})
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        restored, _ = checkpointer.restore(one.abstract)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(s))


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_scanned_blocks_that_are_computed_again(microbatches, plain):
    """As in recipes of full size; the step of one device keeps what these compute again."""
    tower = {"model__img__depth": 2, "model__scan": True}
    p = make("clip", "fsdp_tp", optim__microbatches=microbatches, model__img__remat="dots", **tower)
    assert_same(gradients(p), plain("clip", **tower))


@pytest.mark.parametrize("mesh", ["dp", "fsdp_tp"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks(objective, mesh, plain):
    p = make(objective, mesh, loss__chunk_size=BATCH // 2)
    assert_same(gradients(p), plain(objective))


@pytest.mark.parametrize("microbatches", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcache_on_one_device(objective, microbatches, plain):
    dropped = {"model__img__drop_path": 0.5, "model__img__depth": 2}
    p = make(objective, optim__microbatches=microbatches, **dropped)
    assert_same(gradients(p), plain(objective, **dropped))


@pytest.mark.slow  # with an average as teacher it is compared in any case, see below
@pytest.mark.parametrize("mesh", MESHES)
def test_gradcache_with_every_strategy(mesh, plain):
    tower = {"model__img__drop_path": 0.5, "model__img__depth": 2}
    p = make("xclip", mesh, optim__microbatches=2, loss__chunk_size=8, **tower)
    assert_same(gradients(p), plain("xclip", **tower))


@pytest.mark.parametrize(
    ("mesh", "chunk", "shard"), [("zero1", 8, (32 // 8, 24)), ("zero1-clusters", 0, (32 // 4, 24 // 2))]
)
def test_zero1_splits_the_kernels_of_cluster_heads(mesh, chunk, shard, plain, monkeypatch):
    monkeypatch.setattr(sharding, "ZERO1_ELEMENTS", 1)
    p = make("xclip", mesh, loss__chunk_size=chunk)
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


def test_zero1_splits_within_a_slice_where_an_axis_of_the_mesh_is_one(monkeypatch):
    monkeypatch.setattr(sharding, "num_slices", lambda _: 2)
    x = jax.ShapeDtypeStruct((256, 128), np.float32)
    for fsdp, shard in ((4, (64, 128)), (1, (32, 128))):
        mesh = make_mesh({"data": 8 // fsdp, "fsdp": fsdp, "model": 1}, jax.devices()[:8])
        split = sharding.zero1_shardings({"x": x}, {"x": replicated(mesh)}, mesh)["x"]
        assert split.shard_shape(x.shape) == shard


def test_gradcache_and_chunks_where_all_devices_share_parameters(plain):
    options = {f"mesh__{key}": value for key, value in FSDP_ALONE.items()}
    config = tiny.config("clip", data__batch=BATCH, optim__microbatches=2, loss__chunk_size=16, **options)
    assert_same(gradients(build.build(config, jax.devices()[:8])), plain("clip"))


@pytest.mark.parametrize("mesh", [*(pytest.param(x, marks=pytest.mark.slow) for x in (None, "dp", "zero1")), "fsdp_tp"])
def test_gradcache_and_chunks_with_an_average_as_teacher(mesh, plain):
    teacher = {"objective__nclip__target": "ema", "model__img__drop_path": 0.5, "model__img__depth": 2}
    p = make("xclip", mesh, optim__microbatches=2, loss__chunk_size=16, **teacher)
    assert_same(gradients(p), plain("xclip", **teacher))
