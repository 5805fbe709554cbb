"""Batches: waiting for them is measured, and can be interrupted."""

import os
import signal
import threading
import time

import pytest

from tests.helpers import tiny
from xclip_jax.core.errors import EXIT_RESUMABLE, UserError, describe
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.data import loader
from xclip_jax.train import trainer
from xclip_jax.train.batches import InputStallTimer
from xclip_jax.train.log import Progress


def config(pairs, run, **changes):
    defaults = {"data__sources": (f"folder:{pairs}",), "checkpoint__every": 1000, "steps": 4, "data__batch": 8}
    return tiny.config("clip", run=run, **defaults | changes)


@pytest.fixture
def feed(monkeypatch):
    """Replaces what follows the second batch of a run."""
    read, finished = loader.batches, threading.Event()

    def replace(end):
        def batches(*args, **options):
            for number, batch in enumerate(read(*args, **options), 1):
                yield batch
                if number == 2:
                    end(finished)

        monkeypatch.setattr(loader, "batches", batches)

    yield replace
    finished.set()


def test_a_signal_saves_the_last_step_while_data_do_not_come(pairs, tmp_path, feed):
    def end(finished):
        os.kill(os.getpid(), signal.SIGTERM)
        finished.wait(100)

    feed(end)
    c = config(pairs, tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        trainer.run(c)
    assert stopped.value.code == EXIT_RESUMABLE
    assert RunFolder(c.run).latest_step() == 2


def test_data_that_fail_do_not_cost_the_steps_before(pairs, tmp_path, feed):
    def end(_):
        raise UserError("the disk is gone")

    feed(end)
    c = config(pairs, tmp_path / "run")
    with pytest.raises(UserError, match="the disk is gone") as raised:
        trainer.run(c)
    assert describe(raised.value).endswith("the state of step 2 is saved")
    assert RunFolder(c.run).latest_step() == 2


@pytest.mark.slow
def test_too_many_bad_samples_do_not_cost_the_steps_before(tmp_path):
    """The saved counters are exact: with a larger bound the same command ends as if there had been no stop."""
    bad = tiny.folder(tmp_path / "bad")
    for path in sorted(bad.glob("*.png"))[::2]:
        path.write_bytes(b"<html>")
    c = config(bad, tmp_path / "run", data__max_bad_fraction=0.002)
    for _ in range(2):  # the second is stopped before its first step
        with pytest.raises(UserError, match=r"samples are bad, more than data\.max_bad_fraction=0\.002 allows"):
            trainer.run(c)
        assert RunFolder(c.run).latest_step() == 2
    logged = []
    for run in ("run", "straight"):
        c = config(bad, tmp_path / run, data__max_bad_fraction=1.0)
        trainer.run(c)
        keys = ("step", "loss", "tokens", "data/bad", "samples")
        logged.append([[line[key] for key in keys] for line in RunFolder(c.run).read_metrics()])
    assert logged[0] == logged[1] and len(logged[0]) == 4


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

    stalls, before = InputStallTimer(), None
    for i, batch in enumerate(stalls(batches())):
        assert i == batch
        value = Step(step, before)
        stalls.step_started(value)
        if before:
            before.block_until_ready()  # as for its metrics
        before = value
    measured = stalls.share()
    stalls.close()
    assert measured == pytest.approx(share, abs=0.2)
    assert "input-bound: 75%" in Progress(10, 8).line(1, {"loss": 1.0, "data/wait_share": 0.75})
    assert "input-bound" not in Progress(10, 8).line(1, {"loss": 1.0, "data/wait_share": 0.01})
