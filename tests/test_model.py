import functools
import io
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.special
from flax import nnx
from PIL import Image

import xclip_jax
from tests.helpers import tiny
from tests.helpers.util import jit, random_variables
from xclip_jax import model as inference
from xclip_jax.core.errors import UserError
from xclip_jax.data import tokenizer, transforms
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.train import build, weights
from xclip_jax.train.build import make_encoder

TEXTS = ["a fox", "a hen", "what a long text this one is", "", "a fox"]


@pytest.fixture(scope="module")
def model(run):
    return xclip_jax.load(run, batch=16)


@functools.cache
def random_model(objective):
    parts = build.build(tiny.config(objective, data__normalization="half", data__resample="area"))
    image, text = jnp.zeros((1, tiny.SIZE, tiny.SIZE, 3)), jnp.zeros((1, tiny.LENGTH), jnp.int32)
    variables = random_variables(parts.model, image, text)
    return parts.model, variables, inference.Model(parts, variables, {}, batch=8)


def pictures(n=5, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (20 + 3 * i, 30 - i % 9, 3), dtype=np.uint8) for i in range(n)]


def encoded(picture, kind="png"):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind)
    return out.getvalue()


def test_a_run_gives_what_its_evaluators_see(run, model):
    _, found, variables, *_ = weights.load(str(run))
    encoder = make_encoder(found)
    images = pictures()
    prepared = list(map(Preprocessing(tiny.SIZE), map(encoded, images)))
    np.testing.assert_allclose(model.encode_image(images), encoder.images(variables, prepared)["embedding"], atol=2e-6)
    np.testing.assert_allclose(model.encode_text(TEXTS), encoder.texts(variables, TEXTS)["embedding"], atol=2e-6)
    assert model._encoder.sizes == [8, 16]  # on eight devices
    assert model.card["step"] == 0 and model.card["objective"] == "xclip"
    assert xclip_jax.load(run, step=0).fingerprint() == model.fingerprint()
    assert weights.fingerprint(found, variables) == model.fingerprint()  # whatever a CPU makes of the weights
    other = jax.tree.map(lambda x: x, variables)
    other["params"]["img"]["cls"] = other["params"]["img"]["cls"] + 1
    assert weights.fingerprint(found, other) != model.fingerprint()


TAU = 0.5  # of the recipe


@pytest.mark.parametrize("objective", ["clip", "nclip"])
def test_embeddings_are_those_of_the_towers(objective):
    """Against `TwoTowers.apply` and NumPy; nCLIP's are its distributions, of unit length."""
    towers, variables, model = random_model(objective)
    mean, std = (np.asarray(x, np.float32) for x in transforms.STATISTICS["half"])
    pixels = np.stack(list(map(Preprocessing(tiny.SIZE), pictures())))
    pixels = ((pixels / 255 - mean) / std).astype(np.float32)
    tokens = tokenizer.load("bytes")(TEXTS, tiny.LENGTH)
    out = jax.device_get(jit(towers.apply)(variables, pixels, tokens))

    def expected(kind):
        if objective == "clip":
            return out[f"z_{kind}"]
        p = np.exp(out[f"s_{kind}"] / TAU) / np.exp(out[f"s_{kind}"] / TAU).sum(axis=1, keepdims=True)
        return p / np.linalg.norm(p, axis=1, keepdims=True)

    for found, kind in (
        (model.encode_image(pictures()), "img"),
        (model.encode_pixels(pixels), "img"),
        (model.encode_text(TEXTS), "txt"),
        (model.encode_tokens(tokens), "txt"),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected(kind), atol=3e-6)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_as_a_module_of_nnx_it_is_the_same_model_and_trains():
    """Outputs and gradients are Linen's; steps change the module, and not the model that it was made from."""
    towers, variables, model = random_model("clip")
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(4, tiny.SIZE, tiny.SIZE, 3)).astype(np.float32)
    tokens = tokenizer.load("bytes")(TEXTS[:4], tiny.LENGTH)
    module, before = model.nnx(), model.encode_text(TEXTS)

    def loss(out):
        return -jnp.diag(jax.nn.log_softmax(out["scale"] * out["z_img"] @ out["z_txt"].T)).mean(), out

    @nnx.jit
    def step(module, optimizer):
        found, grads = nnx.value_and_grad(lambda module: loss(module(pixels, tokens)), has_aux=True)(module)
        optimizer.update(module, grads)
        return *found, grads["proj_txt"]["linear"]["kernel"]

    def linen(params):
        return loss(towers.apply({**variables, "params": params}, pixels, tokens))

    optimizer = nnx.Optimizer(module, optax.sgd(0.05), wrt=nnx.Param)
    (before_step, found, grad), (after_step, *_) = (step(module, optimizer) for _ in range(2))
    (_, expected), gradient = jit(jax.value_and_grad(linen, has_aux=True))(variables["params"])
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(grad[...], gradient["proj_txt"]["linear"]["kernel"], atol=1e-5)
    assert after_step < before_step
    assert module.encode_image(pixels).shape == (4, 32)
    np.testing.assert_array_equal(model.encode_text(TEXTS), before)


