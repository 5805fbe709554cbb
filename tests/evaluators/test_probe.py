"""Probes of images and texts."""

import numpy as np
import pytest

from tests.helpers.encoding import SIZE, by_name, make_encoder, small_model
from xclip_jax.core import environment
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators.feature_classifiers import Sweep
from xclip_jax.evaluators.probe import Probe, ProbeSet
from xclip_jax.evaluators.results import Provenance


def images(labels):
    """Noise around one brightness a class: easy, but not for a single pixel."""
    rng = np.random.default_rng(len(labels))
    noise = rng.integers(0, 30, (len(labels), SIZE, SIZE, 3))
    return list((noise + 100 * np.asarray(labels)[:, None, None, None]).astype(np.uint8))


@pytest.mark.parametrize("held", [0, 9])
def test_a_probe_finds_what_is_easy_to_see(held):
    labels = [np.arange(n) % 2 for n in (40, held, 15)]
    data = ProbeSet(
        "set",
        *map(images, labels),
        {"": tuple(labels), "odd": tuple(1 - y for y in labels)},
        ("2-shot",),
        Sweep((1e-2, 1.0, 100.0), 0),
    )
    metrics, items = by_name(Probe(make_encoder(), data).measure(small_model()[1]))
    for task in ("visual/set", "visual/set/odd"):
        assert metrics[f"{task}/n"] == 15 and metrics[f"{task}/ways"] == 2 and metrics[f"{task}/train"] == 40
        for way in ("linear", "knn", "linear/2-shot"):
            assert metrics[f"{task}/{way}/top1"] == metrics[f"{task}/{way}/mean_per_class"] == 100
            assert len(items[f"{task}/{way}/top1"].values) == 15
    assert Probe(make_encoder(), data).run(small_model()[1]) == metrics


def test_a_probe_gives_the_same_on_1_and_8_devices():
    labels = [np.arange(n) % 3 for n in (60, 9, 30)]
    rng = np.random.default_rng(0)
    pictures = [list(rng.integers(0, 256, (len(y), SIZE, SIZE, 3), dtype=np.uint8)) for y in labels]
    data = ProbeSet("set", *pictures, {"": tuple(labels)}, ("50%",), Sweep((1e-2, 1.0), 1))
    one, eight = (Probe(make_encoder(devices=n), data).run(small_model()[1]) for n in (1, 8))
    assert one == pytest.approx(eight, abs=1e-3)


def test_a_text_probe():
    texts, labels = ["aaaa", "zzzz", "aaa", "zzz"] * 5, np.array([0, 1, 0, 1] * 5)
    data = ProbeSet("set", texts, [], texts[:4], {"": (labels, labels[:0], labels[:4])}, sweep=Sweep((1.0,)))
    assert Probe(make_encoder(), data, "textual").run(small_model()[1])["textual/set/linear/top1"] == 100


def test_c_is_chosen_by_the_sets_own_metric():
    logits, labels = np.array([[1, 0], [1, 0], [1, 0], [1, 0]]), np.array([0, 0, 0, 1])
    for metric, value in (
        ("top1", 75),
        ("linear/mean_per_class", 50),
        ("linear/matthews", 0),
        ("linear/f1", 0),
        ("category/linear/top1", 75),
    ):
        data = ProbeSet(
            "set",
            [0, 0],
            [],
            [0],
            {"": (np.array([0, 1]), np.array([], int), np.array([0]))},
            card=Provenance(metric=metric),
        )
        assert Probe(make_encoder(), data)._score(logits, labels) == value


def test_cola_chooses_c_by_matthews():
    """Three in four are acceptable: to call all of them so has the better accuracy, and a correlation of 0."""
    y = np.array([1, 1, 1, 0])
    constant, other = np.array([[0, 1]] * 4), np.array([[0, 1], [1, 0], [1, 0], [1, 0]])
    for metric, better in (("linear/top1", constant), ("linear/matthews", other)):
        data = ProbeSet("set", ["a"] * 4, [], ["a"] * 4, {"": (y, y[:0], y)}, card=Provenance(metric=metric))
        scores = [Probe(make_encoder(), data)._score(logits, y) for logits in (constant, other)]
        assert (constant, other)[int(np.argmax(scores))] is better


