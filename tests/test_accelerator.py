"""`python -m benchmarks.accelerator` in its small form, on a CPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from benchmarks import accelerator, captions
from xclip_jax.train import memory


@pytest.mark.slow  # a process that compiles
def test_small_form_prints_a_table():
    command = [sys.executable, "-m", "benchmarks.accelerator", "--small", "--objectives", "xclip", "--steps", "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([*command, "--groups"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    *_, head, _, row = done.stdout.splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert (cells["program"], cells["objective"], cells["batch"], cells["MFU"]) == ("xclip_jax", "xclip", "16", "-")
    seconds, rate = float(cells["s a step"]), float(cells["pairs/s"].replace(",", ""))
    assert rate == pytest.approx(16 / seconds, rel=0.2, abs=1)


def test_mfu_is_model_flops_over_time_and_peak():
    row = {
        "program": "a", "objective": "clip", "devices": "8 chips", "batch": 4096, "seconds": 0.5, "first": 30.0,
        "flops": 4e14, "peak": 8 * 200e12, "memory": 3 * 2**30,
    }  # fmt: skip
    assert "| 4,096 | 0.500 | 8,192 | 800.0 | 50.0% | 3.0 | 30 |" in accelerator.table([row])


def test_batch_follows_from_the_memory_of_two_small_ones(monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    monkeypatch.setattr(jax, "devices", lambda: [device] * 2)
    monkeypatch.setattr(accelerator, "config_of", lambda objective, batch, small, groups: batch)
    monkeypatch.setattr("xclip_jax.train.build.build", lambda batch: batch)
    monkeypatch.setattr(memory, "compile_for", lambda batch: None)
    monkeypatch.setattr(memory, "usage", lambda batch, _: {"peak": 20 + batch / 2 * 0.5})
    # 20 bytes and half a byte for each pair of a device, of 920: 1,800 pairs, of which 14 * 128 = 1,792.
    assert accelerator.fitting_batch("clip", small=False, groups=False) == 2 * 1792


def test_lengths_have_the_published_moments():
    drawn = captions.lengths(200_000) - 2
    assert 19 < drawn.mean() < 20.2  # cut at 77
    assert drawn.min() >= 1 and drawn.max() == captions.CONTEXT - 2
    tokens = captions.tokens(captions.lengths(8), captions.CONTEXT, 100)
    assert (tokens.argmax(axis=1) + 1 == captions.lengths(8)).all()
