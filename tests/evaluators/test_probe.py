"""Probes of images and texts."""

import types

import numpy as np
import pytest

from tests.helpers.encoding import SIZE, by_name, make_encoder, noise, small_model
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators.feature_classifiers import Sweep
from xclip_jax.evaluators.probe import ClassificationSet, ClassifierEvaluator, Probe, ProbeSet, renumber
from xclip_jax.evaluators.results import Provenance


def images(labels):
    """Noise around one brightness a class: easy, but not for a single pixel."""
    rng = np.random.default_rng(len(labels))
    noise = rng.integers(0, 30, (len(labels), SIZE, SIZE, 3))
    return list((noise + 100 * np.asarray(labels)[:, None, None, None]).astype(np.uint8))


@pytest.mark.parametrize("held", [0, 9])
def test_a_probe_finds_what_is_easy_to_see(held):
    labels = [np.arange(n) % 2 for n in (40, held, 15)]
    tasks = {"": tuple(labels), "odd": tuple(1 - y for y in labels)}
    data = ProbeSet("set", *map(images, labels), tasks, Sweep((1e-2, 1.0, 100.0), 0))
    metrics, items = by_name(Probe(make_encoder(), data).measure(small_model()[1]))
    for task in ("visual/set", "visual/set/odd"):
        assert metrics[f"{task}/n"] == 15 and metrics[f"{task}/ways"] == 2 and metrics[f"{task}/train"] == 40
        for way in ("linear", "knn"):
            assert metrics[f"{task}/{way}/top1"] == metrics[f"{task}/{way}/mean_per_class"] == 100
            assert len(items[f"{task}/{way}/top1"].values) == 15
    assert Probe(make_encoder(), data).run(small_model()[1]) == metrics


def test_a_probe_gives_the_same_on_1_and_2_devices():
    labels = [np.arange(n) % 3 for n in (30, 9, 15)]
    pictures = [noise(len(y), seed=len(y)) for y in labels]
    data = ProbeSet("set", *pictures, {"": tuple(labels)}, Sweep((1e-2, 1.0), 1))
    one, two = (Probe(make_encoder(devices=n), data).run(small_model()[1]) for n in (1, 2))
    assert one == pytest.approx(two, abs=1e-3)


def test_a_class_that_training_lacks_counts():
    """With the first two of three classes in training, the answers are not those of two classes."""
    labels = np.arange(40) % 2, np.array([], int), np.array([0, 1, 2, 0, 1, 2])
    data = ProbeSet("set", *map(images, labels), {"": labels}, Sweep((1.0,), 0))
    metrics, items = by_name(Probe(make_encoder(), data).measure(small_model()[1]))
    assert metrics["visual/set/ways"] == 3
    for way in ("linear", "knn"):
        assert items[f"visual/set/{way}/top1"].values.tolist() == [1, 1, 0] * 2
        assert not {f"visual/set/{way}/f1", f"visual/set/{way}/matthews"} & set(metrics)


class Encoder:
    def __init__(self, of):
        self.of = of

    def texts(self, variables, texts, features):
        return {"features": np.array([self.of(text) for text in texts], np.float32)}


@pytest.mark.parametrize(("value", "folds", "tested"), [(np.nan, 0, True), (np.inf, 3, True), (np.nan, 3, False)])
def test_a_model_that_diverged_is_wrong_everywhere(value, folds, tested):
    texts, y = ["a"] * 12, np.arange(12) % 2
    sides = [texts, texts[:0] if folds else texts, texts if tested else texts[:0]]
    data = ProbeSet("set", *sides, {"": [y[: len(side)] for side in sides]}, folds=folds)
    metrics, items = by_name(Probe(Encoder(lambda text: [value] * 3), data).measure(None))
    ways = ("linear", "knn") if tested else ("linear",)
    assert {key for key in metrics if key.endswith("top1")} == {f"textual/set/{way}/top1" for way in ways}
    assert all(not item.values.any() for key, item in items.items() if key.endswith("top1"))
    assert metrics["textual/set/linear/mean_per_class"] == 0 and "textual/set/linear/log10_c" not in metrics


def test_rows_that_are_not_finite_are_wrong_and_not_trained_on():
    encoder = Encoder(lambda text: [text in "bd", np.inf if text in "cd" else 1])
    texts = list("ab" * 10 + "cd")
    y = np.arange(22) % 2
    data = ProbeSet("set", texts, [], [], {"": (y, y[:0], y[:0])}, Sweep((1.0,), 0), folds=2)
    _, items = by_name(Probe(encoder, data).measure(None))
    assert items["textual/set/linear/top1"].values.tolist() == [1.0] * 20 + [0.0] * 2


def test_c_is_chosen_by_the_sets_own_metric():
    logits, labels = np.array([[1, 0]] * 4), np.array([0, 0, 0, 1])
    values = {"top1": 75, "linear/mean_per_class": 50, "linear/matthews": 0, "linear/f1": 0, "category/linear/top1": 75}
    for metric, value in values.items():
        data = ProbeSet("set", [0], [], [0], {"": (labels, labels[:0], labels)}, card=Provenance(metric=metric))
        assert Probe(make_encoder(), data)._score(logits, labels) == value


def test_a_probe_of_pairs():
    features = {text: np.random.default_rng(i).normal(size=3).astype(np.float32) for i, text in enumerate("abc")}
    pairs, y = [("a", "b"), ("c", "a")], np.array([0, 1])
    for kind, width in (("difference", 6), ("all", 12)):
        data = ProbeSet("set", pairs, [], pairs, {"": (y, y[:0], y)}, pairs=kind)
        found = Probe(Encoder(features.get), data)._features(None)
        u, v = features["c"], features["a"]
        expected = np.concatenate([*([u, v] if kind == "all" else []), np.abs(u - v), u * v])
        assert found[0].shape == (2, width)
        np.testing.assert_allclose(found[2][1], expected)


def test_classes_are_matched_by_their_names():
    names = ["a", "crane", "b", "crane"]
    assert renumber(np.arange(4), names, names, "set").tolist() == [0, 1, 2, 3]
    assert renumber(np.array([1, 0]), ["b", "a", "unused"], ["a", "b", "c"], "set").tolist() == [0, 1]
    for of, to, named in ((["b", "a"], names, "'crane'"), (["b", "elk"], ["a", "b"], "'elk'")):
        with pytest.raises(UserError, match=rf"^set .*{named}"):
            renumber(np.array([1, 0]), of, to, "set")


def test_another_number_of_classes_than_the_classifiers_is_refused():
    logits = np.eye(2)[[1, 1, 0]]
    encoder = types.SimpleNamespace(classes=None, similarities=(), texts=lambda *_: {"class_logits": logits})
    data = ClassificationSet("set", ["x"] * 3, np.array([0, 0, 1]), 3)
    with pytest.raises(UserError, match="set has 3 classes, the model's classifier 2"):
        ClassifierEvaluator(encoder, data).measure(None)
    with pytest.raises(UserError, match=r"^set: the model has no classifier; fine-tune it"):
        ClassifierEvaluator(make_encoder(), data)