def test_images_in_every_form_are_the_same(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images = pictures(3)
    for i, picture in enumerate(images):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture))
    expected = model.encode_image(images)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    in_home = [f"~/{path.name}" for path in paths]
    for form in (paths, iter(paths), in_home, [encoded(p) for p in images], list(map(Image.open, paths))):
        np.testing.assert_array_equal(model.encode_image(form), expected)
    same = np.stack([np.resize(p, (21, 21, 3)) for p in images])
    np.testing.assert_array_equal(model.encode_image(same), model.encode_image(list(same)))


def test_nothing_in_nothing_out(model):
    for found in (model.encode_image([]), model.encode_text([])):
        assert found.shape == (0, 16) and found.dtype == np.float32


def test_texts_and_class_names_may_be_arrays_and_generators(model):
    np.testing.assert_array_equal(model.encode_text(text for text in TEXTS), model.encode_text(TEXTS))
    expected = model.zero_shot(pictures(2), ["fox", "owl"], ["a {}.", "{}"])
    for names in (np.unique(["owl", "fox"]), (name for name in ["fox", "owl"]), {"fox": 1, "owl": 2}.keys()):
        found = model.zero_shot(pictures(2), names, (template for template in ["a {}.", "{}"]))
        assert found.labels == expected.labels
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_series_is_read_by_position(model):
    """pandas indexes by labels, here the places before the table was sorted."""

    def sorted_series(items):
        return pd.Series(items, index=[2, 0, 1])

    names = ["fox", "hen", "owl"]
    assert model.zero_shot(pictures(), sorted_series(names)).labels == model.zero_shot(pictures(), names).labels
    prepared = list(map(model.prepare, pictures(3)))
    np.testing.assert_array_equal(model.encode_prepared(sorted_series(prepared)), model.encode_prepared(prepared))


def test_a_list_may_repeat_a_pillow_image(model):
    """Pillow decodes on first use, and not in two threads at once."""
    large = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    for kind in ("png", "tiff", "jpeg") * 2:
        image = Image.open(io.BytesIO(encoded(large, kind)))
        found = model.encode_image([image] * 8)
        np.testing.assert_array_equal(found, found[:1].repeat(8, axis=0))


