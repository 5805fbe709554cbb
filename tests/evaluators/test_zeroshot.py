import functools
import itertools

import numpy as np
import pytest
import scipy.special
import sklearn.metrics

from tests.helpers.encoding import K, make_encoder, noise, similarities, small_model
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import retrieval, statistics, zeroshot
from xclip_jax.evaluators.results import Provenance
from xclip_jax.evaluators.retrieval import Retrieval, RetrievalSet
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.objectives.similarity import ClusterSimilarity, CosineSimilarity


def rng(seed=0):
    return np.random.default_rng(seed)


# Zero-shot: pure functions.


def loop_recall(scores, positives, k):
    """Recall at k by a stable sort, so that equal scores keep their order."""
    hits = [match[np.argsort(-row, kind="stable")[:k]].any() for row, match in zip(scores, positives, strict=True)]
    return np.mean(hits)


@pytest.mark.parametrize("k", [1, 5, 9])
def test_accuracy_against_a_loop_with_ties(k):
    logits = rng().integers(0, 3, (200, 7)).astype(np.float32)
    labels = rng(1).integers(0, 7, 200)
    assert zeroshot.accuracy(logits, labels, k) == pytest.approx(loop_recall(logits, np.eye(7, dtype=bool)[labels], k))
    assert k < 7 or zeroshot.accuracy(logits, labels, k) == 1


def test_scores_that_are_not_numbers_are_wrong():
    nan = np.full((4, 3), np.nan)
    assert zeroshot.accuracy(nan, np.arange(3).repeat([2, 1, 1]), 5) == 0
    assert zeroshot.mean_per_class(nan, np.array([0, 1, 2, 2])) == 0
    assert retrieval.recall_at_k(nan, np.ones((4, 3), bool), 10) == 0
    inf = np.inf
    for row, right in (([2, nan[0, 0], 1], 0), ([2, inf, 1], 0), ([inf, 0, 1], 0), ([2, -inf, 1], 1), ([-inf] * 3, 0)):
        for k in (1, 3):
            logits = np.array([row, [5.0, 0, 0]])
            assert zeroshot.accuracy(logits, np.array([0, 0]), k) == (1 + right) / 2
            assert retrieval.recall_at_k(logits, np.array([[True, False, False]] * 2), k) == (1 + right) / 2
        assert zeroshot.mean_per_class(np.array([row]), np.array([0])) == right


def test_mean_per_class_is_balanced_accuracy_over_classes_that_occur():
    logits = rng().normal(size=(300, 12))
    labels = rng(1).choice([0, 2, 3, 9], 300, p=[0.7, 0.2, 0.05, 0.05])
    logits[np.arange(300), labels] += 1
    loop = np.mean([np.mean(logits[labels == c].argmax(1) == c) for c in np.unique(labels)])
    assert zeroshot.mean_per_class(logits, labels) == pytest.approx(loop)


# Retrieval: pure functions.


