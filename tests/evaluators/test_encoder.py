import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluators.test_registry import broken
from tests.helpers.encoding import LENGTH, SIZE, K, build_encoder, make_encoder, noise, small_model, tokenize
from xclip_jax.core.errors import UserError
from xclip_jax.data import transforms
from xclip_jax.data.base import LazySequence
from xclip_jax.evaluators import encoder as encoder_module
from xclip_jax.models.two_towers import TwoTowers
from xclip_jax.objectives.similarity import CosineSimilarity

TEXTS = ["fox", "a", "dog", "fox", "cat", "b", "c", "d", "e", "f", "g"]


def test_encoder_equals_the_model_on_any_mesh():
    model, variables = small_model()
    images = noise(21)
    pixels = transforms.normalize(jnp.stack(images), *transforms.STATISTICS["imagenet"])
    tokens = np.stack([tokenize([t], LENGTH)[0] for t in TEXTS])
    out = jax.jit(model.apply)(variables, pixels, jnp.resize(tokens, (21, LENGTH)))
    names = {"features": "h", "embedding": "z", "cluster_logits": "s"}
    expected_img = {key: out[f"{name}_img"] for key, name in names.items()}
    expected_txt = {key: out[f"{name}_txt"][: len(TEXTS)] for key, name in names.items()}
    for devices, batch, sizes in ((1, 16, (-1, 1, 1)), (8, 5, (2, 2, 2))):
        encoder = make_encoder(8, K, devices, batch, sizes)
        texts = encoder.texts(variables, TEXTS)
        for found, expected in ((encoder.images(variables, images), expected_img), (texts, expected_txt)):
            assert set(found) == set(expected)
            for key, value in found.items():
                assert isinstance(value, np.ndarray) and value.dtype == np.float32
                assert found is not texts or (value[0] == value[3]).all()  # equal texts
                np.testing.assert_allclose(value, expected[key], atol=2e-5, rtol=1e-5)


def test_batch_is_rounded_up_to_the_devices():
    model, _ = small_model()
    assert build_encoder(model, 8, 17).batch == 24 and build_encoder(model, 8, 5, (2, 1, 4)).batch == 6
    assert build_encoder(model, 1, batches=(16, 1, 8)).sizes == [1, 8, 16]


@pytest.mark.parametrize(("embed", "clusters", "expected"), [(8, 0, "embedding"), (0, K, "cluster_logits")])
def test_features_follow_the_similarities_and_the_request(embed, clusters, expected):
    _, variables = small_model(embed, clusters)
    encoder = make_encoder(embed, clusters)
    assert set(encoder.images(variables, noise(3))) == {"features", expected}
    assert set(encoder.texts(variables, TEXTS, ("embedding", "cluster_logits"))) == {expected}
    assert encoder.images(variables, [], ("features",))["features"].shape == (0, 16)
    assert encoder.texts(variables, [], ("features",))["features"].shape == (0, 16)


def test_a_head_that_no_similarity_reads_is_left_out():
    encoder = build_encoder(small_model()[0], similarities=(CosineSimilarity(),))
    assert set(encoder.images(small_model()[1], noise(3))) == {"features", "embedding"}


def test_padding_changes_nothing_and_no_shape_is_compiled_twice():
    model, variables = small_model()
    traces = []

    class Counted(TwoTowers):
        def encode_image(self, image):
            traces.append("image")
            return super().encode_image(image)

        def encode_text(self, text):
            traces.append("text")
            return super().encode_text(text)

    encoder = build_encoder(Counted(**{f: getattr(model, f) for f in ("img", "txt", "vocab", "eot_id", "heads")}), 1)
    images = noise(40)
    whole = encoder.images(variables, images)
    for n in (1, 16, 17):
        part = encoder.images(variables, images[:n], ("embedding",))["embedding"]
        np.testing.assert_array_equal(part, whole["embedding"][:n])
        encoder.texts(jax.tree.map(lambda x: x + 0.01, variables), [str(i) for i in range(n)])
    assert sorted(traces) == ["image", "text"]


def test_each_image_is_loaded_once_and_in_its_place():
    images, asked = noise(19), []
    lazy = LazySequence(19, lambda i: asked.append(i) or images[i])
    encoder, variables = make_encoder(8, K, 8, 5, (2, 2, 2)), small_model()[1]
    loaded, whole = (encoder.images(variables, items)["features"] for items in (lazy, images))
    np.testing.assert_array_equal(loaded, whole)
    assert sorted(asked) == list(range(19))


@pytest.mark.parametrize("wrong", [np.zeros((SIZE, SIZE, 1), np.uint8), np.zeros((SIZE, SIZE, 3), np.float32)])
def test_a_wrong_image_raises(wrong):
    _, variables = small_model()
    with pytest.raises(UserError, match=r"^item 0 "):
        make_encoder().images(variables, [wrong])


def test_patches_come_batch_by_batch_on_any_mesh():
    model, variables = small_model()
    images = noise(21)
    pixels = transforms.normalize(jnp.stack(images), *transforms.STATISTICS["imagenet"])
    expected = model.img.patch_features(variables["params"]["img"], pixels, jnp.float32)
    for devices, batch, sizes in ((1, 16, (-1, 1, 1)), (8, 5, (2, 2, 2))):
        encoder = build_encoder(model, devices, batch, sizes)
        assert encoder.grid == 2
        starts, parts = zip(*encoder.patches(variables, broken(images, 17), first=100), strict=True)
        assert starts == tuple(range(0, 21, encoder.batch)) and max(map(len, parts)) == encoder.batch
        h = np.concatenate(parts)
        assert h.dtype == np.float32 and np.isnan(h[17]).all() and list(encoder.unreadable) == [117]
        readable = np.arange(21) != 17
        np.testing.assert_allclose(h[readable], expected[readable], atol=2e-5, rtol=1e-5)


def test_images_are_decoded_in_threads():
    images, both = noise(2), threading.Barrier(2)

    def slow(i):
        both.wait(30)  # only two threads together get past
        return images[i]

    with mock.patch("xclip_jax.data.records.cores", lambda: 4):
        make_encoder().images(small_model()[1], LazySequence(2, slow))


def test_many_texts_are_cut_to_the_longest(monkeypatch):
    monkeypatch.setattr(encoder_module, "_LENGTHS", 2)
    made, variables = build_encoder(small_model()[0], 1, 4), small_model()[1]
    texts = ["".join(chr(100 + (i + j) % 20) for j in range(1 + i % 3)) for i in range(20)]
    tokens, shapes, encode = tokenize(texts, LENGTH), [], made._encode_texts
    made._encode_texts = lambda variables, x, valid: shapes.append(x.shape) or encode(variables, x, valid)
    found = made.tokens(variables, tokens)
    assert set(shapes) == {(4, 4)}  # three letters and the end
    monkeypatch.setattr(encoder_module, "_BATCHES", 100)
    for key, expected in made.tokens(variables, tokens).items():
        np.testing.assert_allclose(found[key], expected, rtol=1e-6, atol=1e-6)
    assert set(shapes) == {(4, 4), (4, LENGTH)}
