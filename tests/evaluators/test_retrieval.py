"""Intervals of retrieval: captions of one image are right or wrong together."""

import numpy as np

from tests.helpers.encoding import make_encoder
from xclip_jax.evaluators import retrieval, statistics

IMAGES, CAPTIONS = 100, 5


def measured(monkeypatch, found, captions):
    """Results of `Retrieval` whose queries for images have the ranks `found`."""
    ranked = {"image_to_text": np.zeros(len(captions), int), "text_to_image": found}
    monkeypatch.setattr(retrieval, "encode_pairs", lambda *_: (None, None))
    monkeypatch.setattr(retrieval, "ranks_by_score", lambda *_: {"": ranked})
    data = retrieval.RetrievalSet("x", [None] * len(captions), captions)
    return {result.metric: result for result in retrieval.Retrieval(make_encoder(), data).measure({})}


def test_the_interval_of_captions_covers_the_true_recall(monkeypatch):
    """Half of all images have captions that find them, the others none: single captions cover it less often."""
    captions = [[f"{i} {j}" for j in range(CAPTIONS)] for i in range(IMAGES)]
    covered, trials = 0, 100
    for seed in range(trials):
        right = np.random.default_rng(seed).random(IMAGES) < 0.5
        item = measured(monkeypatch, np.repeat(np.where(right, 0, 50), CAPTIONS), captions)["text_to_image/r1"].items
        low, high = statistics.interval(item, samples=300)
        covered += low <= 50 <= high
    assert covered >= 89


def test_captions_are_grouped_by_image(monkeypatch):
    captions = [["a"], ["b", "c"], ["d"]]
    results = measured(monkeypatch, np.zeros(4, int), captions)
    assert results["text_to_image/r5"].items.groups.tolist() == [0, 1, 1, 2]
    assert results["image_to_text/r5"].items.groups is None
    single = measured(monkeypatch, np.zeros(2, int), [["a"], ["b"]])
    assert single["text_to_image/r1"].items.groups is None
