"""Config keys that had another name or value in an earlier version: configs of old runs are translated."""

from collections.abc import Mapping
from typing import Any

from xclip_jax.data import rgb

RENAMED = {
    "model.img.size": "model.img.image_size",
    "model.txt.length": "model.txt.context_length",
    "optim.clip": "optim.grad_clip_norm",
    "loss.chunk": "loss.chunk_size",
    "data.apart": "data.spread_duplicate_captions",
    "data.tags_behind": "data.tags_append_prob",
    "data.tags_alone": "data.tags_only_prob",
    "data.flip": "data.flip_prob",
    "data.color": "data.color_jitter",
    "data.statistics": "data.normalization",
    "data.max_bad": "data.max_bad_fraction",
    "log.alarms_after": "log.collapse_warmup_steps",
}


def translate(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested config `values` of an earlier version, with the names that their keys have now."""
    translated = {}
    for name, value in values.items():
        current = RENAMED.get(f"{path}{name}", name).rpartition(".")[2]
        translated[current] = translate(value, f"{path}{name}.") if isinstance(value, Mapping) else value
    if path == "data.":  # its first runs read what lies under transparency
        translated.setdefault("background", rgb.DROPPED)
    return translated
