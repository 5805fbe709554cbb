"""The training loop: evaluations over several starts of a run, and traces of its steps."""

import gzip
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import types

import chex
import jax
import numpy as np
import pytest

from tests.helpers import tiny
from xclip_jax.core.errors import EXIT_RESUMABLE, UserError, describe
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import loader
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.encoder import TooManyUnreadable
from xclip_jax.evaluators.results import Result, flat
from xclip_jax.processes import interrupt
from xclip_jax.train import build, loop, trainer, weights
from xclip_jax.train.callbacks import Callback
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.loop import Session

pytestmark = pytest.mark.long


@pytest.fixture
def run(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


class Evaluator:
    """Counts what it is asked, and fails where it is told to."""

    def __init__(self, name, fails=False):
        self.name, self.fails, self.calls = name, fails, []
        self.encoder = types.SimpleNamespace(unreadable={})

    def measure(self, variables):
        self.calls.append(jax.device_get(variables))  # the next step overwrites them
        if self.fails:
            raise OSError(f"disk of {self.name} is gone")
        return [Result("", self.name, "top1", 12.5)]


@pytest.fixture
def evaluators(monkeypatch):
    """Sets named "a" and "b" in place of the real ones."""
    made = {name: Evaluator(name) for name in ("a", "b")}
    monkeypatch.setattr(registry, "open_all", lambda specs, *_: [made[spec] for spec in specs])
    return made


def test_all_sets_are_opened_before_the_first_step(pairs, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(registry, "open_all", lambda specs, *_: opened.extend(specs) or list(map(Evaluator, specs)))
    monkeypatch.setattr(trainer, "train", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        trainer.run(tiny.short(pairs, tmp_path / "run", eval__sets=("a",), eval__sets_at_end=("b",), eval__every=2))
    assert opened == ["a", "b"]


def test_the_evaluation_of_a_step_that_was_cut_off_is_made_after_all(pairs, tmp_path, evaluators, monkeypatch):
    """Checkpoint and evaluation are due at step 2, and the run ends between them."""
    c = tiny.short(pairs, tmp_path / "run", eval__sets=("a",), eval__every=2)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "evaluate", lambda *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            trainer.run(c)
    assert evaluators["a"].calls == []
    trainer.run(c)
    assert [line["step"] for line in tiny.lines(tmp_path / "run") if "a/top1" in line] == [2, 4]


def test_an_evaluation_that_was_made_is_not_made_again(pairs, tmp_path, evaluators, monkeypatch):
    c = tiny.short(pairs, tmp_path / "run", eval__sets=("a",), eval__every=2)
    with monkeypatch.context() as patch:
        # Asked before the first step, after each, and once in the evaluation of step 2.
        questions = itertools.count()
        patch.setattr(interrupt.PreemptionHandler, "requested", lambda _: next(questions) == 4)
        with pytest.raises(SystemExit) as stopped:
            trainer.run(c)
    assert stopped.value.code == interrupt.EXIT_RESUMABLE
    evaluations = []
    recorder = Callback()
    recorder.on_evaluation = lambda step, results: evaluations.append((step, results))
    trainer.run(c, [recorder])
    assert [line["step"] for line in tiny.lines(tmp_path / "run") if "a/top1" in line] == [2, 4]
    assert [(step, flat(results)) for step, results in evaluations] == [(4, {"a/top1": 12.5})]


def test_given_weights_are_evaluated_on_all_sets_before_the_first_step_once(pairs, tmp_path, run, evaluators, capsys):
    """The run is cut off before its first step: it has no checkpoint, and starts again."""
    c = tiny.short(pairs, tmp_path / "new", eval__sets=("a",), eval__sets_at_end=("b",), init__weights=str(run))
    with tiny.cut_off(0):
        trainer.run(c)
    given = jax.device_get(weights.load(str(run))[2])
    for evaluator in evaluators.values():
        (found,) = evaluator.calls
        chex.assert_trees_all_equal(found["params"]["img"], given["params"]["img"])
    assert "before: " not in capsys.readouterr().out
    trainer.run(c)
    assert [len(evaluator.calls) for evaluator in evaluators.values()] == [2, 2]
    assert [line["step"] for line in tiny.lines(tmp_path / "new") if "b/top1" in line] == [0, 4]
    assert re.search(r"^before: .* 12\.5 \| .* 12\.5$", capsys.readouterr().out, re.M)


def test_what_was_measured_before_is_of_the_same_weights_and_sets(pairs, tmp_path, run, evaluators):
    """A folder without a checkpoint takes a new config; evaluations of the old one are made again."""
    for resize, calls in (("shortest", 1), ("squash", 2), ("squash", 2)):
        given = {"eval__sets": ("a",), "init__weights": str(run), "eval__resize": resize}
        with tiny.cut_off(0):
            trainer.run(tiny.short(pairs, tmp_path / "new", **given))
        assert len(evaluators["a"].calls) == calls
        assert [line["step"] for line in tiny.lines(tmp_path / "new") if "a/top1" in line] == [0]


def test_the_average_is_what_is_evaluated_and_loaded(pairs, tmp_path, evaluators):
    average = {"ema__momentum": 0.5, "eval__ema": True}
    sets = {"eval__sets": ("a",), "eval__every": 2, "eval__sets_at_end": ("b",)}
    c = tiny.short(pairs, tmp_path / "run", **average, **sets, objective="nclip")
    trainer.run(c)
    with Checkpointer(c.run, read_only=True) as checkpointer:
        abstract = build.build(c).abstract
        states = {step: jax.device_get(checkpointer.restore(abstract, step)[0]) for step in (2, 4)}
    (at_2, at_4), (final,) = evaluators["a"].calls, evaluators["b"].calls
    loaded = jax.device_get(weights.load(c.run)[2])
    for step, found in ((2, at_2), (4, at_4), (4, final), (4, loaded)):
        state = states[step]
        chex.assert_trees_all_equal(found, {"params": state.ema_params, "batch_stats": state.ema_batch_stats})
        for name in found:
            same = map(np.array_equal, *map(jax.tree.leaves, (found[name], state.variables()[name])))
            assert not all(same), name


def test_a_set_that_fails_at_the_end_does_not_cost_the_others(pairs, tmp_path, evaluators):
    c = tiny.short(pairs, tmp_path / "run", eval__sets_at_end=("a", "b"))
    evaluators["a"].fails = True
    with pytest.raises(UserError, match=r"1 of 2 evaluation sets failed \(a\).*results\.json has the others"):
        trainer.run(c)
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["results"] == {"b/top1": 12.5}
    assert record["failed"] == {"a": "disk of a is gone; in evaluator a"}
    evaluators["a"].fails = False
    assert trainer.run(c) == {"a/top1": 12.5, "b/top1": 12.5}
    (line,) = [line for line in tiny.lines(tmp_path / "run") if line["step"] == 4 and "loss" not in line]
    assert line == {"step": 4, "a/top1": 12.5, "b/top1": 12.5}


def test_images_that_cannot_be_read_for_a_while_do_not_end_a_run(pairs, tmp_path, evaluators, monkeypatch, capsys):
    c = tiny.short(pairs, tmp_path / "run", eval__sets=("a", "b"), eval__every=1)
    measure, times = evaluators["a"].measure, itertools.count(1)

    def away(variables):
        if next(times) in (2, 4):
            raise TooManyUnreadable("40 of 40 images cannot be read")
        return measure(variables)

    monkeypatch.setattr(evaluators["a"], "measure", away)
    with pytest.raises(UserError, match=r"1 of 2 evaluation sets failed \(a\)"):
        trainer.run(c)
    assert "WARNING: a has no result of step 2: 40 of 40 images cannot be read" in capsys.readouterr().out
    evaluations = [line for line in tiny.lines(tmp_path / "run") if "loss" not in line]
    whole = {"a/top1": 12.5, "b/top1": 12.5}
    without = {"b/top1": 12.5}
    assert evaluations == [{"step": 1} | whole, {"step": 2} | without, {"step": 3} | whole, {"step": 4} | without]
    assert trainer.run(c) == whole


def test_a_complete_run_is_evaluated_on_other_sets_and_keeps_no_older_results(pairs, run, evaluators):
    """The launch scripts wait for results.json. A refused start changes nothing."""
    file, changed = run / "results.json", tiny.short(pairs, run, eval__sets_at_end=("b",))
    before, measure = file.read_text(), evaluators["b"].measure
    with pytest.raises(KeyError, match="c"):
        trainer.run(tiny.short(pairs, run, eval__sets_at_end=("c",)))
    assert file.read_text() == before

    def cut_off(_):
        assert not file.exists()
        raise KeyboardInterrupt

    evaluators["b"].measure = cut_off
    with pytest.raises(KeyboardInterrupt):
        trainer.run(changed)
    assert not file.exists()
    evaluators["b"].measure = measure
    for _ in range(2):
        assert trainer.run(changed) == json.loads(file.read_text())["results"] == {"b/top1": 12.5}
    assert len(evaluators["b"].calls) == 1


def test_a_run_leaves_a_trace_of_its_steps(pairs, tmp_path, capsys):
    trainer.run(tiny.short(pairs, tmp_path / "run", log__profile=(2, 3)))

    def traced(end):
        (path,) = (tmp_path / "run" / "profile" / "plugins" / "profile").glob(f"*/*{end}")
        return path

    data = jax.profiler.ProfileData.from_file(str(traced(".xplane.pb")))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats).get("step_num") for event in events if event.name == "train"]
    assert sorted(steps) == [2, 3] and len(events) > 100
    traces = [
        json.loads(gzip.decompress(traced(f"{name}.json.gz").read_bytes())) for name in ("perfetto_trace", ".trace")
    ]
    for trace in traces:
        annotated = [event for event in trace["traceEvents"] if event.get("name") == "train"]
        assert sorted(int(event["args"]["step_num"]) for event in annotated) == [2, 3]
    assert "metadata" not in traces[0]  # which Perfetto does not read
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile of steps 2 to 3")]
    assert len(said) == 1 and f"xprof --logdir {tmp_path / 'run' / 'profile'}" in said[0]


def test_the_trace_waits_for_the_steps_before_it_and_in_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: calls.append(("wait", x)) or x)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    tracer = loop.StepTracer((4, 5), RunReader(tmp_path))
    for step in range(3, 8):
        assert tracer(step, lambda x: calls.append(x) or x + 1, 10 * step) == 10 * step + 1
    tracer.close()
    assert calls == [30, ("wait", (40,)), "start", 40, 50, ("wait", 51), "stop", 60, 70]
    calls.clear()
    tracer = loop.StepTracer((4, 6), RunReader(tmp_path))  # of a run that resumed at step 4
    for step in (5, 6, 7):
        tracer(step, calls.append, step)
    assert calls == [("wait", (5,)), "start", 5, 6, ("wait", None), "stop", 7]


