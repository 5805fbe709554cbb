import threading
import time
import tracemalloc
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluators.test_registry import broken
from tests.helpers.encoding import LENGTH, SIZE, K, build_encoder, make_encoder, small_model, tokenize
from xclip_jax.core.errors import UserError
from xclip_jax.data import transforms
from xclip_jax.data.base import LazySequence
from xclip_jax.evaluators import encoder as encoder_module
from xclip_jax.models.two_towers import TwoTowers
from xclip_jax.objectives.similarity import CosineSimilarity


def rng(seed=0):
    return np.random.default_rng(seed)


def pictures(n, size=SIZE):
    return list(rng(n).integers(0, 256, (n, size, size, 3), np.uint8))


TEXTS = ["fox", "a", "dog", "fox", "cat", "b", "c", "d", "e", "f", "g"]


def test_encoder_equals_the_model_on_any_mesh():
    model, variables = small_model()
    images = pictures(21)
    pixels = transforms.normalize(jnp.stack(images), *transforms.STATISTICS["imagenet"])
    tokens = np.stack([tokenize([t], LENGTH)[0] for t in TEXTS])
    out = jax.jit(model.apply)(variables, pixels, jnp.resize(tokens, (21, LENGTH)))
    names = {"features": "h", "embedding": "z", "cluster_logits": "s"}
    expected_img = {key: out[f"{name}_img"] for key, name in names.items()}
    expected_txt = {key: out[f"{name}_txt"][: len(TEXTS)] for key, name in names.items()}
    for devices, batch, sizes in ((1, 16, (-1, 1, 1)), (8, 16, (-1, 1, 1)), (8, 5, (2, 2, 2))):
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
    assert build_encoder(model, 8, 5).batch == 8
    assert build_encoder(model, 8, 17).batch == 24
    assert build_encoder(model, 8, 5, (2, 1, 4)).batch == 6


@pytest.mark.parametrize(("embed", "clusters", "expected"), [(8, 0, "embedding"), (0, K, "cluster_logits")])
def test_features_follow_the_similarities_and_the_request(embed, clusters, expected):
    _, variables = small_model(embed, clusters)
    encoder = make_encoder(embed, clusters)
    assert set(encoder.images(variables, pictures(3))) == {"features", expected}
    assert set(encoder.texts(variables, TEXTS, ("embedding", "cluster_logits"))) == {expected}
    assert encoder.images(variables, [], ("features",))["features"].shape == (0, 16)
    assert encoder.texts(variables, [], ("features",))["features"].shape == (0, 16)


def test_a_head_that_no_similarity_reads_is_left_out():
    """Of a model with both heads, the encoder of one similarity returns its output alone."""
    model, variables = small_model()
    encoder = build_encoder(model, similarities=(CosineSimilarity(),))
    features = encoder.images(variables, pictures(3))
    assert set(features) == {"features", "embedding"}
    expected = make_encoder().images(variables, pictures(3), ("embedding",))["embedding"]
    np.testing.assert_allclose(features["embedding"], expected, atol=1e-6)


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

    counted = Counted(**{f: getattr(model, f) for f in ("img", "txt", "vocab", "eot_id", "heads")})
    encoder = build_encoder(counted)
    images = pictures(40)
    whole = encoder.images(variables, images)
    for n in (1, 15, 16, 17, 40):
        part = encoder.images(variables, images[:n], ("embedding",))["embedding"]
        np.testing.assert_array_equal(part, whole["embedding"][:n])
        encoder.texts(jax.tree.map(lambda x: x + 0.01, variables), [str(i) for i in range(n)])
    assert sorted(traces) == ["image", "text"]


def test_images_may_be_loaded_when_asked_for_and_each_once():
    _, variables = small_model()
    images, asked = pictures(19), []
    asking = LazySequence(19, lambda i: asked.append(i) or images[i])
    encoder = make_encoder(8, K, 8, 5, (2, 2, 2))
    lazy, eager = (encoder.images(variables, items)["features"] for items in (asking, images))
    np.testing.assert_array_equal(lazy, eager)
    assert sorted(asked) == list(range(19))


@pytest.mark.parametrize("wrong", [np.zeros((SIZE, SIZE, 1), np.uint8), np.zeros((SIZE, SIZE, 3), np.float32)])
def test_a_wrong_image_raises(wrong):
    _, variables = small_model()
    with pytest.raises(UserError, match="item 0"):
        make_encoder().images(variables, [wrong])


def test_patches_come_batch_by_batch_on_any_mesh():
    model, variables = small_model()
    images = pictures(21)
    pixels = transforms.normalize(jnp.stack(images), *transforms.STATISTICS["imagenet"])
    expected = model.img.patch_features(variables["params"]["img"], pixels, jnp.float32)
    for devices, batch, sizes in ((1, 16, (-1, 1, 1)), (8, 16, (-1, 1, 1)), (8, 5, (2, 2, 2))):
        encoder = build_encoder(model, devices, batch, sizes)
        assert encoder.grid == 2
        starts, parts = zip(*encoder.patches(variables, broken(images, 17), first=100), strict=True)
        assert starts == tuple(range(0, 21, encoder.batch)) and max(map(len, parts)) == encoder.batch
        h = np.concatenate(parts)
        assert h.dtype == np.float32 and np.isnan(h[17]).all() and list(encoder.unreadable) == [117]
        readable = np.arange(21) != 17
        np.testing.assert_allclose(h[readable], expected[readable], atol=2e-5, rtol=1e-5)


def test_images_are_decoded_in_threads_and_keep_their_places():
    encoder, variables = make_encoder(), small_model()[1]
    images, both = pictures(9), threading.Barrier(2)

    def slow(i):
        if i < 2:
            both.wait(30)  # only two threads together get past
        time.sleep(0.01 * (i % 3))
        return images[i]

    with mock.patch("xclip_jax.data.records.cores", lambda: 4):
        features = encoder.images(variables, LazySequence(9, slow))["features"]
    np.testing.assert_array_equal(features, encoder.images(variables, images)["features"])


def test_features_are_held_once():
    """Each batch goes to its place: joined at the end they would need their memory twice."""
    encoder, rows = make_encoder(), np.arange(16 * 100 + 3)

    def encode(variables, x, valid):
        return {"features": np.repeat(np.asarray(x, np.float32), 5000, axis=1)}

    tracemalloc.start()
    h = encoder._run(encode, None, rows[:, None].astype(np.int32), jax.ShapeDtypeStruct((1,), np.int32), ("features",))[
        "features"
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(h[:, 0], rows)
    assert h.shape == (len(rows), 5000) and peak < 1.3 * h.nbytes


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
