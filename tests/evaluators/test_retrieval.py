"""Groups of captions, retrieval of texts by texts, similarity of sentences."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from tests.helpers.encoding import build_encoder, by_name, make_encoder, noise, small_model
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import retrieval


def test_captions_are_grouped_by_image():
    data = retrieval.RetrievalSet("x", noise(3), [["a"], ["b", "c"], ["d"]])
    items = by_name(retrieval.Retrieval(make_encoder(), data).measure(small_model()[1]))[1]
    assert items["retrieval/x/text_to_image/r5"].groups.tolist() == [0, 1, 1, 2]
    assert items["retrieval/x/image_to_text/r5"].groups is None


def pairs(n, seed):
    rng = np.random.default_rng(seed)
    words = ["".join(chr(c) for c in rng.integers(97, 105, 4)) for _ in range(2 * n)]
    return list(zip(words[:n], words[n:], (rng.integers(0, 11, n) / 2).tolist(), strict=True))


def test_similarity_equals_scipy_and_names_what_it_averages():
    data = retrieval.SimilaritySet("sts", {"first": pairs(40, 0), "second": pairs(10, 1)})
    encoder, variables = make_encoder(), small_model()[1]
    metrics, items = by_name(retrieval.SentenceSimilarity(encoder, data).measure(variables))
    parts = []  # cosines and gold values
    for part in data.subsets.values():
        a, b = (encoder.texts(variables, [pair[side] for pair in part])["embedding"] for side in (0, 1))
        parts.append(((a * b).sum(axis=1), np.array([pair[2] for pair in part])))
    parts.append(tuple(map(np.concatenate, zip(*parts, strict=True))))
    first, second, whole = (100 * scipy.stats.spearmanr(*part).statistic for part in parts)
    linear = [100 * scipy.stats.pearsonr(*part).statistic for part in parts]
    expected = {
        "spearman_all": whole,
        "spearman_mean": (first + second) / 2,
        "spearman_weighted": 0.8 * first + 0.2 * second,
        "first/spearman": first,
        "second/spearman": second,
        "pearson_all": linear[2],
        "pearson_mean": (linear[0] + linear[1]) / 2,
        "pairs": 50,
    }
    for key, value in expected.items():
        assert metrics[f"textual/sts/{key}"] == pytest.approx(value, abs=1e-3), key
    assert items["textual/sts/spearman_all"].value() == metrics["textual/sts/spearman_all"]
    assert retrieval.SentenceSimilarity(encoder, data).run(variables) == metrics


def test_retrieval_of_texts_by_hand():
    texts = ["aaaa", "mmmm", "zzzz"]
    queries = [("aaaa", 0), ("zzzz", 2), ("zzzz", 1), ("mmmm", 1)]
    groups = {"first": np.array([True, False, False, False]), "second": np.array([False, True, True, True])}
    encoder, variables = make_encoder(), small_model()[1]
    data = retrieval.TextRetrievalSet("x", texts, queries)
    metrics, items = by_name(retrieval.TextRetrieval(encoder, data).measure(variables))
    assert metrics["textual/x/r1"] == 75 and metrics["textual/x/r5"] == 100
    assert metrics["textual/x/queries"] == 4 and metrics["textual/x/texts"] == 3
    assert items["textual/x/r1"].values.tolist() == [1, 1, 0, 1]
    data = retrieval.TextRetrievalSet("x", texts, queries, groups)
    grouped = retrieval.TextRetrieval(encoder, data).run(variables)
    assert grouped["textual/x/first/r1"] == 100 and grouped["textual/x/second/r1"] == pytest.approx(200 / 3)
    assert grouped["textual/x/r1"] == pytest.approx(250 / 3)


def test_a_model_without_projection_compares_distributions():
    encoder, variables, texts = make_encoder(embed=0), small_model(0)[1], ["abc", "xyz"]
    e = retrieval.embeddings(encoder, variables, texts)
    p = scipy.special.softmax(encoder.texts(variables, texts)["cluster_logits"], axis=1)
    np.testing.assert_allclose(e, p / np.linalg.norm(p, axis=1, keepdims=True), rtol=1e-5)


def test_a_model_without_a_similarity():
    encoder = build_encoder(small_model()[0], similarities=())
    with pytest.raises(UserError, match="does not compare images with texts"):
        retrieval.TextRetrieval(encoder, retrieval.TextRetrievalSet("x", ["a"], [("a", 0)])).measure(small_model()[1])