@pytest.mark.parametrize(("k", "chunk"), [(1, 1 << 22), (5, 70), (50, 1)])
def test_recall_against_a_loop_with_ties(k, chunk, monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK", chunk)
    scores = rng().integers(0, 4, (60, 35)).astype(np.float32)
    positives = rng(1).random((60, 35)) < 0.06
    positives[np.arange(60), rng(2).integers(0, 35, 60)] = True
    assert retrieval.recall_at_k(scores, positives, k) == pytest.approx(loop_recall(scores, positives, k))


@pytest.mark.parametrize("positives", [np.zeros((2, 3), bool), np.ones((3, 2), bool)])
def test_recall_of_a_query_without_positives_raises(positives):
    with pytest.raises(UserError, match="positive"):
        retrieval.recall_at_k(np.zeros((2, 3)), positives, 1)


@pytest.mark.parametrize(
    "captions",
    [
        [["a", "b", "b"], ["b", "e"], ["c", "d"], ["d", "d", "d"]],  # some shared, some twice for an image
        [["a"], ["b"], ["c", "d", "e"], ["f"]],
        [["a", "a"], ["a"]],
    ],
)
def test_chance_of_recall_is_the_mean_over_all_orders(captions):
    """Copies of a text rank together; images are all distinct."""
    matches = retrieval.Matches(captions)
    positive = matches.of_images()
    texts, places = np.unique([text for of_image in captions for text in of_image], return_inverse=True)
    orders = {
        "image_to_text": (positive, [np.array(x, float)[places] for x in itertools.permutations(range(len(texts)))]),
        "text_to_image": (positive.T, [np.array(x, float) for x in itertools.permutations(range(len(captions)))]),
    }
    for direction, (m, scores) in orders.items():
        for k in (1, 2, 3, 5, 10):
            recalls = [retrieval.recall_at_k(np.broadcast_to(x, m.shape), m, k) for x in scores]
            assert matches.chance(k)[direction] == pytest.approx(np.mean(recalls)), (direction, k)


# Evaluators on an encoder with known answers.


class FakeEncoder:
    """An image is a row of features, a text the key of one."""

    def __init__(self, texts, embedding=True, clusters=False):
        self.table, self.similarities = texts, similarities(embedding, clusters)

    def images(self, variables, images, features):
        return dict.fromkeys(features, np.stack(images).astype(np.float32))

    def texts(self, variables, texts, features):
        return dict.fromkeys(features, np.array([self.table[text] for text in texts], np.float32))


def test_zero_shot_with_known_answers():
    eye = np.eye(3)
    encoder = FakeEncoder({"a": eye[0], "b": eye[1], "c": eye[2]})
    images = [eye[0], eye[1], eye[0], eye[2], eye[2]]  # the third, of class "b", is taken for an "a"
    labels = np.array([0, 1, 1, 2, 2])
    groups = {"x": np.array([1, 1, 1, 0, 0], bool), "y": np.array([0, 0, 0, 1, 1], bool)}
    data = ZeroShotSet("toy", images, labels, [["a"], ["b"], ["c"]])
    expected = {"n": 5, "ways": 3, "top1": 80, "top5": 100, "mean_per_class": 100 * 2.5 / 3}
    found = ZeroShot(encoder, data).run(None)
    assert found == pytest.approx({f"zeroshot/toy/{key}": value for key, value in expected.items()})
    found = ZeroShot(encoder, ZeroShotSet("toy", images, labels, [["a"], ["b"], ["c"]], groups)).run(None)
    assert found["zeroshot/toy/x/top1"] == pytest.approx(200 / 3) and found["zeroshot/toy/y/top1"] == 100
    assert found["zeroshot/toy/top1"] == pytest.approx(250 / 3)
    assert (found["zeroshot/toy/x/n"], found["zeroshot/toy/y/n"]) == (3, 2)


def test_roc_auc_is_of_the_second_class():
    vectors, labels = rng(3).normal(size=(20, 3)), np.arange(20) % 2
    vectors[:, 1] += labels
    encoder = FakeEncoder({"no": np.eye(3)[0], "yes": np.eye(3)[1]})
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    data = ZeroShotSet("toy", list(unit), labels, [["no"], ["yes"]], card=Provenance(metric="roc_auc"))
    expected = 100 * sklearn.metrics.roc_auc_score(labels, unit[:, 1] - unit[:, 0])
    assert abs(expected - 50) > 1
    assert ZeroShot(encoder, data).run(None)["zeroshot/toy/roc_auc"] == pytest.approx(expected)


def test_classes_of_equal_prompts_tie_exactly_and_the_first_wins():
    # 1000 classes: wide enough for a matrix product to round its last columns another way.
    table = {str(i): rng(i).normal(size=37) for i in range(999)}
    images = rng(5).normal(size=(64, 37)).astype(np.float32)
    prompts = [[str(i)] for i in range(999)] + [["7"]]
    data = ZeroShotSet("twins", list(images), np.zeros(64, int), prompts)
    scores = ZeroShot(FakeEncoder(table), data).scores(None)[""]
    np.testing.assert_array_equal(scores[:, 7], scores[:, 999])
    assert 999 not in scores.argmax(1)


@pytest.mark.parametrize(("embedding", "clusters"), [(True, False), (False, True), (True, True)])
def test_names_of_scores(embedding, clusters):
    encoder = FakeEncoder({"a": [9, 0, 0], "b": [0, 9, 0]}, embedding, clusters)
    images = [np.array([8, 0, 0.0]), np.array([0, 8, 0.0])]
    expected = (
        {""} | ({"cosine/", "cross_entropy/"} if clusters else set()) | ({"both/"} if embedding and clusters else set())
    )
    metrics = ZeroShot(encoder, ZeroShotSet("toy", images, np.array([0, 1]), [["a"], ["b"]])).run(None)
    assert {f"zeroshot/toy/{score}top1" for score in expected} == {key for key in metrics if key.endswith("/top1")}
    recalls = Retrieval(encoder, RetrievalSet("toy", images, [["a"], ["b"]])).run(None)
    names = {key for key in recalls if key.endswith("text_to_image/r1") and "chance" not in key}
    assert {f"retrieval/toy/{score}text_to_image/r1" for score in expected} == names
    assert metrics["zeroshot/toy/top1"] == recalls["retrieval/toy/text_to_image/r1"] == 100


def test_both_heads_of_xclip_are_scored_together():
    z, txt = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng(1).normal(size=(2, 6, 4)))
    s, q = rng(2).normal(size=(6, 5)), scipy.special.softmax(rng(3).normal(size=(6, 5)), axis=1)
    features = {"embedding": z, "cluster_logits": s}
    scores = zeroshot.compare(similarities(True, True, tau=0.5), features, [txt, q])
    entropy = ClusterSimilarity(0.5).scores(s, q)["cross_entropy"]
    cosine = z @ txt.T
    np.testing.assert_allclose(scores["both"], cosine / cosine.std() + entropy / entropy.std(), rtol=1e-5)
    assert list(scores) == ["", "cosine", "cross_entropy", "both"]
    # A single score other than the model's default has the name of its similarity.
    swapped = zeroshot.compare((ClusterSimilarity(), CosineSimilarity()), features, [q, txt])
    assert list(swapped) == ["", "cosine", "cross_entropy", "embedding", "both"]
    assert swapped[""] is swapped["cosine"] and (swapped["embedding"] == scores[""]).all()


