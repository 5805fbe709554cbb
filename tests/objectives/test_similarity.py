import tracemalloc

import numpy as np
import pytest
import scipy.spatial
import scipy.special

from xclip_jax.evaluators import zeroshot
from xclip_jax.objectives import similarity
from xclip_jax.objectives.similarity import ClusterSimilarity, CosineSimilarity


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("scale", "blocks"), [(1, (1, 1)), (300, (2 * 33, 3 * 33))])
def test_cluster_scores_against_scipy(scale, blocks, monkeypatch):
    monkeypatch.setattr(similarity, "_IMAGES", blocks[0])
    monkeypatch.setattr(similarity, "_TEXTS", blocks[1])
    clusters = ClusterSimilarity(2.0)
    s, t = rng().normal(size=(9, 33)) * scale, rng(1).normal(size=(4, 33)) * scale
    p, q = clusters.rows(s), clusters.rows(t)
    np.testing.assert_allclose(p, scipy.special.softmax(s / 2, axis=-1), rtol=1e-4, atol=1e-30)
    scores = clusters.scores(s, q)
    assert list(scores) == ["cosine", "cross_entropy"] and clusters.logits == "cross_entropy"
    for i in range(9):
        for j in range(4):
            cosine = 1 - scipy.spatial.distance.cosine(p[i], q[j])
            assert scores["cosine"][i, j] == pytest.approx(cosine, abs=1e-6)
            pi, qj = p[i].astype(np.float64), q[j].astype(np.float64)
            tiny = np.finfo(np.float32).tiny
            entropy = scipy.special.xlogy(pi, np.maximum(qj, tiny)) + scipy.special.xlogy(qj, np.maximum(pi, tiny))
            assert scores["cross_entropy"][i, j] == pytest.approx(entropy.sum() / 2, rel=1e-4)
    assert np.isfinite(scores["cross_entropy"]).all()


def test_scores_by_clusters_need_less_memory_than_the_clusters():
    s, q = rng().normal(size=(2000, 8192)).astype(np.float32), np.full((300, 8192), 1 / 8192, np.float32)
    own = (ClusterSimilarity(),)
    for score in (
        lambda: zeroshot.compare(own, {"cluster_logits": s}, [q]),
        lambda: zeroshot.class_scores(own, {"cluster_logits": s[:300]}, {"cluster_logits": s}, [20] * 100),
    ):
        tracemalloc.start()
        score()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < s.nbytes


def test_a_class_of_embeddings_is_the_mean_of_unit_vectors_and_of_unit_length():
    rows, cosine = rng().normal(size=(5, 7)), CosineSimilarity()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    mean = unit.mean(axis=0)
    np.testing.assert_allclose(cosine.class_row(rows), mean / np.linalg.norm(mean), rtol=1e-6)
    np.testing.assert_allclose(cosine.embedding(rows), unit, rtol=1e-6)
