"""xclip_jax: CLIP, nCLIP and xCLIP language-image pre-training in JAX/Flax. `xclip_jax.load(path)` gives a model."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # JAX is imported with the first use: seconds that `import xclip_jax` need not take.
    if name in ("load", "Model"):
        from xclip_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'xclip_jax' has no attribute {name!r}")
