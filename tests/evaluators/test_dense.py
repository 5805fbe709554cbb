"""The dense probe: areas of masks, and the probe against scikit-learn and loops."""

import dataclasses
import functools
import io
import types

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import tensorflow_datasets as tfds
from sklearn.linear_model import LogisticRegression

from tests.evaluators.test_registry import broken
from tests.extension.conv_mixer import ConvMixer
from tests.helpers.encoding import PREPARE, SIZE, build_encoder, by_name, make_encoder, small_model
from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import dense, registry
from xclip_jax.evaluators.dense import DenseProbe, DenseSet, MaskedImages
from xclip_jax.evaluators.feature_classifiers import Sweep
from xclip_jax.evaluators.results import Provenance

GRID = 2  # of the small model, whose patches have 4 x 4 pixels
NONE = MaskedImages([], [])


def masked(n, seed, classes=3):
    """Noise that is brighter where a rectangle of a class is, and the masks."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, SIZE, SIZE), np.uint8)
    for mask in masks:
        top, left = rng.integers(0, SIZE - 2, 2)
        mask[top : top + rng.integers(2, SIZE), left : left + rng.integers(2, SIZE)] = rng.integers(0, classes)
    images = rng.integers(0, 120, (n, SIZE, SIZE, 3)) + masks[..., None] * 60
    return MaskedImages(list(images.astype(np.uint8)), list(masks))


def random_set(validation=True, **changes):
    train, held, test = masked(60, 0), masked(20, 1), masked(30, 2)
    return DenseSet("set", ("a", "b", "c"), train, held if validation else NONE, test, PREPARE, **changes)


@functools.cache
def measured():
    return DenseProbe(make_encoder(devices=2), random_set()).measure(small_model()[1])


def shares(mask):
    return np.stack([(mask == c).reshape(GRID, 4, GRID, 4).mean(axis=(1, 3)) for c in range(3)], axis=-1)


# Areas of masks.


def test_areas_are_shares_of_the_labelled_part_of_a_patch():
    mask = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [255, 255, 2, 2], [255, 0, 255, 0]], np.uint8)
    expected = [[[0.75, 0.25, 0], [0, 1, 0]], [[0, 0, 0], [1 / 3, 0, 2 / 3]]]  # of the third a quarter is labelled
    np.testing.assert_allclose(dense.areas(mask, 3, 2, 2, Preprocessing(4)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (150, 231)),
        ({"resize_mode": "squash"}, (231, 150)),
        ({"resize_mode": "longest"}, (150, 231)),
        ({"resize_size": 96}, (231, 150)),
    ],
)
def test_a_mask_is_cut_as_its_image_is(options, shape):
    """A mask drawn in colours and prepared as an image has the same areas."""
    y, x = np.indices(shape)
    mask = ((y > 0.4 * x + 20).astype(np.uint8) + 2 * (x > 90)).astype(np.uint8)
    prepare = Preprocessing(64, **options)
    found = dense.areas(mask, 4, 4, 16, prepare)
    image = prepare(np.stack([np.where(mask == c, 255, 0) for c in (1, 2, 3)], axis=-1).astype(np.uint8))
    expected = image.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(found[..., 1:], expected, atol=0.04)


# The probe.


def test_masks_and_pixels_are_those_of_patches_where_an_image_has_a_remainder():
    """SigLIP's 384 pixels in patches of 14, on a small scale: of 9 pixels the tower sees 8."""
    size = 9
    img = dataclasses.replace(small_model()[0].img, image_size=size, patch=4, pool="map")
    assert not list(img.conflicts())
    encoder = types.SimpleNamespace(grid=img.grid, image_size=size)
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 3, (size, size), np.uint8) for _ in range(6)]
    images = [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(6)]
    part = MaskedImages(images, masks)
    probe = DenseProbe(encoder, DenseSet("set", ("a", "b", "c"), part, NONE, part, PREPARE.with_size(size)))
    np.testing.assert_allclose(probe._labels[1], [shares(mask[:8, :8]) for mask in masks], atol=1e-6)
    ((_, pixels),) = probe._pixels(images, 0)
    np.testing.assert_allclose(pixels[2, 1, 0, :48], images[2][4:8, :4].ravel() / 255)