@pytest.mark.parametrize("objective", ["xclip", "nclip"])
def test_zero_shot_by_every_score_is_its_definition(objective):
    """Against SciPy on outputs of the heads; a class is the mean of its prompts."""
    _, variables, model = random_model(objective)
    names, templates = ["fox", "{hen}", "owl"], ["a {}.", "the {}, a {}."]
    images = [model.prepare(p) for p in pictures(9)]
    prompts = [[t.replace("{}", n) for t in templates] for n in names]
    img = model._encoder.images(model._variables, images)
    txt = [model._encoder.texts(model._variables, of_class) for of_class in prompts]
    p = scipy.special.softmax(img["cluster_logits"] / TAU, axis=1)
    q = np.stack([scipy.special.softmax(x["cluster_logits"] / TAU, axis=1).mean(axis=0) for x in txt])
    entropy = 0.5 * (p @ np.log(q).T + np.log(p) @ q.T)
    expected = {"": entropy, "cosine": 1 - scipy.spatial.distance.cdist(p, q, "cosine"), "cross_entropy": entropy}
    if objective == "xclip":
        classes = np.stack([x["embedding"].mean(axis=0) for x in txt])
        expected[""] = img["embedding"] @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T
        expected["both"] = expected[""] / expected[""].std() + entropy / entropy.std()
    scale = np.exp(variables["params"]["log_scale"]) if objective == "xclip" else 1.0
    for by, scores in expected.items():
        found = model.zero_shot(pictures(9), names, templates, by=by)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-5)
        assert found.labels == [names[i] for i in scores.argmax(axis=1)]
        logits = scores if by else scale * scores
        np.testing.assert_allclose(found.probabilities, scipy.special.softmax(logits, axis=1), rtol=1e-4)
        assert model.zero_shot([], names, by=by).probabilities.shape == (0, 3)
        assert model.zero_shot(pictures(1), names[:1], by=by).probabilities == 1  # no deviation to divide by
    evaluated = ZeroShot(model._encoder, ZeroShotSet("x", images, np.zeros(9, int), prompts)).scores(model._variables)
    np.testing.assert_allclose(evaluated["cross_entropy"], entropy, rtol=1e-4, atol=1e-5)


def test_zero_shot_by_the_first_dimensions(tmp_path):
    names, templates = ["fox", "hen", "owl"], ["a {}.", "the {}."]
    for objective in ("xclip", "nclip"):
        tiny.untrained(tmp_path / objective, objective, noise=0.3)
        whole, cut = (xclip_jax.load(tmp_path / objective, dims=dims) for dims in (0, 5))
        found = cut.zero_shot(pictures(4), names, templates)
        expected = whole.zero_shot(pictures(4), names, templates).scores  # of whole distributions
        if objective == "xclip":
            rows = cut.encode_text([t.replace("{}", n) for n in names for t in templates]).reshape(3, 2, 5).mean(axis=1)
            assert not np.allclose(found.scores, expected, atol=1e-3)
            expected = cut.encode_image(pictures(4)) @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
        np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-5)


