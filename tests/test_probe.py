import dataclasses

import numpy as np
import pytest
import scipy.special
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from tests.encoding import SIZE, by_name, make_encoder, small_model
from xclip_jax.errors import UserError
from xclip_jax.evaluators import logistic, probe, sgd
from xclip_jax.evaluators.probe import Probe, ProbeSet, Sweep
from xclip_jax.evaluators.provenance import Provenance


def features(n=600, d=24, k=7, spread=0.6, seed=0):
    """Classes that overlap, on axes of different lengths, away from the origin."""
    centres = spread * np.random.default_rng(99).normal(size=(k, d))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    x = (centres[y] + rng.normal(size=(n, d))) * np.geomspace(3, 0.3, d) + 1
    return x.astype(np.float32), y


def objective(weights, bias, x, y, c):
    logits = x.astype(np.float64) @ weights + bias
    loss = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return loss.mean() + np.square(weights.astype(np.float64)).sum() / (2 * c * len(y))


def test_logistic_regression_equals_sklearn():
    (x, y), (held, _) = features(), features(seed=1)
    cs = [1e-3, 1e-1, 1.0, 10.0, 100.0]
    found = logistic.fit(x, y, cs, 7)
    for i, c in enumerate(cs):
        # float64 and a small tolerance: the optimum, rather than wherever scikit-learn's defaults stop.
        peer = LogisticRegression(C=c, max_iter=20_000, tol=1e-7).fit(x.astype(np.float64), y)
        best = objective(peer.coef_.T, peer.intercept_, x, y, c)
        mine = objective(found.weights[i], found.bias[i], x, y, c)
        assert mine == pytest.approx(best, rel=1e-4)
        assert found.objective[i] == pytest.approx(mine, rel=1e-4)
        assert np.mean(found.logits(held)[i].argmax(axis=1) == peer.predict(held)) >= 0.99


def test_it_stops_at_a_small_gradient():
    x, y = features()
    x = x + 3  # where the gradient of centred features is another one
    cs = [1e-2, 1.0, 1e2]
    rough, fine = (logistic.fit(x, y, cs, 7, tolerance=tolerance) for tolerance in (1e-3, 1e-5))
    for found, tolerance in ((rough, 1e-3), (fine, 1e-5)):
        for c, weights, bias in zip(cs, found.weights, found.bias, strict=True):
            wrong = scipy.special.softmax(x @ weights + bias, axis=1) - np.eye(7)[y]
            slopes = np.abs(x.T @ wrong / len(y) + weights / (c * len(y)))
            assert max(slopes.max(), np.abs(wrong.mean(axis=0)).max()) <= 1.1 * tolerance
    assert (rough.iterations < fine.iterations).all()


def test_separable_classes_do_not_go_on_for_ever():
    x, y = np.eye(4, dtype=np.float32)[np.arange(400) % 4], np.arange(400) % 4
    assert logistic.fit(x, y, [1.0, 1e3, 1e6], 4).iterations.max() < 50


def test_each_c_is_solved_as_if_alone(monkeypatch):
    x, y = features(n=300)
    cs = [1e-2, 1.0, 1e2, 1e4]
    together = logistic.fit(x, y, cs, 7, tolerance=1e-7)
    monkeypatch.setattr(logistic, "_SMALL", 0)  # those that are done are left behind
    dropped = logistic.fit(x, y, cs, 7, tolerance=1e-7)
    monkeypatch.setattr(logistic, "_SCORES", 2 * 300 * 7)  # in turns
    turns = logistic.fit(x, y, cs, 7, tolerance=1e-7)
    for i, c in enumerate(cs):
        alone = logistic.fit(x, y, [c], 7, tolerance=1e-7)
        for other in (together, dropped, turns):
            assert other.objective[i] == pytest.approx(alone.objective[0], rel=1e-4)
            assert abs(int(other.iterations[i]) - int(alone.iterations[0])) <= 0.5 * alone.iterations[0] + 2


def test_logistic_regression_of_constant_features_and_absent_classes():
    x, y = features(n=200, d=5)
    x[:, 2] = 3
    found = logistic.fit(x, y, [1.0, 1e6], 9)  # classes 7 and 8 do not occur
    assert np.isfinite(found.weights).all() and np.isfinite(found.bias).all()
    assert found.logits(x).argmax(axis=2).max() <= 6


