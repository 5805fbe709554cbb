"""xclip_jax: CLIP, nCLIP and xCLIP language-image pre-training in JAX/Flax. `xclip_jax.load(path)` gives a model."""

import itertools
import pathlib
import sys
from typing import Any

from xclip_jax.core import errors

__version__ = "0.2.0"

# A command's imports take seconds. For `python -m` sys.argv has "-m" alone; whose module it is, sys.orig_argv says.
_module = next((after for word, after in itertools.pairwise(sys.orig_argv) if word == "-m"), "")
if pathlib.PurePath(next(iter(sys.argv), "")).name == "xclip-jax" or (
    sys.argv[:1] == ["-m"] and _module.partition(".")[0] == __name__
):
    errors.end_at_once()


def __getattr__(name: str) -> Any:
    # JAX is imported with the first use: seconds that `import xclip_jax` need not take.
    if name in ("load", "Model"):
        from xclip_jax import model

        return getattr(model, name)
    raise AttributeError(f"module 'xclip_jax' has no attribute {name!r}")