def test_it_is_scikit_learns_regression_and_loops_over_patches(monkeypatch):
    """Shares as weights of one item per class; areas of intersection and union, one patch after the other."""
    monkeypatch.setattr(dense, "_SWEEP", Sweep((1e-4, 0.3), 0, 1e-6))  # the first predicts next to nothing
    data, variables, encoder = random_set(), small_model()[1], make_encoder(devices=2)
    x, y = {"": [], "pixels/": []}, []
    for part in (data.train, data.validation, data.test):
        x[""].append(np.concatenate([h for _, h in encoder.patches(variables, part.images)]).reshape(-1, 16))
        pixels = np.stack(part.images).reshape(-1, GRID, 4, GRID, 4, 3).swapaxes(2, 3).reshape(-1, 4, 48) / 255
        place = np.broadcast_to(np.eye(4), (len(pixels), 4, 4))
        x["pixels/"].append(np.concatenate([pixels, place], 2).reshape(-1, 52))
        y.append(np.stack([shares(mask) for mask in part.masks]).reshape(-1, 3))
    metrics, items = by_name(DenseProbe(encoder, data).measure(variables))
    target = np.concatenate(y[:2])
    for source, parts in x.items():
        learned = np.concatenate(parts[:2])
        mean, deviation = learned.mean(axis=0), learned.std(axis=0)
        peer = LogisticRegression(C=0.3, max_iter=20_000, tol=1e-6)
        each = np.tile(np.arange(3), len(target))
        peer.fit(np.repeat((learned - mean) / deviation, 3, axis=0), each, sample_weight=target.ravel())
        predicted = peer.predict_proba((parts[2] - mean) / deviation)
        iou = 100 * np.minimum(predicted, y[2]).sum(axis=0) / np.maximum(predicted, y[2]).sum(axis=0)
        for name, value in zip("abc", iou, strict=True):
            assert metrics[f"dense/set/{source}iou/{name}"] == pytest.approx(value, abs=0.05)
        assert metrics[f"dense/set/{source}miou"] == pytest.approx(iou.mean(), abs=0.05)
        right = (predicted.argmax(axis=1) == y[2].argmax(axis=1)).mean()
        assert metrics[f"dense/set/{source}accuracy"] == pytest.approx(100 * right, abs=1)
    sizes = {"n": 30, "train": 80, "ways": 3, "patches": 4, "log10_c": np.log10(0.3)}
    assert {key: metrics[f"dense/set/{key}"] for key in sizes} == pytest.approx(sizes)
    assert set(items) == {f"dense/set/{key}" for key in ("miou", "accuracy", "iou/a", "iou/b", "iou/c")}
    assert metrics["dense/set/miou"] == pytest.approx(items["dense/set/miou"].value())


def test_chance_is_that_of_the_mean_shares_everywhere():
    data, results = random_set(), {r.key: r for r in measured()}
    y = [
        np.stack([shares(mask) for mask in part.masks]).reshape(-1, 3)
        for part in (data.train, data.validation, data.test)
    ]
    constant = np.concatenate(y[:2]).mean(axis=0)
    iou = np.minimum(constant, y[2]).sum(axis=0) / np.maximum(constant, y[2]).sum(axis=0)
    assert results["miou"].chance == pytest.approx(100 * iou.mean())
    assert results["iou/b"].chance == pytest.approx(100 * iou[1])
    assert results["accuracy"].chance == pytest.approx(100 * np.mean(y[2].argmax(axis=1) == constant.argmax()))
    assert results["miou"].value > results["miou"].chance and results["pixels/miou"].value > results["miou"].chance


