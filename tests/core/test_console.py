"""Durations, in the words of the console."""

from xclip_jax.core import console


def test_durations():
    assert [console.format_duration(s) for s in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
