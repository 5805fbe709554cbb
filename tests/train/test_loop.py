import itertools
import json
import os
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
from xclip_jax.evaluators.results import Result
from xclip_jax.processes.watchdog import STEP
from xclip_jax.train import trainer, weights
from xclip_jax.train.loop import Session

pytestmark = pytest.mark.long

run = tiny.copied


def go_back(run):
    """Make it a run that was killed after its checkpoint of step 2."""
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "results.json").unlink()


class Evaluator:
    def __init__(self, name):
        self.name, self.calls = name, []
        self.encoder = types.SimpleNamespace(unreadable={})

    def measure(self, variables):
        self.calls.append(jax.device_get(variables))  # the next step overwrites them
        return [Result("", self.name, "top1", 12.5)]


@pytest.fixture
def evaluators(monkeypatch):
    """Sets named "a" and "b" in place of the real ones."""
    made = {name: Evaluator(name) for name in ("a", "b")}
    monkeypatch.setattr(registry, "open_all", lambda specs, *_: [made[spec] for spec in specs])
    return made


def evaluations(run):
    return [line for line in tiny.lines(run) if "loss" not in line]


def test_all_sets_are_opened_before_the_first_step(pairs, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(registry, "open_all", lambda specs, *_: opened.extend(specs) or list(map(Evaluator, specs)))
    monkeypatch.setattr(trainer, "train", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        trainer.run(tiny.short(pairs, tmp_path / "run", eval__sets=("a",), eval__sets_at_end=("b",), eval__every=2))
    assert opened == ["a", "b"]


def test_an_evaluation_that_was_cut_off_is_made_after_all_and_another_not_again(pairs, run, evaluators):
    """Checkpoint and evaluation are due at step 2, and the first run ends between them."""
    c = tiny.short(pairs, run, eval__sets=("a",), eval__every=2)
    for calls in (2, 3):
        go_back(run)
        trainer.run(c)
        assert len(evaluators["a"].calls) == calls
        assert [line["step"] for line in evaluations(run)] == [2, 4]


def test_given_weights_are_evaluated_on_all_sets_before_the_first_step(pairs, tmp_path, run, evaluators):
    """The run is cut off before its first step: it has no checkpoint, and starts again."""
    c = tiny.short(pairs, tmp_path / "new", eval__sets=("a",), eval__sets_at_end=("b",), init__weights=str(run))
    given = jax.device_get(weights.load(str(run))[2])
    for _ in range(2):
        with tiny.cut_off(0):
            trainer.run(c)
        for evaluator in evaluators.values():
            chex.assert_trees_all_equal(evaluator.calls[-1]["params"]["img"], given["params"]["img"])
        assert [line["step"] for line in evaluations(tmp_path / "new")] == [0]


def test_the_average_is_what_is_evaluated_and_loaded(pairs, tmp_path, evaluators):
    average = {"ema__momentum": 0.5, "eval__ema": True}
    sets = {"eval__sets": ("a",), "eval__every": 2, "eval__sets_at_end": ("b",)}
    c = tiny.short(pairs, tmp_path / "run", **average, **sets, objective="nclip")
    trainer.run(c)
    states = {step: jax.device_get(tiny.restored(c, step)[0]) for step in (2, 4)}
    (at_2, at_4), (final,) = evaluators["a"].calls, evaluators["b"].calls
    loaded = jax.device_get(weights.load(c.run)[2])
    for step, found in ((2, at_2), (4, at_4), (4, final), (4, loaded)):
        state = states[step]
        chex.assert_trees_all_equal(found, {"params": state.ema_params, "batch_stats": state.ema_batch_stats})
        for name in found:
            same = map(np.array_equal, *map(jax.tree.leaves, (found[name], state.variables()[name])))
            assert not all(same), name


def test_a_set_that_fails_at_the_end_does_not_cost_the_others(pairs, run, evaluators):
    """Of a complete run that is evaluated on other sets; a start that is refused keeps the older results."""
    c, file = tiny.short(pairs, run, eval__sets_at_end=("a", "b")), run / "results.json"
    before = file.read_text()
    with pytest.raises(KeyError, match="c"):
        trainer.run(tiny.short(pairs, run, eval__sets_at_end=("c",)))
    assert file.read_text() == before

    def fails(_):
        assert not file.exists()  # launch scripts wait for it
        raise OSError("disk of a is gone")

    evaluators["a"].measure = fails
    with pytest.raises(UserError, match=r"1 of 2 evaluation sets failed \(a\).*results\.json has the others"):
        trainer.run(c)
    record = json.loads(file.read_text())
    assert record["results"] == {"b/top1": 12.5}
    assert record["failed"] == {"a": "disk of a is gone; in evaluator a"}
    del evaluators["a"].measure
    for _ in range(2):
        assert trainer.run(c) == {"a/top1": 12.5, "b/top1": 12.5}
    assert evaluations(run) == [{"step": 4, "a/top1": 12.5, "b/top1": 12.5}]
    assert len(evaluators["b"].calls) == 2


def test_images_that_cannot_be_read_for_a_while_do_not_end_a_run(pairs, run, evaluators, monkeypatch, capsys):
    go_back(run)
    c = tiny.short(pairs, run, eval__sets=("a", "b"), eval__every=1)
    measure, times = evaluators["a"].measure, itertools.count(2)

    def away(variables):
        if next(times) in (3, 4):
            raise TooManyUnreadable("40 of 40 images cannot be read")
        return measure(variables)

    monkeypatch.setattr(evaluators["a"], "measure", away)
    with pytest.raises(UserError, match=r"1 of 2 evaluation sets failed \(a\)"):
        trainer.run(c)
    assert "WARNING: a has no result of step 3: 40 of 40 images cannot be read" in capsys.readouterr().out
    whole = {"a/top1": 12.5, "b/top1": 12.5}
    without = {"b/top1": 12.5}
    assert evaluations(run) == [{"step": 2} | whole, {"step": 3} | without, {"step": 4} | without]
    assert trainer.run(c) == whole


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


def test_a_signal_may_save_the_first_step_once_it_is_dispatched(pairs, tmp_path, monkeypatch):
    """While its end is awaited, the watchdog would end a compilation without a checkpoint."""
    phases = []
    monkeypatch.setattr(Session, "save", lambda session, *_: phases.append(session.watch.current))
    trainer.run(brief(pairs, tmp_path / "run", steps=1, optim__warmup=0))
    assert phases == [STEP]


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