def test_a_trace_that_fails_is_a_warning(tmp_path, capsys):
    """Another trace is in progress; the run's folder cannot be written to."""
    tracer = loop.StepTracer((1, 2), RunReader(tmp_path / "run"))
    with jax.profiler.trace(tmp_path / "other"):
        assert [tracer(step, lambda x: x, step) for step in (1, 2, 3)] == [1, 2, 3]
    tracer.close()
    assert "WARNING: the steps of log.profile cannot be traced: Profile has already" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    tracer = loop.StepTracer((1, 2), RunReader(tmp_path / "file"))
    assert [tracer(step, lambda x: x, step) for step in (1, 2, 3)] == [1, 2, 3]
    out = capsys.readouterr().out
    assert "WARNING: the steps of log.profile cannot be traced" in out and out.count("\n") == 1
    with jax.profiler.trace(tmp_path / "other"):  # the profiler is free again
        pass


def brief(pairs, run, **changes):
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
    c = brief(pairs, tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        trainer.run(c)
    assert stopped.value.code == EXIT_RESUMABLE
    assert RunReader(c.run).latest_step() == 2


def test_data_that_fail_do_not_cost_the_steps_before(pairs, tmp_path, feed):
    def end(_):
        raise UserError("the disk is gone")

    feed(end)
    c = brief(pairs, tmp_path / "run")
    with pytest.raises(UserError, match="the disk is gone") as raised:
        trainer.run(c)
    assert describe(raised.value).endswith("the state of step 2 is saved")
    assert RunReader(c.run).latest_step() == 2


@pytest.mark.slow
def test_too_many_bad_samples_do_not_cost_the_steps_before(tmp_path):
    """The saved counters are exact: with a larger bound the same command ends as if there had been no stop."""
    bad = tiny.folder(tmp_path / "bad")
    for path in sorted(bad.glob("*.png"))[::2]:
        path.write_bytes(b"<html>")
    c = brief(bad, tmp_path / "run", data__max_bad_fraction=0.002)
    for _ in range(2):  # the second is stopped before its first step
        with pytest.raises(UserError, match=r"samples are bad, more than data\.max_bad_fraction=0\.002 allows"):
            trainer.run(c)
        assert RunReader(c.run).latest_step() == 2
    logged = []
    for run in ("run", "straight"):
        c = brief(bad, tmp_path / run, data__max_bad_fraction=1.0)
        trainer.run(c)
        keys = ("step", "loss", "tokens", "data/bad", "samples")
        logged.append([[line[key] for key in keys] for line in RunReader(c.run).read_metrics()])
    assert logged[0] == logged[1] and len(logged[0]) == 4
