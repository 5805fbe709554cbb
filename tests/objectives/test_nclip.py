import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.losses.noncontrastive import nclip
from xclip_jax.objectives.nclip import Nclip


def metrics_of(*logits):
    metrics = jax.jit(functools.partial(nclip, tau=1.0))(*map(jnp.asarray, logits))[1]
    return {key: float(value) for key, value in metrics.items()}


def logits_of(name, b=256, k=1024):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, b, k))
    own = np.eye(k)[rng.permutation(k)[:b]]
    if name == "flat":
        return 0.5 * noise
    if name == "few clusters":
        return noise + 12 * np.eye(k)[rng.integers(14, size=b)]
    if name == "disagreement":
        return noise + 12 * np.stack([own, rng.permutation(own)])
    assert name == "healthy"
    return noise + 9 * own


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flat", ("mutual information", "sharpness", "smoothness", "objective.nclip.tau")),
        ("few clusters", ("14 of 1024", "Raise objective.nclip.smoothness")),
        ("disagreement", ("Lower optim.lr", "%")),
    ],
)
def test_diagnose_names_failure_and_remedy(name, words):
    warnings = Nclip().alarms(metrics_of(*logits_of(name)))
    assert [w.split(":")[0] for w in warnings] == [name]
    assert all(word in warnings[0] for word in words), warnings[0]


def test_diagnose_is_silent_on_a_healthy_run():
    metrics = metrics_of(*logits_of("healthy"))
    assert 1.5 < metrics["mutual_information_img"] < 5  # soft enough that the thresholds matter
    assert Nclip().alarms(metrics) == []


@pytest.mark.parametrize("name", ["img", "txt"])
def test_diagnose_looks_at_each_modality(name):
    healthy = metrics_of(*logits_of("healthy"))
    flat = healthy | {f"mutual_information_{name}": 0.1}
    few = healthy | {f"marginal_entropy_{name}": 2.5}
    assert [w.split(" is ")[0] for w in Nclip().alarms(flat)] == [f"flat: mutual information of {name}"]
    assert [w.split(" is ")[0] for w in Nclip().alarms(few)] == [f"few clusters: H(mean) of {name}"]


def test_diagnose_reports_two_failures_at_once():
    rng = np.random.default_rng(1)
    metrics = metrics_of(*(12 * np.eye(1024)[rng.integers(14, size=256)] for _ in range(2)))
    assert [w.split(":")[0] for w in Nclip().alarms(metrics)] == ["few clusters", "disagreement"]


@pytest.mark.parametrize(("k", "b"), [(1, 16), (24, 1), (1, 1)])
def test_one_cluster_or_a_batch_of_one_pair_gives_no_warning(k, b):
    """ln 1 = 0 nats are no information to lose, whichever side of 0 rounding is on."""
    metrics = {
        f"{key}_{m}": -1e-7 for key in ("mutual_information", "marginal_entropy", "entropy") for m in ("img", "txt")
    }
    metrics |= {"clusters_img": 1.0, "clusters_txt": 1.0, "agreement": 0.0}
    metrics |= {"ln_k": np.log(float(k)), "ln_b": np.log(float(b))}
    assert Nclip().alarms(metrics) == [] and not Nclip().health(metrics).checks
