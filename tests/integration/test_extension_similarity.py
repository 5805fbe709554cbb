"""A term of another package that compares images with texts in its own way: nothing inside xclip_jax knows it."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
from PIL import Image

import xclip_jax
from tests.helpers import tiny
from tests.helpers.util import random_variables
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import tables
from xclip_jax.evaluators.results import flat
from xclip_jax.evaluators.retrieval import Retrieval, RetrievalSet, embeddings, recall_at_k
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet, accuracy
from xclip_jax.model import Model
from xclip_jax.report.examples import collect_examples
from xclip_jax.train import build, trainer
from xclip_jax.train.build import make_encoder

pytestmark = pytest.mark.long

WORDS = ["fox", "owl", "hen", "cat", "dog"]
IMAGES = list(np.random.default_rng(0).integers(0, 256, (40, tiny.SIZE, tiny.SIZE, 3), np.uint8))
LABELS = np.arange(40) % len(WORDS)
distance = scipy.spatial.distance.cdist


def config(run="runs/tiny", **terms):
    plugins = {"points": {"type": "tests.extension.euclidean:Points", "size": 3}}
    options = {"objective__name": "mine", "objective__terms": terms, "objective__plugins": plugins}
    return tiny.config("clip", run=run, steps=2, **options)


def made(**terms):
    experiment = build.build(config(**terms))
    image, text = jnp.zeros((1, tiny.SIZE, tiny.SIZE, 3)), jnp.zeros((1, tiny.LENGTH), jnp.int32)
    return experiment, random_variables(experiment.model, image, text)


@pytest.fixture(scope="module")
def points():
    experiment, variables = made(points=1.0)
    return experiment, variables, make_encoder(experiment)


def test_zero_shot_and_retrieval_compare_by_it(points):
    _, variables, encoder = points
    img = encoder.images(variables, IMAGES)["point"]
    assert img.shape == (40, 3)
    prompts = [[f"a {word}", f"the {word}."] for word in WORDS]
    classes = np.stack([encoder.texts(variables, texts)["point"].mean(axis=0) for texts in prompts])
    evaluator = ZeroShot(encoder, ZeroShotSet("x", IMAGES, LABELS, prompts))
    (scores,) = evaluator.scores(variables).values()
    np.testing.assert_allclose(scores, -distance(img, classes), rtol=1e-4)
    metrics = flat(results := evaluator.measure(variables))
    assert metrics["zeroshot/x/top1"] == 100 * accuracy(-distance(img, classes), LABELS, 1)
    assert "top-1" in tables.render(results)

    captions = [[f"picture {i}"] for i in range(40)]
    txt = encoder.texts(variables, [texts[0] for texts in captions])["point"]
    metrics = Retrieval(encoder, RetrievalSet("x", IMAGES, captions)).run(variables)
    assert metrics["retrieval/x/image_to_text/r5"] == 100 * recall_at_k(-distance(img, txt), np.eye(40, dtype=bool), 5)
    assert metrics["retrieval/x/text_to_image/r5"] == 100 * recall_at_k(-distance(txt, img), np.eye(40, dtype=bool), 5)
    unit = txt / np.linalg.norm(txt, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings(encoder, variables, [texts[0] for texts in captions]), unit, rtol=1e-5)


def test_a_loaded_model_compares_by_it(points):
    experiment, variables, encoder = points
    model = Model(experiment, variables, {}, batch=8)
    img, txt = encoder.images(variables, IMAGES)["point"], encoder.texts(variables, WORDS)["point"]
    result = model.zero_shot(IMAGES, WORDS, ["{}"])
    np.testing.assert_allclose(result.scores, -distance(img, txt), rtol=1e-4)
    np.testing.assert_allclose(result.probabilities, scipy.special.softmax(-distance(img, txt), axis=1), rtol=1e-4)
    assert result.labels == [WORDS[i] for i in distance(img, txt).argmin(axis=1)]
    np.testing.assert_allclose(
        model.encode_image(IMAGES), img / np.linalg.norm(img, axis=1, keepdims=True), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match="a model trained by nclip or xclip"):
        model.clusters(texts=WORDS)


def test_a_run_trains_evaluates_and_reports_by_it(tmp_path):
    for word, shade in zip(WORDS, np.linspace(0, 250, len(WORDS)).astype(np.uint8), strict=True):
        (tmp_path / "set" / word).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((20, 20, 3), shade + i, np.uint8)).save(tmp_path / "set" / word / f"{i}.png")
    c, spec = config(tmp_path / "run", points=1.0), f"folder:{tmp_path / 'set'}"
    c.data.sources, c.eval.sets_at_end = (f"folder:{tiny.folder(tmp_path / 'pairs')}",), (spec,)
    assert f"zeroshot/{spec}/top1" in trainer.run(c)
    model = xclip_jax.load(tmp_path / "run", batch=8)
    assert model.zero_shot(IMAGES[:3], WORDS).probabilities.shape == (3, 5)
    examples = collect_examples(model._encoder, model._variables, [spec])
    assert "Bars: probability" in examples.named[0].sentence and examples.clusters is None
