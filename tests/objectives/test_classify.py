import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.helpers import tiny
from tests.train.test_step import catching
from xclip_jax import optim
from xclip_jax.core.errors import UserError
from xclip_jax.data import loader, transforms
from xclip_jax.objectives.classify import Classify
from xclip_jax.train import build
from xclip_jax.train.step import BatchNoise

pytestmark = pytest.mark.long


def draw_mix(mixup, cutmix, n=400):
    draw = jax.jit(jax.vmap(lambda key: transforms.sample_mix(key, 2, 20, mixup, cutmix)))
    return jax.device_get(draw(jax.random.split(jax.random.key(1), n)))


def test_mixup_is_a_weighted_mean_and_its_share_is_beta():
    found = draw_mix(0.8, 0.0)
    assert (found["box"] == 0).all() and (found["share"] == found["weight"]).all()
    assert (found["share"][:, 0] == found["share"][:, 1]).all()  # one share a batch
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert found["share"].mean() == pytest.approx(0.5, abs=0.05)
    assert found["share"][:, 0].var() == pytest.approx(1 / (4 * 2.6), rel=0.15)
    images, others = (np.random.default_rng(i).normal(size=(2, 20, 20, 3)) for i in range(2))
    mixed = transforms.mix(images, others, {key: value[7] for key, value in found.items()})
    share = found["share"][7, 0]
    np.testing.assert_allclose(mixed, share * images + (1 - share) * others, rtol=1e-4, atol=1e-5)


def test_cutmix_pastes_a_box_and_the_share_is_what_is_left():
    found = draw_mix(0.0, 1.0)
    images, others = np.zeros((2, 20, 20, 3)), np.ones((2, 20, 20, 3))
    mixed = np.asarray(jax.vmap(lambda drawn: transforms.mix(images, others, drawn))(found))
    assert set(np.unique(mixed)) == {0, 1}
    np.testing.assert_allclose(1 - mixed.mean(axis=(2, 3, 4)), found["share"], atol=1e-6)
    for box, image in zip(found["box"][:50, 0], mixed[:50, 0], strict=True):
        top, bottom, left, right = box
        assert image[top:bottom, left:right].all() and image.sum() == 3 * (bottom - top) * (right - left)
    # Boxes that cross the border are cut, so more is left than the mean of Beta(1, 1).
    assert 0.6 < found["share"].mean() < 0.8


def test_half_of_the_batches_are_cut():
    cut = (draw_mix(0.8, 1.0)["weight"] == 1).mean()
    assert cut == pytest.approx(0.5, abs=0.08)


def layer_tree(scanned):
    c = tiny.config("clip", model__img__depth=3, model__txt__depth=2, init__weights="x", finetune__lora__rank=2)
    c.model.scan = scanned
    p = build.build(c, jax.devices()[:1])
    return p.abstract.params, {"img": p.model.img, "txt": p.model.txt}


@pytest.mark.parametrize("scanned", [False, True])
def test_layer_decay_is_beits(scanned):
    """BEiT numbers layers: 0 for patches, class token and positions, i + 1 for block i, the last for what follows."""
    params, towers = layer_tree(scanned)
    scales = optim.layer_scales(params, 0.5, towers)
    chex.assert_trees_all_equal_structs(scales, params)
    expected = {"patches": 0, "positions": 0, "cls": 0, "norm_pre": 0, "norm_post": 4}
    for name, layer in expected.items():
        assert set(jax.tree.leaves(scales["img"][name])) == {0.5 ** (4 - layer)}, name
    assert scales["txt"]["tokens"] == 0.5**3 and set(jax.tree.leaves(scales["proj_img"])) == {1.0}
    for part, arrays in ((scales, params), (scales["lora"], params["lora"])):
        blocks = part["img"]["transformer"]
        if scanned:
            for leaf, x in zip(jax.tree.leaves(blocks), jax.tree.leaves(arrays["img"]["transformer"]), strict=True):
                assert np.ravel(leaf).tolist() == [0.125, 0.25, 0.5] and np.ndim(leaf) == x.ndim
        else:
            assert [set(jax.tree.leaves(blocks[f"block_{i}"])) for i in range(3)] == [{0.125}, {0.25}, {0.5}]


def test_layer_decay_scales_the_update_with_its_weight_decay():
    shapes, towers = layer_tree(False)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    options = {"lr": 0.1, "schedule": "constant", "weight_decay": 0.3}
    plain, decayed = (optim.make_optimizer(optim.OptimConfig(**options, layer_decay=d), 10, towers) for d in (1.0, 0.5))
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    one, other = (jax.jit(lambda tx=tx: tx.update(grads, tx.init(params), params)[0])() for tx in (plain, decayed))
    scales = optim.layer_scales(params, 0.5, towers)
    chex.assert_trees_all_close(other, jax.tree.map(lambda x, s: x * s, one, scales), rtol=1e-6)


