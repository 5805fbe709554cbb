import functools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.losses import contrastive
from xclip_jax.objectives import Health
from xclip_jax.objectives.clip import PLATEAU_SHARE, Clip, Siglip

TERMS = {"clip": Clip(), "siglip": Siglip(), "q": Clip(gce_q=0.7), "labels": Siglip(positives="caption")}
every_term = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)


def contrastive_metrics(term, noise, b=64, exists=None):
    """Metrics of embeddings that are alike but for `noise`, and of pairs that are alike; at the best bias.

    Pairs of one of ten captions are alike too, where they are positives, and with `exists` two negatives of a pair.
    """
    rng, labels = np.random.default_rng(0), np.arange(b)
    keys = None if term.positives == "pair" else jnp.asarray(labels := labels % 10)
    z = np.ones(32) + noise * rng.normal(size=(b, 32))[labels]
    z = jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), jnp.float32)
    texts = z if exists is None else jnp.tile(z, (3, 1))
    if isinstance(term, Clip):
        metrics = contrastive.clip(z, texts, 14.0, q=term.gce_q, exists=exists)[1]
        return {key: float(value) for key, value in metrics.items()}
    # Where all cosines are 1 the sum of scale and bias is the one logit of all pairs.
    loss = functools.partial(contrastive.siglip, z, texts, 10.0, keys=keys, exists=exists)
    best = scipy.optimize.minimize_scalar(lambda bias: float(loss(bias)[0]), (-20, -5))
    return {key: float(value) for key, value in loss(best.x)[1].items()}


@every_term
def test_the_plateau_is_the_loss_of_a_blind_guess(term):
    """The best logit for all pairs, found numerically, gives what the closed form says."""
    metrics = contrastive_metrics(term, 0.0)
    assert metrics["loss"] == pytest.approx(term.chance_loss(metrics), rel=1e-5)
    [warning] = term.alarms(metrics)
    assert warning.startswith("plateau: ") and "Lengthen optim.warmup or lower optim.lr" in warning
    assert term.health(metrics).checks[0].value == pytest.approx(0, abs=1e-5)


@every_term
def test_negatives_raise_the_plateau(term):
    exists = jnp.arange(192) < 64 + 50
    metrics = contrastive_metrics(term, 0.0, exists=exists)
    assert metrics["negatives"] == 50 / 64 and metrics["acc_negatives"] == 0
    blind = term.chance_loss(metrics)
    assert metrics["loss"] == pytest.approx(blind, rel=1e-5)
    assert blind > 1.005 * term.chance_loss(contrastive_metrics(term, 0.0))
    assert isinstance(term, Siglip) or metrics["blind"] == pytest.approx(blind, rel=1e-5)
    assert len(term.alarms(metrics)) == 1  # the plateau
    (alarm,) = term.alarms(contrastive_metrics(term, 0.3, exists=exists & (jnp.arange(192) < 64)))
    assert alarm == "negatives: no pair of the batch has one. Check data.negative_columns."


@every_term
def test_no_warning_beyond_the_plateau(term):
    metrics = contrastive_metrics(term, 0.3)
    assert 0.2 * term.chance_loss(metrics) < metrics["loss"] < term.chance_loss(metrics, PLATEAU_SHARE)
    assert term.alarms(metrics) == []
    check = term.health(metrics).checks[0]
    assert check.value == pytest.approx(1 - metrics["loss"] / term.chance_loss(metrics))
    assert check.value > check.threshold


@every_term
def test_a_batch_of_one_pair_has_no_plateau(term):
    one_pair = {"loss": 0.0, "ln_b": 0.0}
    assert term.alarms(one_pair) == [] and term.health(one_pair) == Health()
    assert term.alarms({}) == [] and term.health({}) == Health()


@pytest.mark.parametrize(("loss", "smoothing", "alarm"), [(5.769, 0.0, True), (5.5, 0.0, True), (5.5, 0.8, False)])
def test_smoothed_targets_leave_less_to_learn(loss, smoothing, alarm):
    clip, metrics = Clip(label_smoothing=smoothing), {"loss": loss, "ln_b": np.log(256.0)}
    (check,) = clip.health(metrics).checks
    assert bool(clip.alarms(metrics)) == (check.value < check.threshold) == alarm


@pytest.mark.parametrize("term", [Clip(), Clip(gce_q=0.7)], ids=["clip", "q"])
@pytest.mark.parametrize(("share", "alarm"), [(0.995, True), (0.985, False)])
def test_a_robust_loss_is_on_the_plateau_where_its_cross_entropy_is(term, share, alarm):
    """At 4096 pairs and q = 0.7 the whole way from a blind guess to the bound is less than a percent of the loss."""
    loss = float(contrastive.robust(share * np.log(4096.0), term.gce_q))
    metrics = {"loss": loss, "ln_b": np.log(4096.0)}
    assert bool(term.alarms(metrics)) == alarm


def test_a_robust_loss_is_shown_with_its_own_blind_guess():
    (curve, *_), (plain, *_) = (term.curves() for term in (Clip(gce_q=0.7), Clip()))
    assert (curve.levels[0][1], curve.unit, plain.levels[0][1], plain.unit) == ("blind", "", "ln_b", "nats")
    metrics = contrastive_metrics(Clip(gce_q=0.7), 0.3)
    assert Clip(gce_q=0.7).progress(metrics) == f"{metrics['loss']:.3f} (blind 1.35)"
    assert Clip().progress(contrastive_metrics(Clip(), 0.3)).endswith(" (ln b 4.16)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gce_q": 0.5, "label_smoothing": 0.1}, r"objective\.clip\.gce_q is for one target"),
        ({"gce_q": 1.0, "positives": "caption"}, "set label_smoothing to 0, and positives to"),
        ({"gce_q": 1.5}, r"objective\.clip\.gce_q is 1\.5"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        schema.resolve(tiny.config("clip", objective__clip=options))
    schema.resolve(tiny.config("clip", objective__clip={"gce_q": 0.5}, loss__chunk_size=8))
