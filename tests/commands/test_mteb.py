"""A model on tasks of mteb made here, against direct computations."""

import numpy as np
import pytest
from PIL import Image

mteb = pytest.importorskip("mteb", minversion="2.0")
datasets = pytest.importorskip("datasets")

from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification  # noqa: E402
from mteb.models.models_protocols import EncoderProtocol  # noqa: E402

import xclip_jax  # noqa: E402
from xclip_jax.commands.mteb import Model  # noqa: E402

N = 12
LABELS = ["a red one", "green", "the blue", "grey?"]
TEXTS = [f"{LABELS[i % 4]} number {i}" for i in range(N)]


def images():
    rng = np.random.default_rng(0)
    shades = rng.integers(40, 216, (N, 1, 1, 3))
    return [Image.fromarray(np.uint8(shade + rng.integers(-40, 40, (20, 24, 3)))) for shade in shades]


def metadata(name, kind, category, modalities, score):
    return mteb.TaskMetadata(
        name=name, type=kind, category=category, modalities=modalities, main_score=score, description="of the tests",
        reference=None, dataset={"path": "none/none", "revision": "1"}, eval_splits=["test"], eval_langs=["eng-Latn"],
        date=("2020-01-01", "2020-01-01"), domains=[], task_subtypes=[], license=None, annotations_creators=None,
        dialect=[], sample_creation=None, bibtex_citation="",
    )  # fmt: skip


def of_test(**columns):
    return datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})


class ZeroShot(AbsTaskZeroShotClassification):
    """Images and class names."""

    metadata = metadata("OwnZeroShot", "ZeroShotClassification", "i2t", ["image", "text"], "accuracy")

    def load_data(self, **kwargs):
        self.dataset = of_test(image=images(), label=[i % 4 for i in range(N)])
        self.data_loaded = True

    def get_candidate_labels(self):
        return LABELS


def score_of(model, task, key):
    """One score of a task, not from mteb's cache nor into it."""
    (result,) = mteb.evaluate(Model(model), task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    return result.scores["test"][0][key]


def test_the_protocol_and_its_metadata(model, run):
    adapted = Model(model)
    assert isinstance(adapted, EncoderProtocol)
    meta = adapted.mteb_model_meta
    assert meta.name == f"xclip_jax/{run.name}" and meta.revision == model.fingerprint()
    cut = xclip_jax.load(run, dims=4)
    assert Model(cut).mteb_model_meta.revision == f"{model.fingerprint()}-dims4"
    assert set(meta.modalities) == {"text", "image"} and meta.framework == ["JAX"] and meta.n_parameters > 1000


def test_zero_shot_classification_of_images(model):
    scores = model.encode_image(images()) @ model.encode_text(LABELS).T
    expected = (scores.argmax(1) == np.arange(N) % 4).mean()
    assert score_of(model, ZeroShot(), "accuracy") == pytest.approx(expected)


def test_items_of_both_are_the_sum(model):
    adapted, pictures = Model(model), images()
    batches = [{"text": TEXTS[i : i + 5], "image": pictures[i : i + 5]} for i in (0, 5, 10)]
    expected = model.encode_text(TEXTS) + model.encode_image(pictures)
    np.testing.assert_allclose(adapted.encode(batches, task_metadata=None), expected, atol=1e-5)
