"""Config group `data`: values that contradict each other, and what keys accept."""

import dataclasses

import pytest

from xclip_jax.data.config import DataConfig


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is (0.0, 1.0); expected 0 < smallest <= largest <= 1"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale is (0.9, 0.5)"),
        ({"sources": ("folder:a", "folder:b"), "weights": (1.0,)}, "weights has 1 values for 2 sources"),
        ({"sources": ("folder:a", "folder:b"), "weights": (1.0, 0.0)}, "expected values above 0"),
        ({"tags_append_prob": 0.6, "tags_only_prob": 0.5}, "must not exceed 1 together"),
    ],
)
def test_contradictions_are_named(changes, fault):
    (conflict,) = dataclasses.replace(DataConfig(), **changes).conflicts()
    assert fault in conflict


def test_defaults_do_not_contradict_each_other():
    assert not list(DataConfig(sources=("folder:a",)).conflicts())


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("normalization", ["clip", ((0.5, 0.5, 0.5), (1, 1, 1))], ["vit", ((0.5, 0.5, 0.5), (0, 1, 1))]),
        ("length_groups", ["auto", "full", "24:0.6,40:0.9"], ["", "40:0.9,24:0.6", "24:1.5"]),
    ],
)
def test_checks_of_keys(name, good, bad):
    (field,) = (field for field in dataclasses.fields(DataConfig) if field.name == name)
    (check,) = field.metadata["checks"]
    assert all(map(check.accepts, good)) and not any(map(check.accepts, bad))
