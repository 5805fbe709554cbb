"""xclip_jax: CLIP, nCLIP and xCLIP language-image pre-training in JAX/Flax. `xclip_jax.load(path)` gives a model."""

import importlib
from typing import Any

from xclip_jax.core import __version__

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # JAX is imported with the first use: seconds that `import xclip_jax` need not take.
    if name in ("load", "Model"):
        return getattr(importlib.import_module("xclip_jax.model"), name)
    raise AttributeError(f"module 'xclip_jax' has no attribute {name!r}")
