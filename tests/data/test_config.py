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
        ({"text_columns": ("a:0.5", "b")}, "all or none with COLUMN:WEIGHT"),
        ({"text_columns": ("a:0.5", "a:1")}, "different columns"),
        ({"text_columns": ("a", "a")}, "different columns"),
        ({"text_columns": ("a:1", "a:1:0.5")}, "all or none with COLUMN:WEIGHT"),
        ({"sources": ("folder:a",)}, ""),
    ],
)
def test_contradictions_are_named(changes, fault):
    conflicts = list(dataclasses.replace(DataConfig(), **changes).conflicts())
    assert len(conflicts) == bool(fault) and all(fault in conflict for conflict in conflicts)


def test_names_of_columns_may_have_colons():
    for columns, weights in (
        (("og:title", "b"), {"og:title": 0, "b": 0}), (("a:1:0.5", "og:t:.2"), {"a:1": 0.5, "og:t": 0.2}),
    ):  # fmt: skip
        config = DataConfig(text_columns=columns)
        assert config.text_weights == weights and not [*config.conflicts()]
