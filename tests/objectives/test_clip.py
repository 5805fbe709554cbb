"""The plateau of contrastive terms."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.losses import contrastive
from xclip_jax.objectives import Health, make_objective
from xclip_jax.objectives.clip import Clip, Siglip


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
    [warning] = term.report.alarms(metrics)
    assert warning.startswith("plateau: ") and "Lengthen optim.warmup or lower optim.lr" in warning
    assert term.report.health(metrics).checks[0].value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("term", [Clip(), Siglip()], ids=["clip", "siglip"])
def test_no_warning_beyond_the_plateau(term):
    metrics = contrastive_metrics(term, 0.3)
    assert 0.5 * metrics["ln_b"] < metrics["loss"] < 0.99 * term.blind_loss(metrics)
    assert term.report.alarms(metrics) == []
    check = term.report.health(metrics).checks[0]
    assert check.value == pytest.approx(1 - metrics["loss"] / term.blind_loss(metrics))
    assert check.value > check.threshold


@pytest.mark.parametrize("term", [Clip(), Siglip()], ids=["clip", "siglip"])
def test_a_batch_of_one_pair_has_no_plateau(term):
    one_pair, report = {"loss": 0.0, "ln_b": 0.0}, term.report
    assert report.alarms(one_pair) == [] and report.health(one_pair) == Health()
    assert report.alarms({}) == [] and report.health({}) == Health()


@pytest.mark.parametrize(
    ("loss", "smoothing", "alarm"), [(5.545, 0.0, True), (5.769, 0.0, True), (5.4, 0.0, False), (5.5, 0.8, False)]
)
def test_a_loss_that_stays_at_ln_b_is_an_alarm(loss, smoothing, alarm):
    """The first two are of runs that learned nothing; smoothed targets leave less to learn."""
    config = tiny.config("clip", objective__clip={"label_smoothing": smoothing})
    clip = make_objective(schema.resolve(config).objective).terms["clip"]
    metrics = {"loss": loss, "ln_b": np.log(256.0)}
    warnings, (check,) = clip.report.alarms(metrics), clip.report.health(metrics).checks
    assert [text.partition(":")[0] for text in warnings] == [check.name] * alarm
    assert (check.value < check.threshold) == alarm and all("Lengthen optim.warmup" in text for text in warnings)
