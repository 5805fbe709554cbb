import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import tiny
from xclip_jax import optim
from xclip_jax.config import schema
from xclip_jax.data import loader, transforms
from xclip_jax.objectives.objective import make_objective
from xclip_jax.train import build, state
from xclip_jax.train.step import BatchNoise, TrainStep

pytestmark = pytest.mark.long

TEACHER = {"objective__nclip__target": "ema"}
PLAIN = {"data__flip_prob": 0.0, "data__color_jitter": 0.0}


def make(objective, devices=8, **changes):
    return build.build(tiny.config(objective, **changes), jax.devices()[:devices])


def catching(p):
    """The step with an optimizer that keeps the gradient as its state, and a first state for it."""
    catch = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, _, params=None: (grads, grads)
    )
    s = tiny.drawn(p)
    return jax.jit(dataclasses.replace(p, tx=catch).step), s.replace(opt_state=catch.init(s.params))


def gradients(p):
    step, s = catching(p)
    s, metrics = step(s, loader.to_global(tiny.batch(eot=p.tokenizer.eot_id), p.mesh))
    return float(metrics["loss"]), jax.device_get(s.opt_state)


def test_terms_are_given_the_place_of_the_end_token():
    p = make("clip", devices=1)
    inputs = tiny.batch(eot=p.tokenizer.eot_id)
    step = TrainStep(p.model, p.tx, p.objective, batch_noise=None, momentum=None)
    given = step._batch(tiny.drawn(p), inputs)
    assert given["text_end"].tolist() == [row.tolist().index(p.tokenizer.eot_id) for row in inputs["text"]]


def test_a_term_of_texts_alone_gets_its_draws():
    p = make("clip", devices=1)
    drawn = {"x": jnp.zeros(3)}
    objective = types.SimpleNamespace(towers=("txt",), draw=lambda random_key, inputs, size: inputs | drawn)
    noise = BatchNoise(p.config.data, p.preprocessing, objective, {"txt": p.model.txt})
    assert noise.sample(jax.random.key(0), {"text": jnp.zeros((3, 2), int)})["x"] is drawn["x"]


def test_the_logit_scale_is_bounded_by_clip_alone():
    """CLIP's paper bounds it by 100, SigLIP's not: published SigLIP weights have 117."""
    p = make("clip", devices=1, optim__warmup=0, optim__lr=1e-6, optim__lr_end=0.0)
    first, batch = tiny.drawn(p), loader.to_global(tiny.batch(eot=p.tokenizer.eot_id), p.mesh)
    for start, end in ((117.33, 100.0), (20.0, 20.0)):
        s = jax.tree.map(jnp.copy, first)  # a step donates its state
        s = s.replace(params=s.params | {"log_scale": jnp.log(jnp.float32(start))})
        s, metrics = p.compiled(s, batch)
        assert not metrics["skipped"]
        # The bound acts on the update, not in the forward pass, where it would leave no gradient to come back from it.
        assert [float(x) for name, x in metrics.items() if name.endswith("/scale")] == [pytest.approx(start, rel=1e-5)]
        assert float(jnp.exp(s.params["log_scale"])) == pytest.approx(end, rel=1e-5)
    params = {"log_scale": jnp.log(jnp.float32(117.33))}
    siglip = make_objective(schema.resolve(tiny.config("siglip")).objective)
    assert siglip.constrain(params)["log_scale"] == params["log_scale"]


def test_randomness_moves_with_the_step_and_the_seed():
    p = make("clip", 1)
    s = tiny.drawn(p)
    batch = loader.to_global(tiny.batch(eot=p.tokenizer.eot_id), p.mesh)
    step = jax.jit(p.step)
    losses = {
        float(step(s.replace(step=jnp.int32(at), seed=jnp.uint32(seed)), batch)[1]["loss"])
        for at, seed in ((0, 0), (1, 0), (0, 1))
    }
    assert len(losses) == 3  # other flips and colours


def test_parameters_are_what_the_abstract_state_says():
    p = make("xclip", **TEACHER)
    s = state.create(p.init, p.abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(s, p.abstract)
    assert all(x.sharding == a.sharding for x, a in zip(jax.tree.leaves(s), jax.tree.leaves(p.abstract), strict=True))


def test_compiled_once_and_donated_and_the_average_follows_its_formula():
    """The average of the parameters, and of the statistics of BatchNorm, which have no teacher here."""
    p = make("xclip", steps=10, ema__momentum=0.9, objective__terms={"clip": 0.25, "nclip": 0.5})
    s = tiny.drawn(p)
    expected = jax.tree.map(np.array, s.variables(ema=True))  # a view would keep the buffers
    for i in range(3):
        before = s
        s, metrics = p.compiled(s, loader.to_global(tiny.batch(i, eot=p.tokenizer.eot_id), p.mesh))
        metrics = jax.device_get(metrics)
        assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state, before.ema_params)))
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["loss"] == pytest.approx(0.25 * metrics["clip/loss"] + 0.5 * metrics["nclip/loss"], rel=1e-6)
        m = float(optim.ema_momentum(i, 10, 0.9))
        expected = jax.tree.map(lambda e, x, m=m: m * e + (1 - m) * x, expected, jax.device_get(s.variables()))
    assert p.compiled._cache_size() == 1 and s.step == 3
    assert jax.tree.leaves(expected["batch_stats"])
    chex.assert_trees_all_close(jax.device_get(s.variables(ema=True)), expected, rtol=1e-5, atol=1e-7)


def projected(p, variables, batch):
    """What the heads write of the batch as it is, and the statistics of BatchNorm that they get by it."""
    images = transforms.normalize(jnp.asarray(batch["image"]), *transforms.STATISTICS["imagenet"])
    inputs = {"image": images, "text": batch["text"]}
    h = [p.model.apply(variables, x, method=f"encode_{name}") for name, x in inputs.items()]
    out, new = p.model.apply(variables, *h, train=True, mutable=["batch_stats"], method="project")
    return out, new["batch_stats"]


def test_a_teacher_has_the_statistics_of_its_own_features():
    p = make("xclip", 1, **TEACHER, **PLAIN, ema__momentum=0.9, optim__lr=0.1, optim__warmup=0)
    s = tiny.drawn(p)
    for i in range(3):
        batch = tiny.batch(i, eot=p.tokenizer.eot_id)
        before = jax.device_get(s)
        s, _ = p.compiled(s, loader.to_global(batch, p.mesh))
    _, expected = projected(p, {"params": before.ema_params, "batch_stats": before.ema_batch_stats}, batch)
    average = jax.device_get(s).variables(ema=True)["batch_stats"]
    chex.assert_trees_all_close(average, expected, rtol=1e-4, atol=1e-5)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), average, jax.device_get(s.batch_stats))
    assert max(jax.tree.leaves(differences)) > 1e-2


def test_idle_head_changes_nothing():
    """xCLIP without weight on nCLIP is CLIP with as many parameters: the control for model size."""
    loss, idle = gradients(make("xclip", 1, objective__terms={"clip": 1.0, "nclip": 0.0}))
    clip_loss, clip = gradients(make("clip", 1))
    heads = [idle.pop(name) for name in ("clusters_img", "clusters_txt")]
    assert not any(g.any() for g in jax.tree.leaves(heads))
    assert loss == pytest.approx(clip_loss, rel=1e-6)
    assert clip.keys() == {"img", "txt", "proj_img", "proj_txt", "log_scale"}
    assert all(max(np.abs(g).max() for g in jax.tree.leaves(part)) > 1e-4 for part in clip.values())
    chex.assert_trees_all_close(idle, clip, rtol=1e-5, atol=1e-7)
