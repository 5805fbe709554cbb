"""xclip_jax: CLIP, nCLIP and xCLIP language-image pre-training in JAX/Flax. `xclip_jax.load(path)` gives a model."""

import pathlib
import sys
from typing import Any

from xclip_jax import ending

__version__ = "0.1.0"

# A command's imports take seconds. The name of `python -m xclip_jax.COMMAND` is not known yet.
if pathlib.PurePath(next(iter(sys.argv), "")).name in ("-m", "xclip-jax"):
    ending.end_at_once()


def __getattr__(name: str) -> Any:
    # JAX is imported with the first use: seconds that `import xclip_jax` need not take.
    if name in ("load", "Model"):
        from xclip_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'xclip_jax' has no attribute {name!r}")
