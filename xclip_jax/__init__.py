"""xclip_jax: CLIP, nCLIP and xCLIP language-image pre-training in JAX/Flax."""

__version__ = "0.1.0"
