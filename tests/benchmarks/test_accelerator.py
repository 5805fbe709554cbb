"""`python -m benchmarks.accelerator` in its small form, on a CPU."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from benchmarks import accelerator, step
from xclip_jax.data.length_groups import LengthGroups
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
        (150, 100, 128),  # of 92 bytes; steps of 384 and 192 pairs are refused
        (30, 50, 32),  # of 46 bytes
    ],
)
def test_batch_follows_from_the_memory_of_two_small_ones(refused_from, free, pairs, monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": free})
    monkeypatch.setattr(jax, "devices", lambda: [device] * 2)
    monkeypatch.setattr(accelerator, "experiment_of", lambda objective, batch, small, groups: batch)
    monkeypatch.setattr(
        cost, "compile_if_fits", lambda batch: (batch, "") if batch / 2 < refused_from else (None, "it needs more")
    )
    monkeypatch.setattr(cost, "memory_usage", lambda batch, _: {"peak": 20 + batch / 2 * 0.5})
    assert accelerator.fitting_batch("clip", small=False, groups=False) == 2 * pairs


def test_a_device_on_which_nothing_fits(monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(accelerator, "experiment_of", lambda *_: None)
    monkeypatch.setattr(cost, "compile_if_fits", lambda _: (None, "it needs 20.0G"))
    with pytest.raises(SystemExit, match=r"it needs 20\.0G"):
        accelerator.fitting_batch("clip", small=False, groups=False)


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
        ("clip", 8, "RESOURCE_EXHAUSTED: it needs more", None),
        ("open_clip", 512, "CUDA out of memory", 256),
        ("open_clip", 128, "CUDA out of memory", None),
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


def test_groups_are_those_of_a_devices_rows(monkeypatch):
    asked, groups = [], LengthGroups(((24, 0.5),))
    monkeypatch.setattr(step, "groups_for", lambda rows, draws, _: asked.append((rows, draws)) or groups)
    experiment = accelerator.experiment_of("clip", 512, small=True, groups=True)
    assert asked == [(512 / 8, 8)] and experiment.length_groups == groups


def test_the_peer_has_one_device_and_whole_texts():
    ours = {"program": "xclip_jax", "batch": 4096, "whole": 8e14, "flops": 6e14, "cut": False, "peak": 8e15}
    row = accelerator.of_one_device(ours | {"device_count": 8}, {"program": "open_clip", "batch": 256})
    assert (row["flops"], row["peak"]) == (8e14 / 16, 1e15)
    assert "whole" in accelerator.texts(row) and "fits no groups" in accelerator.texts(ours)
    assert "in groups" in accelerator.texts(ours | {"cut": True})
