"""Warnings of nCLIP's three failures and of the contrastive plateau, on outputs in the likeness of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from xclip_jax.losses import contrastive
from xclip_jax.losses.noncontrastive import nclip
from xclip_jax.objectives.clip import Clip
from xclip_jax.objectives.nclip import FEW_CLUSTERS_SHARE, FLAT_SHARE, diagnose
from xclip_jax.objectives.siglip import Siglip


@jax.jit
def measured(s_img, s_txt):
    return nclip(s_img, s_txt, tau=1.0)[1]


def metrics_of(s_img, s_txt):
    return {key: float(value) for key, value in measured(jnp.asarray(s_img), jnp.asarray(s_txt)).items()}


def logits_of(name, b=256, k=1024):
    """Cluster logits in the likeness of one training outcome."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, b, k))
    own = np.eye(k)[rng.permutation(k)[:b]]
    if name == "flat":
        return 0.5 * noise
    if name == "few clusters":
        return noise + 12 * np.eye(k)[rng.integers(14, size=b)]
    if name == "one cluster":
        return noise + 30 * np.eye(k)[0]
    if name == "disagreement":
        return noise + 12 * np.stack([own, rng.permutation(own)])
    assert name == "healthy"
    return noise + 9 * own


@pytest.mark.parametrize(
    ("name", "failure", "words"),
    [
        ("flat", "flat", ("mutual information", "sharpness", "smoothness", "objective.nclip.tau", "last_norm")),
        ("few clusters", "few clusters", ("14 of 1024", "Raise objective.nclip.smoothness")),
        ("one cluster", "few clusters", ("1 of 1024", "Raise objective.nclip.smoothness")),
        ("disagreement", "disagreement", ("Lower optim.lr", "model.cluster_head.last_norm", "%")),
    ],
)
def test_diagnose_names_failure_and_remedy(name, failure, words):
    metrics = metrics_of(*logits_of(name))
    warnings = diagnose(metrics)
    assert [w.split(":")[0] for w in warnings] == [failure]
    assert all(word in warnings[0] for word in words), warnings[0]


def test_diagnose_is_silent_on_a_healthy_run():
    metrics = metrics_of(*logits_of("healthy"))
    # Soft enough that the thresholds matter, as in the middle of training.
    assert 1.5 < metrics["mutual_information_img"] < 5
    assert diagnose(metrics) == []


@pytest.mark.parametrize("name", ["img", "txt"])
def test_diagnose_looks_at_each_modality(name):
    healthy = metrics_of(*logits_of("healthy"))
    flat = healthy | {f"mutual_information_{name}": 0.1}
    few = healthy | {f"marginal_entropy_{name}": 2.5}
    assert [w.split(" is ")[0] for w in diagnose(flat)] == [f"flat: mutual information of {name}"]
    assert [w.split(" is ")[0] for w in diagnose(few)] == [f"few clusters: H(mean) of {name}"]


def test_diagnose_reports_two_failures_at_once():
    rng = np.random.default_rng(1)
    s = [12 * np.eye(1024)[rng.integers(14, size=256)] for _ in range(2)]
    metrics = metrics_of(*s)
    names = [w.split(":")[0] for w in diagnose(metrics)]
    assert names == ["few clusters", "disagreement"]


def test_threshold_constants_match_the_trials():
    ln_b = np.log(256)
    assert 0.2 < FLAT_SHARE * ln_b < 0.6
    assert 3.1 < FEW_CLUSTERS_SHARE * ln_b < ln_b


def contrastive_metrics(term, noise, b=64):
    """Metrics of embeddings that are alike but for `noise`, and of pairs that are alike; at the best bias."""
    rng = np.random.default_rng(0)
    z = np.ones(32) + noise * rng.normal(size=(b, 32))
    z = jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), jnp.float32)
    if isinstance(term, Clip):
        return {key: float(value) for key, value in contrastive.softmax(z, z, 14.0)[1].items()}
    # Where all cosines are 1 the sum of scale and bias is the one logit of all pairs.
    best = scipy.optimize.minimize_scalar(lambda bias: float(contrastive.sigmoid(z, z, 10.0, bias)[0]), (-20, -5))
    return {key: float(value) for key, value in contrastive.sigmoid(z, z, 10.0, best.x)[1].items()}


@pytest.mark.parametrize("term", [Clip(), Siglip()], ids=["clip", "siglip"])
def test_the_plateau_is_the_loss_of_a_blind_guess(term):
    """The best logit for all pairs, found numerically, gives what the closed form says."""
    metrics = contrastive_metrics(term, 0.0)
    assert metrics["loss"] == pytest.approx(term.blind_loss(metrics), rel=1e-5)
    [warning] = term.alarms(metrics)
    assert warning.startswith("plateau: ") and "Lengthen optim.warmup or lower optim.lr" in warning
    assert term.health(metrics).lights[0].value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("term", [Clip(), Siglip()], ids=["clip", "siglip"])
def test_no_warning_beyond_the_plateau(term):
    metrics = contrastive_metrics(term, 0.3)
    assert 0.5 * metrics["ln_b"] < metrics["loss"] < 0.99 * term.blind_loss(metrics) and term.alarms(metrics) == []
    light = term.health(metrics).lights[0]
    assert light.value == pytest.approx(1 - metrics["loss"] / term.blind_loss(metrics))
    assert light.value > light.threshold


@pytest.mark.parametrize("term", [Clip(), Siglip()], ids=["clip", "siglip"])
def test_a_batch_of_one_pair_has_no_plateau(term):
    assert (
        term.alarms({"loss": 0.0, "ln_b": 0.0}) == [] and term.health({"loss": 0.0, "ln_b": 0.0}).lights[0].impossible
    )
    assert term.alarms({}) == [] and term.health({}) is None