def test_clusters_are_the_largest_of_the_distribution(model):
    p = scipy.special.softmax(model._encoder.texts(model._variables, TEXTS)["cluster_logits"] / TAU, axis=1)
    assert model.has_clusters and not random_model("clip")[2].has_clusters
    found = model.clusters(texts=TEXTS, top=3)
    for row, ids, probabilities in zip(p, found.ids, found.probabilities, strict=True):
        assert list(ids) == sorted(range(len(row)), key=lambda i, row=row: -row[i])[:3]
        np.testing.assert_allclose(probabilities, row[ids], rtol=1e-5)
    whole = model.clusters(pictures(4), top=24)
    assert whole.ids.shape == (4, 24)
    np.testing.assert_allclose(whole.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert model.clusters([]).ids.shape == (0, 5)


def test_bad_input_is_named(model, tmp_path):
    (tmp_path / "good.png").write_bytes(encoded(pictures()[0]))
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    pixels = np.zeros((1, tiny.SIZE, tiny.SIZE, 3))
    for call, message in (
        (lambda: model.encode_image([tmp_path / "good.png", tmp_path / "bad.jpg"]), r"image 1, '.*bad.jpg': not an im"),
        (lambda: model.encode_image([str(tmp_path / "none.jpg")]), r"none.jpg': file does not exist"),
        (lambda: model.encode_image(["a\0b.jpg"]), r"image 0, 'a\\x00b.jpg': file cannot be read: embedded null byte"),
        (lambda: model.encode_image([pixels[0]]), r"image is not uint8 \(h, w, 3\): an array of float64"),
        (lambda: model.encode_image("a.jpg"), "images is a single image; pass a list"),
        (lambda: model.encode_pixels(pixels), "pixels are float64"),
        (lambda: model.encode_pixels(pixels[0].astype(np.float32)), "takes normalised float32"),
        (lambda: model.encode_tokens(np.zeros((1, 3), np.int32)), r"int32 of shape \(1, 3\); expected .*\(b, 12\)"),
        (lambda: model.encode_tokens(np.ones((1, 12))), "tokens are float64 of shape"),
        (lambda: model.encode_tokens([[1] * 9 + [259, 0, 0]]), "from 0 to 258"),
        (lambda: model.encode_tokens([[1] * 12, [5, -3] + [0] * 10]), "from 0 to 258"),
        (lambda: model.encode_tokens([[1] * 9 + [2, 0, 0], [1] * 12]), "with the end 2 in each row"),
        (lambda: model.encode_text("a fox"), "pass a list of strings"),
        (lambda: model.encode_text(None), "texts is None; pass a list of strings"),
        (lambda: model.zero_shot([], [1, 2]), r"class_names is \[1, 2\]; pass a list of strings"),
        (lambda: model.zero_shot([], None), "class_names is None; pass a list of strings"),
        (lambda: model.zero_shot([], ["fox"], "{}"), "templates is '{}'; pass a list of strings"),
        (lambda: model.zero_shot([], []), "lists of at least one string"),
        (lambda: model.zero_shot([], ["fox"], ["a fox"]), r"templates are \['a fox'\]"),
        (lambda: model.zero_shot([], ["fox"], by="all"), "by='all' is not a score .* 'cross_entropy', 'both'; omit"),
        (lambda: random_model("clip")[2].zero_shot([], ["fox"], by="both"), "which has only its default"),
        (lambda: model.clusters([], texts=[]), "either images or texts"),
        (lambda: model.clusters([], top=0), "top is 0; expected an integer of at least 1"),
        (lambda: random_model("clip")[2].clusters([]), "a model trained by nclip or xclip"),
        (lambda: xclip_jax.load(tmp_path, step=3), "no checkpoint of step 3"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_tokens_of_every_integer_type_are_the_same(model):
    few = np.minimum(model.tokenizer(TEXTS, model.length), 200).astype(np.int32)  # within uint8
    expected = model.encode_tokens(few)
    for dtype in ("uint8", "int64", "uint64", ">i4"):
        np.testing.assert_array_equal(model.encode_tokens(few.astype(dtype)), expected)


@pytest.mark.parametrize(
    ("option", "value"), [("batch", 0), ("batch", 2.5), ("dims", 2.5), ("dims", "4"), ("dims", -1)]
)
def test_numbers_are_checked_before_anything_is_read(tmp_path, option, value):
    with pytest.raises(UserError, match=f"{option} is {value!r}; expected an integer"):
        xclip_jax.load(tmp_path / "none", **{option: value})


def test_the_package_imports_no_jax_and_loading_a_run_leaves_logging_alone(run):
    code = f"""import sys, xclip_jax
assert "jax" not in sys.modules; xclip_jax.load; assert "jax" in sys.modules
import xclip_jax.commands.train
assert not {{"torch", "tensorflow", "datasets", "huggingface_hub", "scipy.stats"}} & set(sys.modules)
import logging
from absl import logging as absl_logging
xclip_jax.load({str(run)!r})
logging.getLogger("orbax").warning("other library")
absl_logging.warning("own message")"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "WARNING" in line or "message" in line or "library" in line]
    assert lines == ["WARNING:orbax:other library", "WARNING:absl:own message"]
