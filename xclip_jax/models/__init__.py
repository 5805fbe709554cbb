"""Towers, heads and their sizes."""

from xclip_jax.models.tower import ImageTower, TextTower
from xclip_jax.models.two_towers import PRESETS, ModelConfig, TwoTowers

__all__ = ["PRESETS", "ImageTower", "ModelConfig", "TextTower", "TwoTowers"]
