"""The clock of a run: speed, waits for data, and goodput."""

import time

import pytest

from tests.helpers import tiny
from xclip_jax.config.schema import resolve
from xclip_jax.train import log
from xclip_jax.train.log import Clock, progress_line


class Now:
    """A time that the test moves."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


class Ended:
    """The result of a step that has ended."""

    def block_until_ready(self):
        pass


@pytest.fixture
def now(monkeypatch):
    moved = Now()
    monkeypatch.setattr(log.time, "perf_counter", moved)
    return moved


def values(goodput, wall, useful):
    return pytest.approx({"goodput": goodput, "wall_seconds": wall, "useful_seconds": useful})


def spend(count, now, seconds):
    with count.exclude_from_goodput():
        now.now += seconds


def test_goodput_of_one_process(now):
    """100 s of start-up, then 100 s: 12 in an evaluation, 8 in a checkpoint, 10 without data; 70 for ten steps."""
    now.now = 1000.0
    count = Clock(1000.0)
    spend(count, now, 50.0)  # of the start-up, which is lost anyway
    now.now = 1100.0
    count.step_started(Ended())
    count.wait_for_steps()

    def waits():
        now.now += 10.0
        yield

    list(count.count_waits(waits()))
    spend(count, now, 12.0)
    spend(count, now, 8.0)
    now.now = 1200.0
    assert count.goodput(10, wasted=0) == values(0.35, 200.0, 70.0)
    # One of the ten steps was skipped: a tenth of the 70 s.
    assert count.goodput(10, wasted=1) == values(0.315, 200.0, 63.0)
    assert count.goodput(10, wasted=10) == values(0.0, 200.0, 0.0)


def test_goodput_of_a_run_that_resumes(now):
    """The run resumes at step 10: 27 of the 90 useful seconds until step 14 were in vain."""
    before = [
        {"step": 5, "loss": 1.0, "wall_seconds": 150.0, "useful_seconds": 30.0},
        {"step": 10, "loss": 1.0, "wall_seconds": 200.0, "useful_seconds": 63.0},
        {"step": 10, "zeroshot/x/top1": 3.0},
        {"step": 14, "loss": 1.0, "wall_seconds": 260.0, "useful_seconds": 90.0},
    ]
    count = Clock(0.0, 10, before)
    now.now = 30.0
    assert count.goodput(10, wasted=0) == values(63 / 290, 290.0, 63.0)
    count.step_started(Ended())
    now.now = 130.0
    assert count.goodput(20, wasted=0) == values(163 / 390, 390.0, 163.0)
    # A rewind to step 4: the ten steps of this process, and six of the process before it at the same 10 s a step.
    assert count.goodput(20, wasted=16) == values(3 / 390, 390.0, 3.0)
    assert Clock(0.0, 10, [{"step": 10, "loss": 1.0}]).goodput(10, wasted=0)["wall_seconds"] == 130


def test_speed_leaves_out_pauses_and_the_first_step(now):
    count = Clock(0.0)
    with count.exclude_from_speed():  # an evaluation that a resumed run makes before its first step
        now.now = 40.0
    now.now = 50.0
    count.step_ended()
    assert count.steps_per_second() == 0
    now.now = 55.0
    count.step_ended()
    with count.exclude_from_speed():
        now.now = 65.0
    assert count.steps_per_second() == 1 / 5
    now.now = 75.0
    count.step_ended()
    assert count.steps_per_second() == 1 / 10  # since the last call
    assert count.steps_per_second() == 1 / 10  # no step has ended since


class Step:
    """The result of a step that takes a while and begins when the one before has ended."""

    def __init__(self, seconds, before):
        self.end = max(time.monotonic(), before.end if before else 0) + seconds

    def block_until_ready(self):
        time.sleep(max(self.end - time.monotonic(), 0))


@pytest.mark.parametrize(("step", "data", "share"), [(0.2, 0.05, 0.0), (0.05, 0.2, 0.75)])
def test_waiting_counts_when_the_devices_are_idle(step, data, share):
    """A step that is longer than its data hides it; else the devices wait for the difference."""

    def batches():
        for i in range(5):
            time.sleep(data if i else 0.5)  # the first one waits for workers to start
            yield i

    clock, before = Clock(0.0), None
    for i, batch in enumerate(clock.count_waits(batches())):
        assert i == batch
        value = Step(step, before)
        clock.step_started(value)
        if before:
            before.block_until_ready()  # as for its metrics
        before = value
    measured = clock.wait_share()
    clock.close()
    assert measured == pytest.approx(share, abs=0.2)


def test_the_line_of_a_step():
    config = resolve(tiny.config("clip", steps=100))

    def line(**metrics):
        return progress_line(6, {"loss": 1.0} | metrics, config)

    assert line() == "step 6/100  loss 1.000  (compiled)"
    assert "input-bound: 75%" in line(**{"data/wait_share": 0.75})
    assert "input-bound" not in line(**{"data/wait_share": 0.01})
    assert "MFU 41.2%" in line(mfu=0.412) and "MFU" not in line()
    for speed, shown in ((267.4, "267"), (4.71, "4.7"), (0.4, "0.4"), (0.032, "0.032")):
        assert f"  {shown} samples/s, " in line(samples_per_second=speed)