@pytest.mark.parametrize(
    ("x", "y", "c", "message"),
    [
        (np.full((3, 2), np.nan), [0, 1, 0], 1.0, "not finite"),
        (np.zeros((3, 2)), [0, 1, 2], 1.0, "from 0 to 1"),
        (np.zeros((3, 2)), [0, 1, 1], 0.0, "C above 0"),
        (np.zeros((3, 2)), [0, 1], 1.0, r"\(3, 2\) and \(2,\)"),
    ],
)
def test_wrong_input_of_a_probe(x, y, c, message):
    with pytest.raises(UserError, match=message):
        logistic.fit(x, np.array(y), [c], 2)


@pytest.mark.parametrize("chunk", [1 << 25, 600 * 7])
def test_knn_equals_sklearn(chunk, monkeypatch):
    monkeypatch.setattr(probe, "_CHUNK", chunk)
    (x, y), (held, _) = features(), features(n=100, seed=1)
    peer = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x - 1, y)
    votes = probe.knn(x - 1, y, held - 1, 7)
    share = votes / votes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(share, peer.predict_proba(held - 1), atol=1e-3)
    assert (votes.argmax(axis=1) == peer.predict(held - 1)).all()


def test_knn_of_fewer_items_than_neighbours():
    votes = probe.knn(np.eye(3), np.array([0, 1, 1]), np.array([[1.0, 0.1, 0.0]]), 2)
    assert votes.argmax() == 0 and votes.shape == (1, 2)


def test_parts_of_a_training_set():
    labels = np.repeat([0, 1, 2], [200, 50, 30])
    assert np.bincount(labels[probe.subset(labels, "5-shot")]).tolist() == [5, 5, 5]
    assert np.bincount(labels[probe.subset(labels, "10%")]).tolist() == [20, 5, 3]
    assert np.bincount(labels[probe.subset(labels, "1%")]).tolist() == [2, 1, 1]
    assert (probe.subset(labels, "5-shot", 0) != probe.subset(labels, "5-shot", 1)).any()
    wrong = (
        ("five", "'five' is unknown"),
        ("0-shot", "unknown"),
        ("200%", "unknown"),
        ("31-shot", "class 2"),
        ("nan%", "'nan%' is unknown"),
        ("-5%", "unknown"),
        ("inf%", "unknown"),
        ("inf-shot", "unknown"),
    )
    for amount, message in wrong:
        with pytest.raises(UserError, match=message):
            probe.subset(labels, amount)


def test_the_search_is_clips(monkeypatch):
    tried = []

    class Fit:
        def __init__(self, cs):
            self.cs = cs

        def logits(self, x):
            return np.array(self.cs)

    def fit(x, y, cs, classes, tolerance):
        tried.append(cs)
        return Fit(cs)

    monkeypatch.setattr(logistic, "fit", fit)
    best, found = probe.search((0, 0), (0, 0), 2, Sweep(), lambda c, _: -abs(np.log10(c) - 1.3))
    assert tried[0] == [10.0**e for e in range(-6, 7, 2)]
    assert [len(cs) for cs in tried[1:]] == [2, 2, 2, 2]
    assert np.log10(best) == pytest.approx(1.25) and len(found) == 15  # the end: eight steps a decade
    best, _ = probe.search((0, 0), (0, 0), 2, Sweep((1.0, 10.0), 0), lambda c, _: 0.0)
    assert best == 1.0


@pytest.mark.parametrize(("wanted", "reached"), [(-9.0, -6.0), (9.0, 6.0), (5.8, 5.75)])
def test_the_search_stays_within_its_range(wanted, reached, monkeypatch):
    class Fit:
        def __init__(self, cs):
            self.cs = cs

        def logits(self, x):
            return np.array(self.cs)

    monkeypatch.setattr(logistic, "fit", lambda x, y, cs, classes, tolerance: Fit(cs))
    best, scores = probe.search((0, 0), (0, 0), 2, Sweep(), lambda c, _: -abs(np.log10(c) - wanted))
    assert np.log10(best) == pytest.approx(reached)
    assert min(scores) == 1e-6 and max(scores) == 1e6


def test_a_probe_of_too_few_items_to_choose_c():
    x, y, none = np.ones((3, 2), np.float32), np.array([0, 1, 1]), (np.zeros((0, 2), np.float32), np.array([], int))
    with pytest.raises(UserError, match=r"at least 2 training items .* got 1 training item"):
        probe.linear((x[:1], y[:1]), none, (x, y), 2, Sweep(), None)
    accuracy = lambda logits, labels: np.mean(logits.argmax(axis=1) == labels)  # noqa: E731
    assert len(probe.linear((x[:2], y[:2]), none, (x, y), 2, Sweep((1.0, 10.0)), accuracy)[0]) == 3
    # Where one C is tried there is nothing to choose.
    assert len(probe.linear((x[:1], y[:1]), none, (x, y), 2, Sweep((1.0,), 0), None)[0]) == 3


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
    for metric, value in (("top1", 75), ("mean_per_class", 50)):
        data = ProbeSet(
            "set",
            [0, 0],
            [],
            [0],
            {"": (np.array([0, 1]), np.array([], int), np.array([0]))},
            card=Provenance(metric=metric),
        )
        assert Probe(None, data)._score(logits, labels) == value


