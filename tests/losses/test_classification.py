"""Losses of labelled examples against torch, timm and SciPy."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from xclip_jax.losses import classification


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_soft_targets(smoothing):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(9, 5)).astype(np.float32), rng.integers(0, 5, 9)
    target = classification.targets(jnp.asarray(labels), 5, smoothing)
    mine = classification.cross_entropy(jnp.asarray(logits), target)
    peer = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), label_smoothing=smoothing)
    assert float(mine) == pytest.approx(float(peer), rel=1e-5)
    share = rng.random((9, 1))
    mixed = share * np.asarray(target) + (1 - share) * np.asarray(target)[::-1]
    expected = -(mixed * scipy.special.log_softmax(logits, axis=1)).sum(axis=1).mean()
    assert float(classification.cross_entropy(logits, mixed)) == pytest.approx(expected, rel=1e-5)
    peer = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(mixed))
    assert expected == pytest.approx(float(peer), rel=1e-5)


def test_targets_equal_timms():
    mixup = pytest.importorskip("timm.data.mixup")
    torch = pytest.importorskip("torch")
    labels = np.array([2, 0, 1, 2])
    ones = classification.targets(jnp.asarray(labels), 3, 0.1)
    share = 0.3
    theirs = mixup.mixup_target(torch.tensor(labels), 3, share, 0.1)
    np.testing.assert_allclose(share * ones + (1 - share) * ones[::-1], theirs.numpy(), atol=1e-6)
