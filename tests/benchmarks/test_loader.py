"""The bare loop of `benchmarks.loader`."""

import os

import numpy as np

from benchmarks import loader


def test_the_bare_loop_opens_each_tar_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    pattern = loader.write(tmp_path / "images", [loader.picture(np.random.default_rng(0))], n=30, shard=15)
    loader.bare(pattern, 1)  # makes the index
    opened, original = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *flags: opened.append(path) or original(path, *flags))
    assert loader.bare(pattern, 4) > 0 and len(opened) <= 4
