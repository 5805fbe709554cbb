"""Config group `data`: values that contradict each other."""

import dataclasses

import pytest

from xclip_jax.data.config import DataConfig


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is (0.0, 1.0)"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale is (0.9, 0.5)"),
        ({"sources": ("folder:a", "folder:b"), "weights": (1.0,)}, "weights is (1.0,)"),
        ({"sources": ("folder:a", "folder:b"), "weights": (1.0, 0.0)}, "weights is (1.0, 0.0)"),
        ({"sources": ("folder:a",)}, ""),
    ],
)
def test_contradictions_are_named(changes, fault):
    conflicts = list(dataclasses.replace(DataConfig(), **changes).conflicts())
    assert len(conflicts) == bool(fault) and all(fault in conflict for conflict in conflicts)