IMAGES = {
    "objective__classify": {"classes": 3, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
    "optim__layer_decay": 0.65,
    "model__img__drop_path": 0.3,
}
TEXTS = {"objective__classify__tower": "txt", "objective__classify__classes": 2}


def make(devices=8, **changes):
    return build.build(tiny.config("classify", **changes), jax.devices()[:devices])


def batch(p, seed=0):
    whole = tiny.batch(seed, eot=p.tokenizer.eot_id)
    whole["label"] = np.random.default_rng(seed).integers(0, p.objective.classes, tiny.BATCH, dtype=np.int32)
    return {field: whole[field] for field in p.objective.fields}


def gradients(p):
    step, s = catching(p)
    s, metrics = step(s, loader.to_global(batch(p), p.mesh))
    return jax.device_get(metrics), jax.device_get(s.opt_state)


@pytest.mark.slow  # minutes of compilation
def test_one_device_against_eight_and_one_part_against_two():
    images = IMAGES | {"model__img__depth": 2}
    one, grads_1 = gradients(make(1, **images))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads_1))
    assert largest > 1e-3
    for other in (make(8, **images, optim__microbatches=n) for n in (1, 2)):
        found, grads = gradients(other)
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-5)
        chex.assert_trees_all_close(grads, grads_1, rtol=1e-5, atol=1e-5 * largest)


def test_each_random_input_of_a_step_has_a_key_of_its_own(monkeypatch):
    p = make(1, **IMAGES | {"model__img__depth": 2}, data__flip_prob=0.5, data__color_jitter=0.2)
    used = []

    def record(original, key, *arguments, **options):
        used.append(np.asarray(jax.random.key_data(key)).tobytes())
        return original(key, *arguments, **options)

    for name in ("split", "uniform", "bernoulli", "beta", "randint"):
        monkeypatch.setattr(jax.random, name, functools.partial(record, getattr(jax.random, name)))
    inputs = BatchNoise(p.config.data, p.preprocessing, p.objective, {"img": p.model.img}).sample(
        jax.random.key(0), batch(p)
    )
    assert {"flip", "color", "share", "noise"} <= inputs.keys() and inputs["noise"]["img"].keys() == {"paths"}
    assert len(used) >= 7 and len(set(used)) == len(used)


def test_mixed_images_and_labels_belong_together():
    """The step's loss is the cross-entropy of the model's logits on mixed images and equally mixed labels.

    Each has another one of the whole batch, on eight devices and in microbatches too.
    """
    plain = {"data__flip_prob": 0.0, "data__color_jitter": 0.0, "model__img__drop_path": 0.0}
    p = make(8, **IMAGES | plain, optim__microbatches=2)
    s, b = tiny.drawn(p), batch(p)
    metrics = jax.jit(lambda *args: p.step(*args)[1])(s, loader.to_global(b, p.mesh))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(s.seed), s.step), 1)
    drawn = transforms.sample_mix(key, tiny.BATCH, tiny.SIZE, 0.8, 1.0)
    pixels = transforms.normalize(jnp.asarray(b["image"]), *transforms.STATISTICS["imagenet"])
    mixed = transforms.mix(pixels, pixels[::-1], drawn)
    logits = np.asarray(jax.jit(lambda x: p.model.apply(s.variables(), x, None))(mixed)["logits"])
    target = 0.9 * np.eye(3)[b["label"]] + 0.1 / 3
    share = np.asarray(drawn["share"])[:, None]
    assert 0.01 < share[0, 0] < 0.99
    target = share * target + (1 - share) * target[::-1]
    expected = -(target * scipy.special.log_softmax(logits, axis=1)).sum(axis=1).mean()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["classify/top1"]) == pytest.approx((logits.argmax(axis=1) == b["label"]).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"objective\.classify\.classes is 0"),
        (TEXTS | {"objective__classify__tower": "both"}, r"tower is 'both'"),
        (TEXTS | {"objective__classify__mixup": 0.8}, "mixup and .cutmix need images"),
    ],
)
def test_wrong_objectives(changes, message):
    with pytest.raises(UserError, match=message):
        make(1, **changes)


def test_one_class_is_a_regression():
    logits, gold = jnp.array([[0.5], [-1.0], [2.0]]), jnp.array([0.0, 1.0, 5.0])
    loss, *_ = Classify(classes=1)({"logits": logits}, None, {}, {"label": gold})
    assert float(loss) == pytest.approx((0.25 + 4 + 9) / 3)