def test_the_distribution_of_a_class_is_the_mean_over_its_prompts():
    table = {"a": [3.0, 0, 0], "A": [0, 3.0, 0], "b": [0, 0, 1.0]}
    data = ZeroShotSet("toy", [np.array([1.0, 2, 0])], np.array([0]), [["a", "A"], ["b"]])
    scores = ZeroShot(FakeEncoder(table, False, True), data).scores(None)
    softmax = functools.partial(scipy.special.softmax, axis=-1)
    p, q = softmax([[1.0, 2, 0]]), np.stack([softmax([table["a"], table["A"]]).mean(0), softmax(table["b"])])
    expected = 0.5 * (p @ np.log(q).T + np.log(p) @ q.T)
    np.testing.assert_allclose(scores["cross_entropy"], expected, rtol=1e-5)
    np.testing.assert_array_equal(scores[""], scores["cosine"])


@pytest.mark.parametrize("unreadable", [[], [2, 3, 4, 17], list(range(20))])
def test_retrieval_is_a_sort_that_finds_no_unreadable_image(unreadable):
    """Captions that images share are right for both; if no image can be read, all queries are wrong."""
    images = rng().normal(size=(20, 16)).astype(np.float32)
    captions = [[f"{i}/{j}" for j in range(1 + i % 4)] for i in range(20)]
    captions[3][0], captions[12][0] = captions[4][0], captions[17][1]
    texts = [text for of_image in captions for text in of_image]
    table = {text: rng(i).normal(size=16) + images[i % 20] for i, text in enumerate(sorted(texts))}
    scores = images @ np.array([table[text] for text in texts], np.float32).T
    match = np.array([[text in of_image for text in texts] for of_image in captions])
    images[unreadable], scores[unreadable] = np.nan, -np.inf
    data = RetrievalSet("toy", list(images), captions)
    found = {x.key: x for x in Retrieval(FakeEncoder(table), data).measure(None)}
    assert (found["images"].value, found["captions"].value) == (20, 50)
    chance = retrieval.Matches(captions).chance(5)
    for direction, s, m in (("image_to_text", scores, match), ("text_to_image", scores.T, match.T)):
        assert found[f"chance/{direction}/r5"].value == pytest.approx(100 * chance[direction])
        for k in (1, 5, 10):
            best = np.argsort(-s, axis=1, kind="stable")[:, :k]
            right = np.take_along_axis(m & (s > -np.inf), best, axis=1).any(axis=1)
            assert found[f"{direction}/r{k}"].items.values.tolist() == right.tolist()


def test_too_many_scores_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(retrieval, "MOST_SCORES", 5)
    with pytest.raises(UserError, match=r"^set: 2 images and 3 captions"):
        RetrievalSet("set", [None] * 2, [["a", "b"], ["c"]])


# Evaluators on a real model.


def test_evaluators_on_a_real_model_agree_on_1_and_2_devices():
    _, variables = small_model()
    images, labels = noise(21), rng(3).integers(0, 5, 21)
    zero_shot = ZeroShotSet("toy", images, labels, [[t] for t in ["fox", "a", "dog"]] + [["cat", "kitten"], ["fox"]])
    pairs = RetrievalSet("toy", images, [[str(i % 11), "shared"] for i in range(21)])
    results = []
    for devices in (1, 2):
        encoder = make_encoder(8, K, devices, 16, (-1, 1, 1))
        results.append(ZeroShot(encoder, zero_shot).run(variables) | Retrieval(encoder, pairs).run(variables))
    assert results[0] == pytest.approx(results[1])
    assert all(isinstance(value, float) for value in results[0].values())
