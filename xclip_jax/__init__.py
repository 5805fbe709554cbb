"""xclip_jax: CLIP, nCLIP and xCLIP language-image pre-training in JAX/Flax.

`xclip_jax.load(path)` gives a trained model, `xclip_jax.create(size)` a new one with its train step.
"""

import importlib
from typing import TYPE_CHECKING, Any

from xclip_jax.core import __version__

if TYPE_CHECKING:
    from xclip_jax import losses, models, objectives, train
    from xclip_jax.model import Model, load
    from xclip_jax.train.learner import create

__all__ = ["Model", "__version__", "create", "load", "losses", "models", "objectives", "train"]

_MODULES = {"Model": "model", "load": "model", "create": "train.learner"}


def __getattr__(name: str) -> Any:
    # JAX is imported with the first use: seconds that `import xclip_jax` need not take.
    if name in _MODULES:
        return getattr(importlib.import_module(f"xclip_jax.{_MODULES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"xclip_jax.{name}")
    raise AttributeError(f"module 'xclip_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
