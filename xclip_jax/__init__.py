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

_MODULES = {"Model": "model", "create": "train.learner", "load": "model"}  # other names are submodules


def __getattr__(name: str) -> Any:
    """Import a public name with its first use: JAX takes seconds that `import xclip_jax` need not take."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    return getattr(module, name) if name in _MODULES else module


def __dir__() -> list[str]:
    return sorted(__all__)
