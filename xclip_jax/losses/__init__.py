"""Losses, pure functions defined on the global batch: `contrastive` (CLIP, SigLIP) and `noncontrastive` (nCLIP)."""

from xclip_jax.losses import contrastive, noncontrastive

__all__ = ["contrastive", "noncontrastive"]
