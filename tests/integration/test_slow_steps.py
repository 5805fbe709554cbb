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
from tests.processes.test_watchdog import Timed
from xclip_jax.core.errors import EXIT_RESUMABLE
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.processes import watchdog

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
# A run of four steps, each of which sleeps in the compiled step.
SLEEPS = """
import sys, time
import jax
from tests.helpers import tiny
from xclip_jax.train import step, trainer; from xclip_jax.processes import watchdog
run, pairs, seconds, watchdog.STOP_SECONDS = *sys.argv[1:3], *map(float, sys.argv[3:])
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


@pytest.fixture
def ended(monkeypatch):
    """The statuses with which a watchdog ends the process, in place of its end."""
    statuses = []

    def end(status):
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr(watchdog, "exit_now", end)
    return statuses


def test_a_slow_step_is_no_hang_after_a_signal(ended, tmp_path, capfd):
    """Steps of 130 s: each has thrice as long, and the first ones as long as they like."""
    dog = Timed(tmp_path, warning=0, limit=1800)
    dog.enter(watchdog.COMPILATION)
    dog.wait(140)
    dog.enter(watchdog.STEP)
    dog.step = 2
    dog.ask()
    dog.wait(20)
    dog.end_step()  # the first
    dog.wait(130)
    dog.end_step()
    dog.wait(390)
    assert not ended
    with pytest.raises(SystemExit):
        dog.wait(1)
    assert ended == [EXIT_RESUMABLE]
    sentence = (
        "error: asked to stop, and in a step (391 s); there is no checkpoint yet, and 2 steps are lost (stacks of"
    )
    assert sentence in capfd.readouterr().err


def test_steps_in_flight_are_progress_after_a_signal(ended, tmp_path, capfd):
    """Twenty steps of 10 s are dispatched at once, and their last is waited for."""
    dog = Timed(tmp_path, warning=60, limit=1800)
    dog.enter(watchdog.STEP)
    dog.ask()
    for _ in range(20):
        dog.wait(10)
        dog.end_step()
    assert not ended and capfd.readouterr() == ("", "")
    dog.step, dog.saved = 120, 100
    with pytest.raises(SystemExit):
        dog.wait(61)
    assert "in a step (61 s); 20 steps since the last checkpoint are lost (stacks of" in capfd.readouterr().err


def test_the_compilation_of_an_evaluation_is_no_hang_after_a_signal(ended, tmp_path):
    dog = Timed(tmp_path, warning=0, limit=1800)
    dog.ask()
    dog.enter(watchdog.EVALUATION)
    dog.wait(1)
    dog.beat()
    dog.wait(100)
    dog.beat()
    dog.enter(watchdog.STEP)
    dog.enter(watchdog.EVALUATION)
    dog.wait(300)
    assert not ended
    with pytest.raises(SystemExit):
        dog.wait(1)


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "limit"), [(5, 1), (130, 60)])
def test_signals_in_steps_that_are_longer_than_the_limit_save(seconds, limit, pairs, tmp_path):
    run = tmp_path / "run"
    line = [sys.executable, "-u", "-c", SLEEPS, *map(str, (run, pairs, seconds, limit))]
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
    saved = RunFolder(run).latest_step()
    assert saved in (2, 3) and f"stopped at step {saved} of 4" in said, said
    # 0 while one step has ended; the last line may be written before the end of its step is noticed.
    speeds = [speed for line in tiny.lines(run) if (speed := line["samples_per_second"])]
    assert speeds == pytest.approx([8 / seconds] * len(speeds), rel=0.3)
    assert said.count("WARNING: no progress: a step") == (seconds > 60), said
