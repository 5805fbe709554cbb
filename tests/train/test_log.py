import contextlib
import threading
import time
import types

import jax
import pytest

from tests.helpers import tiny
from tests.helpers.pages import written
from tests.torture.soak import CLOCKS
from xclip_jax.config import schema
from xclip_jax.core import environment
from xclip_jax.objectives import Objective
from xclip_jax.report import charts, page
from xclip_jax.report.collect import Run
from xclip_jax.report.examples import Examples
from xclip_jax.train import cost, log, trainer
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.log import Clock, progress_line

ENDED = types.SimpleNamespace(block_until_ready=lambda: None)  # the result of a step that has ended


@pytest.fixture
def now(monkeypatch):
    """A time that the test moves."""
    moved = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(log.time, "perf_counter", lambda: moved.now)
    return moved


def values(goodput, wall, useful):
    return pytest.approx({"goodput": goodput, "wall_seconds": wall, "useful_seconds": useful})


def test_goodput_of_one_process(now):
    """100 s of start-up, then 100 s: 12 in an evaluation, 8 in a checkpoint, 10 without data; 70 for ten steps."""
    now.now = 1000.0
    count = Clock(1000.0)
    with count.exclude():  # of the start-up, which is lost anyway
        now.now += 50.0
    now.now = 1100.0
    count.step_started(ENDED)
    count.wait_for_steps()

    def waits():
        now.now += 10.0
        yield

    list(count.count_waits(waits()))
    for seconds in (12.0, 8.0):
        with count.exclude():
            now.now += seconds
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
    count.step_started(ENDED)
    now.now = 130.0
    assert count.goodput(20, wasted=0) == values(163 / 390, 390.0, 163.0)
    # A rewind to step 4: the ten steps of this process, and six of the process before it at the same 10 s a step.
    assert count.goodput(20, wasted=16) == values(3 / 390, 390.0, 3.0)
    assert Clock(0.0, 10, [{"step": 10, "loss": 1.0}]).goodput(10, wasted=0)["wall_seconds"] == 130


def test_speed_leaves_out_pauses_and_the_first_step(now):
    count = Clock(0.0)
    with count.exclude(speed=True):  # an evaluation that a resumed run makes before its first step
        now.now = 40.0
    now.now = 50.0
    count.step_ended()
    assert count.steps_per_second() == 0
    now.now = 55.0
    count.step_ended()
    with count.exclude(speed=True):
        now.now = 65.0
    assert count.steps_per_second() == 1 / 5
    now.now = 75.0
    count.step_ended()
    assert count.steps_per_second() == 1 / 10  # since the last call
    assert count.steps_per_second() == 1 / 10  # no step has ended since


def test_waits_count_when_the_devices_are_idle(now):
    """The data take 5 s before the first step, 1 s behind it, and 4 s, in the first of which the second step ends."""
    clock, end = Clock(0.0), threading.Event()

    def batches():
        now.now += 5.0
        yield
        now.now += 1.0
        yield
        now.now += 1.0
        end.set()
        clock.wait_for_steps()
        now.now += 3.0
        yield

    waits = clock.count_waits(batches())
    next(waits)
    clock.step_started(ENDED)
    clock.wait_for_steps()
    next(waits)
    clock.step_started(types.SimpleNamespace(block_until_ready=end.wait))
    next(waits)
    assert clock.wait_share() == pytest.approx(4 / 5)


def test_the_line_of_a_step():
    config = schema.resolve(tiny.config("clip", steps=100))

    def line(**metrics):
        return progress_line(6, {"loss": 1.0} | metrics, config)

    assert line() == "step 6/100  loss 1.000"
    assert line(mfu=0.412, samples_per_second=3200.0) == f"{line()}  MFU 41.2%  3,200.00 samples/s, 0:00 left"