def test_probes_of_other_patches_or_views_have_another_protocol():
    """So they are not compared: their targets differ. How pixels are interpolated does not change the target."""
    model = small_model()[0]
    small = build_encoder(model.clone(img=dataclasses.replace(model.img, patch=2)))
    data = random_set(card=Provenance(protocol="p; q", metric="miou"))

    def protocol(encoder=None, **changes):
        changed = dataclasses.replace(data, prepare=dataclasses.replace(PREPARE, **changes))
        return DenseProbe(encoder or make_encoder(), changed).data.card.protocol

    assert protocol() == protocol(interpolation="bilinear") and protocol().endswith("; p; q")
    assert protocol().startswith("2 x 2 patches of 4 px in images of 8 px")
    assert len({protocol(), protocol(small), protocol(resize_mode="squash")}) == 3


class Searched(Exception):
    pass


def test_patches_are_drawn_from_too_many(monkeypatch):
    """Some fit and others choose C, here patches whose feature is their index."""
    searched = []

    def search(train, validation, *_):
        searched.extend((train[0], validation[0]))
        raise Searched

    def encode(images, first):
        for start in range(0, len(images), 7):
            index = np.arange(4 * start, 4 * min(start + 7, len(images)), dtype=np.float32)
            yield start, index.reshape(-1, GRID, GRID, 1)

    monkeypatch.setattr(dense, "MAX_PATCHES", (50, 20))
    monkeypatch.setattr(dense, "search", search)
    probe = DenseProbe(make_encoder(), random_set(validation=False))
    fitted, held = probe._chosen
    assert len(fitted) == 50 and len(held) == 20 and (np.diff(fitted) > 0).all()
    assert not set(fitted // 4) & set(held // 4) and len(set(held // 4)) <= 6  # images are on one side
    with pytest.raises(Searched):
        probe._predict(encode)
    both = np.concatenate([fitted, held])
    for x, index in zip(searched, (fitted, held), strict=True):
        np.testing.assert_allclose(x[:, 0] * both.std() + both.mean(), index, atol=1e-3)


def test_an_unreadable_test_image_is_wrong_and_one_of_training_left_out():
    data = random_set()
    train, test = (dataclasses.replace(part, images=broken(part.images, 3)) for part in (data.train, data.test))
    results = registry.measure(DenseProbe(make_encoder(), dataclasses.replace(data, test=test)), small_model()[1])
    before, after = (by_name(r)[1]["dense/set/miou"] for r in (measured(), results))
    rest = np.arange(30) != 3
    np.testing.assert_allclose(after.values[rest], before.values[rest], atol=1e-6)
    assert not after.values[3].any() and after.other[3].sum() == pytest.approx(4)
    data = dataclasses.replace(data, train=train, test=test)
    both = registry.measure(DenseProbe(make_encoder(), data), small_model()[1])
    assert [by_name(r)[0]["dense/set/unreadable"] for r in (results, both)] == [1, 2]


def test_a_model_that_diverged_is_wrong_everywhere():
    nans = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), small_model()[1])
    metrics = DenseProbe(make_encoder(), random_set(prompts=[["a"], ["b"], ["c"]])).run(nans)
    for key in ("miou", "accuracy", "zeroshot/miou"):
        assert metrics[f"dense/set/{key}"] == 0, key
    assert metrics["dense/set/pixels/miou"] > 0 and "dense/set/log10_c" not in metrics


def test_items_are_grouped_and_classes_that_the_test_lacks_do_not_count():
    data = random_set()
    groups = np.arange(30) // 5
    test = dataclasses.replace(data.test, masks=[np.minimum(m, 1) for m in data.test.masks])
    data = dataclasses.replace(data, test=test, together=groups)
    metrics, items = by_name(DenseProbe(make_encoder(), data).measure(small_model()[1]))
    assert "dense/set/iou/c" not in metrics
    assert metrics["dense/set/miou"] == pytest.approx((metrics["dense/set/iou/a"] + metrics["dense/set/iou/b"]) / 2)
    assert all((item.groups == groups).all() for item in items.values())


# Zero-shot segmentation.


def bilinear(scores, size):
    """Scores (grid, grid, classes) at the centres of patches, at each of size x size pixels."""
    places = (np.indices((size, size)) + 0.5) * len(scores) / size - 0.5
    planes = np.moveaxis(scores, -1, 0)
    return np.stack([scipy.ndimage.map_coordinates(x, places, order=1, mode="nearest") for x in planes], axis=-1)