def test_a_wrong_probe_set():
    y = np.array([0, 1])
    with pytest.raises(UserError, match=r"\(2, 0, 1\) items"):
        ProbeSet("set", [0, 0], [], [0], {"": (y, y[:0], y)})
    with pytest.raises(UserError, match=r"classes \[2\]"):
        ProbeSet("set", [0, 0], [], [0], {"": (y, y[:0], y[:1] + 2)})


# SLIP's probe.


def test_sgd_equals_torchs(monkeypatch):
    torch = pytest.importorskip("torch")
    x, y = features(n=100, d=6, k=3)
    mine = sgd.fit(lambda _: x, y, 3, lr=0.05, epochs=5, batch=32)
    weights, bias = (torch.tensor(v, requires_grad=True) for v in sgd.initial(6, 3))
    optimizer = torch.optim.SGD([weights, bias], 0.05, momentum=0.9, weight_decay=0)
    for epoch in range(5):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + np.cos(np.pi * epoch / 5))
        for items in sgd.order(100, 32, epoch):
            items = items[items >= 0]  # the last batch is of 4
            loss = torch.nn.functional.cross_entropy(torch.tensor(x[items]) @ weights + bias, torch.tensor(y[items]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    np.testing.assert_allclose(mine[0], weights.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mine[1], bias.detach().numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(mine[0] - sgd.initial(6, 3)[0]).max() > 0.1


def test_sgds_order_is_a_permutation_and_its_numbers_are_slips():
    seen = [sgd.order(10, 4, epoch) for epoch in range(2)]
    assert all(sorted(o[o >= 0]) == list(range(10)) and o.shape == (3, 4) for o in seen) and (seen[0] != seen[1]).any()
    assert (sgd.LR, sgd.EPOCHS, sgd.BATCH) == (0.00625, 90, 1024)
    weights, bias = sgd.initial(100, 100)
    assert weights.std() == pytest.approx(0.01, rel=0.03) and not bias.any()


def test_slips_probe_of_pictures_and_its_views():
    labels = [np.arange(n) % 2 for n in (40, 0, 15)]
    seen = []

    def augmented(epoch):
        seen.append(epoch)
        return images(labels[0])

    data = ProbeSet("set", *map(images, labels), {"": tuple(labels)}, sgd=True, neighbours=False)
    _, variables = small_model()
    plain = Probe(make_encoder(), data).run(variables)
    assert plain["visual/set/linear/top1"] == 100 and "visual/set/linear/log10_c" not in plain
    again = Probe(make_encoder(), dataclasses.replace(data, augmented=augmented)).run(variables)
    assert seen == list(range(90)) and again == plain  # these views are the pictures themselves


# Folds.


def test_folds_are_even_and_stratified():
    labels = np.repeat([0, 1, 2], [55, 30, 17])
    of = probe.folds(labels, 10)
    assert set(np.bincount(of)) == {10, 11}
    for label, count in enumerate([55, 30, 17]):
        inside = np.bincount(of[labels == label], minlength=10)
        assert inside.sum() == count and inside.max() - inside.min() <= 1
    with pytest.raises(UserError, match="9 items cannot be 10 folds"):
        probe.folds(labels[:9], 10)


def test_nested_folds_equal_sklearns():
    """scikit-learn's grid search inside of its cross-validation, on the same folds."""
    from sklearn.model_selection import GridSearchCV, PredefinedSplit

    x, y = features(n=99, d=6, k=3, spread=0.4)
    cs = [1e-3, 0.1, 10.0]
    right, extra = probe.nested(x, y, 3, cs, 3, 1e-7)
    of, chosen = probe.folds(y, 3), []
    for fold in range(3):
        train, test = of != fold, of == fold
        inner = PredefinedSplit(probe.folds(y[train], 3))
        search = GridSearchCV(LogisticRegression(max_iter=5000, tol=1e-6), {"C": cs}, cv=inner)
        search.fit(x[train].astype(np.float64), y[train])
        chosen.append(np.log10(search.best_params_["C"]))
        assert np.mean((search.predict(x[test]) == y[test]) == right[test]) >= 0.99
    assert extra["log10_c"] == pytest.approx(np.mean(chosen))


def test_a_probe_of_pairs():
    seen = {}

    class Encoder:
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