@pytest.mark.long
def test_a_run_logs_what_it_makes_of_its_time(tmp_path, monkeypatch, capsys):
    """Killed in step 6 and resumed at step 3."""
    pairs = tiny.folder(tmp_path / "pairs")
    changes = {"steps": 6, "checkpoint__every": 3, "data__sources": (f"folder:{pairs}",), "log__trackers": ()}
    c, lost = tiny.config("clip", run=tmp_path / "run", **changes), []
    save, exclude = Checkpointer.save, Clock.exclude

    @contextlib.contextmanager
    def observed(self, **options):
        with exclude(self, **options):
            lost.append("in")
            yield
            lost.append("out")

    monkeypatch.setattr(schema.Config, "alarm_step", 3)
    monkeypatch.setattr(Objective, "alarms", lambda _, metrics: [f"flat: loss {metrics['loss']}"])
    monkeypatch.setattr(Checkpointer, "save", lambda *args: lost.append("save") or save(*args))
    monkeypatch.setattr(Clock, "exclude", observed)
    began = time.perf_counter()
    with tiny.cut_off(5):
        trainer.run(c, uptime=1000.0)
    first = tiny.lines(tmp_path / "run")
    assert [line["step"] for line in first] == [1, 2, 3, 4]
    assert 1000.0 < first[-1]["wall_seconds"] < 1000.0 + time.perf_counter() - began
    # Eight devices of a known kind from now on, of 1 MFLOP/s each.
    monkeypatch.setitem(cost.PEAK_FLOPS, jax.devices()[0].device_kind, 1e6)
    capsys.readouterr()
    trainer.run(c)
    assert lost.count("save") == 2 and all(lost[i - 1] == "in" for i, x in enumerate(lost) if x == "save")
    lines = tiny.lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[:3] == first[:3]
    step, mfus = cost.step_flops(schema.resolve(c)), []
    for line in lines:
        assert line["goodput"] == pytest.approx(line["useful_seconds"] / line["wall_seconds"])
        assert 0 <= line["goodput"] < 1
        assert ("mfu" in line) == (line["step"] >= 5)  # the first step of a process has no speed
        if "model_flops_per_second" in line:
            per_second = step / tiny.BATCH * line["samples_per_second"]
            assert line["model_flops_per_second"] == pytest.approx(per_second)
            mfus += [line["mfu"] / (per_second / 8e6)] if "mfu" in line else []
    assert mfus == pytest.approx([1.0, 1.0])
    # Step 4 of the first process is in the wall time of those after it, and no more in their useful time.
    assert lines[3]["wall_seconds"] > first[3]["wall_seconds"]
    assert lines[3]["useful_seconds"] - first[2]["useful_seconds"] < lines[3]["wall_seconds"] - first[3]["wall_seconds"]
    assert set(CLOCKS) <= lines[-1].keys()
    out = capsys.readouterr().out
    assert out.count("MFU ") == 2 and out.count("WARNING, step 4: flat: loss") == out.count("flat: ") == 1


def test_the_report_shows_them(tmp_path):
    row = {"step": 1, "loss": 1.0, "samples_per_second": 0.0, "goodput": 0.0, "wall_seconds": 9.0}
    fast = row | {"samples_per_second": 8.0, "goodput": 0.625, "model_flops_per_second": 4.2e12}
    unknown = written(tmp_path / "a", tiny.config("clip"), [row, fast | {"step": 2}, fast | {"step": 3}])
    assert page.facts(unknown)["MFU"] == ""
    assert "MFU" not in [chart.title for chart in charts.of_runs([Run("a", 0, unknown, Examples())])]
    fast["mfu"] = 0.314
    known = written(tmp_path / "b", tiny.config("clip"), [row, fast | {"step": 2}, fast | {"step": 3}])
    assert page.facts(known)["MFU"] == "31.4%"
    assert {"MFU", "Goodput"} <= {chart.title for chart in charts.of_runs([Run("b", 0, known, Examples())])}


def test_frozen_towers_have_no_backward_pass():
    c = tiny.config("clip")
    parts, whole = cost.forward_flops(schema.resolve(c)), cost.step_flops(schema.resolve(c))
    c.init.freeze = ("img",)
    assert whole - cost.step_flops(schema.resolve(c)) == pytest.approx(2 * tiny.BATCH * parts["img"])


def test_uptime_is_that_of_this_process():
    before = environment.uptime()
    time.sleep(0.3)
    assert before > 0.1 and 0.25 < environment.uptime() - before < 5  # it has imported JAX
