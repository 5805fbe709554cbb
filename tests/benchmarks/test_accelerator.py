"""`python -m benchmarks.accelerator` in its small form, on a CPU."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from benchmarks import accelerator
from xclip_jax.train import cost


@pytest.mark.slow  # a process that compiles
def test_small_form_prints_a_table():
    command = [sys.executable, "-m", "benchmarks.accelerator", "--small", "--objectives", "xclip", "--steps", "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([*command, "--groups"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    *_, head, _, row, _, about = done.stdout.splitlines()
    assert about.startswith("xclip_jax, xclip: texts ")
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


@pytest.mark.parametrize(
    ("refused_from", "free", "pairs"),
    [
        (10_000, 1000, 1792),  # 20 bytes and half a byte for each pair, of 920: 1,800 pairs, of which 14 * 128
        (30, 50, 32),  # of 46 bytes
    ],
)
def test_batch_follows_from_the_memory_of_two_small_ones(refused_from, free, pairs, monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": free})
    monkeypatch.setattr(jax, "devices", lambda: [device] * 2)
    monkeypatch.setattr(accelerator, "config_of", lambda objective, batch, small, groups: batch)
    monkeypatch.setattr("xclip_jax.train.build.build", lambda batch: batch)
    monkeypatch.setattr(
        cost, "compile_if_fits", lambda batch: (batch, "") if batch / 2 < refused_from else (None, "it needs more")
    )
    monkeypatch.setattr(cost, "memory_usage", lambda batch, _: {"peak": 20 + batch / 2 * 0.5})
    assert accelerator.fitting_batch("clip", small=False, groups=False) == 2 * pairs


def test_each_attempt_is_a_process_of_its_own(monkeypatch):
    flags = SimpleNamespace(batch=0, steps=2, small=False, groups=True, trace="")
    batches = []

    def process(command, **_):
        batches.append(int(command[command.index("--batch") + 1]))
        answer = {"retry": (batches[-1] or 1024) // 2} if len(batches) < 3 else {"batch": batches[-1]}
        return SimpleNamespace(returncode=0, stdout=f"a line\n{json.dumps(answer)}\n")

    monkeypatch.setattr(subprocess, "run", process)
    assert accelerator.measure("clip", flags) == {"batch": 256} and batches == [0, 512, 256]
    batches.clear()
    assert accelerator.measure("open_clip", flags, 512) == {"batch": 128} and batches == [512, 256, 128]


@pytest.mark.parametrize(
    ("child", "batch", "message", "fewer"),
    [
        ("clip", 8 * 256, "RESOURCE_EXHAUSTED: it needs more", 8 * 128),
        ("open_clip", 512, "CUDA out of memory", 256),
        ("open_clip", 512, "another error", None),
    ],
)
def test_a_batch_that_runs_out_of_memory_names_a_smaller_one(child, batch, message, fewer, monkeypatch):
    def refuse(flags, attempted):
        assert attempted == batch, "a second attempt in the same process"
        raise RuntimeError(message)

    monkeypatch.setattr(accelerator, "ours", refuse)
    monkeypatch.setattr(accelerator, "open_clip", refuse)
    if fewer:
        assert accelerator.attempt(SimpleNamespace(child=child, batch=batch)) == {"retry": fewer}
    else:
        with pytest.raises(RuntimeError, match=message):
            accelerator.attempt(SimpleNamespace(child=child, batch=batch))
