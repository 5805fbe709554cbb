"""The train step, and what a run does around it."""

from xclip_jax.train.learner import Learner
from xclip_jax.train.state import TrainState

__all__ = ["Learner", "TrainState"]
