"""xclip_jax: CLIP, nCLIP and xCLIP language-image pre-training in JAX/Flax.

`xclip_jax.load(path)` gives a trained model, `xclip_jax.create(size)` a new one with its train step.
"""

from typing import TYPE_CHECKING

from xclip_jax.core import __version__
from xclip_jax.core.imports import on_first_use

if TYPE_CHECKING:
    from xclip_jax import losses, models, objectives, train
    from xclip_jax.model import Model, load
    from xclip_jax.train.learner import create

__all__ = ["Model", "__version__", "create", "load", "losses", "models", "objectives", "train"]

# JAX is imported with the first use: seconds that `import xclip_jax` need not take.
__getattr__, __dir__ = on_first_use(__name__, __all__, Model="model", load="model", create="train.learner")