@pytest.mark.parametrize("unreadable", [(), (3,)])
def test_zero_shot_segmentation_is_a_loop_over_pixels(unreadable):
    prompts = [["a dark", "dark b"], ["grey c", "d grey"], ["light", "so light"]]
    data, variables, encoder = random_set(prompts=prompts), small_model()[1], make_encoder()
    masks = [np.where(np.arange(SIZE)[:, None] == 2, 255, mask).astype(np.uint8) for mask in data.test.masks]
    data = dataclasses.replace(data, test=MaskedImages(broken(data.test.images, *unreadable), masks))
    model = small_model()[0]
    rows = []
    for texts in prompts:
        z = encoder.texts(variables, texts)["embedding"].mean(axis=0)
        rows.append(z / np.linalg.norm(z))
    h = np.concatenate([h for _, h in encoder.patches(variables, random_set().test.images)])
    z = np.array(model.apply(variables, h.reshape(-1, 16), None, method="project")["z_img"]).reshape(30, GRID, GRID, -1)
    inside, union = np.zeros(3), np.zeros(3)
    for i, mask in enumerate(masks):
        predicted = bilinear(z[i] @ np.stack(rows).T, SIZE).argmax(axis=-1)
        for true, guess in zip(mask.ravel(), predicted.ravel(), strict=True):
            if true == 255:
                continue
            inside[true] += i not in unreadable and true == guess
            union[list({true} if i in unreadable else {true, guess})] += 1
    results = {r.key: r for r in registry.measure(DenseProbe(encoder, data), variables)}
    for i, name in enumerate("abc"):
        assert results[f"zeroshot/iou/{name}"].value == pytest.approx(100 * inside[i] / union[i], abs=1e-4)
    assert results["zeroshot/miou"].value == pytest.approx(100 * (inside / union).mean(), abs=1e-4)
    assert results["zeroshot/miou"].items.value() == pytest.approx(results["zeroshot/miou"].value)
    assert results["miou"].headline and 0 < results["zeroshot/miou"].value < 100
    assert ("unreadable" in results) == bool(unreadable)


def test_a_model_of_clusters_has_no_zero_shot_segmentation():
    data = random_set(prompts=[["a"], ["b"], ["c"]])
    encoder, variables = make_encoder(0, 10), small_model(0, 10)[1]
    few = dataclasses.replace(data, train=masked(12, 0), validation=masked(6, 1), test=masked(6, 2))
    metrics = DenseProbe(encoder, few).run(variables)
    assert "dense/set/zeroshot/miou" not in metrics and "dense/set/miou" in metrics


def test_a_tower_without_patch_features_is_refused():
    other = small_model()[0].clone(img=ConvMixer(image_size=SIZE, patch=4, width=16, depth=1))
    with pytest.raises(UserError, match=r"^set: .*patch_features"):
        DenseProbe(build_encoder(other), random_set())


def test_pets_outlines_have_no_class():
    def records(builder, split, decoders):
        assert "image" in decoders
        png, trimap = io.BytesIO(), np.ones((9, 12, 1), np.uint8)
        trimap[:, 6:], trimap[:, 5] = 2, 3
        PIL.Image.new("RGB", (12, 9)).save(png, "png")
        return [{"image": png.getvalue(), "segmentation_mask": trimap}] * 3

    with tfds.testing.mock_data(as_data_source_fn=records):
        data = registry.load("dense/pets", PREPARE)
    assert (len(data.train.images), len(data.validation.images), len(data.test.images)) == (3, 0, 3)
    assert data.classes == ["pet", "background"]
    assert data.train.masks[0][0].tolist() == [0] * 5 + [255] + [1] * 6
    assert data.card.data == "oxford_iiit_pet" and data.card.version and data.card.split_hash
    assert [len(texts) for texts in data.prompts] == [80, 80] and "a photo of a pet." in data.prompts[0]
