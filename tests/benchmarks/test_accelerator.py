"""`python -m benchmarks.accelerator` in its small form, on a CPU."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import accelerator


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


def test_each_attempt_is_a_process_of_its_own(monkeypatch):
    flags = SimpleNamespace(steps=2, small=False, groups=True, trace="")
    batches = []

    def process(command, **_):
        batches.append(int(command[command.index("--batch") + 1]))
        answer = {"retry": batches[-1] // 2} if len(batches) < 3 else {"batch": batches[-1]}
        return SimpleNamespace(returncode=0, stdout=f"a line\n{json.dumps(answer)}\n")

    monkeypatch.setattr(subprocess, "run", process)
    assert accelerator.measure("clip", flags, 1024) == {"batch": 256} and batches == [1024, 512, 256]


def test_a_batch_that_runs_out_of_memory_names_a_smaller_one(monkeypatch):
    attempted = []

    def refuse(flags, batch):
        attempted.append(batch)
        raise RuntimeError(message)

    monkeypatch.setattr(accelerator, "ours", refuse)
    message = "RESOURCE_EXHAUSTED: it needs more"
    assert accelerator.attempt(SimpleNamespace(child="clip", batch=2048)) == {"retry": 1024}
    for batch, message in ((128, "CUDA out of memory"), (512, "another error")):
        with pytest.raises(RuntimeError, match=message):
            accelerator.attempt(SimpleNamespace(child="clip", batch=batch))
    assert attempted == [2048, 128, 512], "a second attempt in the same process"
