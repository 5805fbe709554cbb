"""A signal in a step that takes minutes, as with many microbatches: the step ends, and is saved.

bash launch/test.sh -m slow tests/integration/test_slow_steps.py
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import tiny
from xclip_jax.core.errors import EXIT_RESUMABLE
from xclip_jax.core.run_folder import RunReader

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
# A run of four steps, each of which sleeps in the compiled step.
SLEEPS = """
import sys, time
import jax
from tests.helpers import tiny
from xclip_jax.train import step, trainer
run, pairs, seconds = *sys.argv[1:3], float(sys.argv[3])
original = step.TrainStep.step

def sleep(loss):
    time.sleep(seconds)
    return loss

def slow(self, state, batch):
    state, metrics = original(self, state, batch)
    loss = metrics["loss"]
    return state, metrics | {"loss": jax.pure_callback(sleep, jax.ShapeDtypeStruct(loss.shape, loss.dtype), loss)}

step.TrainStep.step = slow
trainer.run(tiny.short(pairs, run, data__batch=8, checkpoint__every=1000))
"""


@pytest.mark.slow
def test_a_signal_in_a_long_step_saves(pairs, tmp_path):
    run, seconds = tmp_path / "run", 5
    line = [sys.executable, "-u", "-c", SLEEPS, *map(str, (run, pairs, seconds))]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, stdout=log, stderr=log)
        deadline = time.monotonic() + 100 + 3 * seconds
        while "step 1/4" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(seconds / 26)
        process.send_signal(signal.SIGTERM)
        status = process.wait(100 + 3 * seconds)
    said = (tmp_path / "log").read_text()
    assert status == EXIT_RESUMABLE, said
    saved = RunReader(run).latest_step()
    assert saved in (2, 3) and f"stopped at step {saved} of 4" in said, said
    # 0 while one step has ended; the last line may be written before the end of its step is noticed.
    speeds = [speed for line in tiny.lines(run) if (speed := line["samples_per_second"])]
    assert speeds == pytest.approx([8 / seconds] * len(speeds), rel=0.3)