def test_a_part_that_a_class_is_too_small_for_is_refused_when_the_set_is_opened():
    y = np.array([0, 0, 0, 1, 1])
    with pytest.raises(UserError, match=r"^set: class 1 has 2 training items, too few for 3-shot; add items, or"):
        ProbeSet("set", ["a"] * 5, [], ["a"] * 5, {"": (y, y[:0], y)}, ("50%", "3-shot"))
    with pytest.raises(UserError, match=r"^set: unknown part of a training set 'all'; expected"):
        ProbeSet("set", ["a"] * 5, [], ["a"] * 5, {"": (y, y[:0], y)}, ("all",))


def test_a_part_with_one_item_a_class_chooses_c_outside_of_it():
    """Half of the part's classes would have nothing to learn from, were its one item held out."""
    labels = [np.arange(n) % 3 for n in (60, 0, 30)]
    noise = np.random.default_rng(0).normal(size=(3, 60, 6))
    features = [0.3 * np.eye(3, 6)[y] + 0.1 * noise[i, : len(y)] for i, y in enumerate(labels)]
    data = ProbeSet("set", ["a"] * 60, [], ["a"] * 30, {"": tuple(labels)}, ("5%", "4-shot"), neighbours=False)
    tried = {}

    class Watched(Probe):
        def _score(self, logits, y):
            tried.setdefault(len(y), []).append(super()._score(logits, y))
            return tried[len(y)][-1]

    fits = Watched(make_encoder(), data)._task(features, labels)
    # A tenth of the training set, what three parts of three items leave, and one of twelve items.
    assert set(tried) == {6, 57, 1} and max(tried[57]) > 80
    assert fits["linear/5%"][0].mean() > 0.8


def test_a_wrong_probe_set():
    y = np.array([0, 1])
    with pytest.raises(UserError, match=r"\(2, 0, 1\) training, validation and test items have \(2, 0, 2\) labels"):
        ProbeSet("set", [0, 0], [], [0], {"": (y, y[:0], y)})
    with pytest.raises(UserError, match=r"classes \[2\]"):
        ProbeSet("set", [0, 0], [], [0], {"": (y, y[:0], y[:1] + 2)})


def test_a_probe_of_pairs():
    seen = {}

    class Encoder:
        widths = {"txt": 3}  # noqa: RUF012

        def texts(self, variables, texts, features):
            rows = [seen.setdefault(t, np.random.default_rng(len(seen)).normal(size=3)) for t in texts]
            return {"features": np.array(rows)}

    pairs, y = [("a", "b"), ("c", "a")], np.array([0, 1])
    for kind, width in (("difference", 6), ("all", 12)):
        data = ProbeSet("set", pairs, [], pairs, {"": (y, y[:0], y)}, pairs=kind)
        found = Probe(Encoder(), data, "textual")._features(None)
        u, v = seen["c"], seen["a"]
        expected = np.concatenate([*([u, v] if kind == "all" else []), np.abs(u - v), u * v])
        assert found[0].shape == (2, width)
        np.testing.assert_allclose(found[2][1], expected)


def test_a_probe_that_does_not_fit_into_memory_is_refused_before_anything_is_encoded(monkeypatch):
    y = np.zeros(1000, int)
    data = ProbeSet("set", range(1000), [], range(1000), {"": (y, y[:0], y)})
    Probe(make_encoder(), data)
    monkeypatch.setattr(environment, "host_memory", lambda field: 4 * 2000 * 16 * 4 - 1)
    with pytest.raises(UserError, match=r"^set: a probe of 2,000 items with 16 features each takes .* machine has"):
        Probe(make_encoder(), data)
    texts = ProbeSet("pairs", ["a"] * 500, [], ["b"] * 500, {"": (y[:500], y[:0], y[:500])}, pairs="all")
    with pytest.raises(UserError, match=r"^pairs: a probe of 1,000 items with 64 features each"):
        Probe(make_encoder(), texts)
