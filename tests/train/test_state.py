"""The train state: parameters, statistics and their averages."""

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from xclip_jax.train import build, trainer
from xclip_jax.train.checkpoint import Checkpointer


@pytest.mark.slow  # two runs
def test_the_average_has_batch_statistics_of_its_own(pairs, tmp_path):
    """With momentum 0 the average is the model; else its statistics lie between the first ones and the model's."""
    states = {}
    for momentum in (0.0, 0.5):
        c = tiny.short(pairs, tmp_path / str(momentum), ema__on=True, ema__momentum=momentum, ema__schedule="constant")
        trainer.run(c)
        with Checkpointer(c.run) as checkpointer:
            states[momentum] = jax.device_get(checkpointer.restore(build.build(c).abstract)[0])
    for state, equal in ((states[0.0], True), (states[0.5], False)):
        average, model = state.variables(ema=True), state.variables()
        for name in ("params", "batch_stats"):
            same = all(map(np.array_equal, *map(jax.tree.leaves, (average[name], model[name]))))
            assert same == equal, name
