"""Trackers of a run, against fake modules `wandb` and `trackio` that note what they are called with."""

import importlib.machinery
import json
import signal
import sys
import threading
import types

import jax
import pytest
from tensorboardX import event_file_writer

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.config.schema import resolve
from xclip_jax.core.errors import EXIT_RESUMABLE, UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data.ledger import BadSampleLog
from xclip_jax.train import callbacks, log, prepare, trainer
from xclip_jax.train.callbacks import Callback, Trackers
from xclip_jax.train.run_writer import RunWriter


class FakeRun:
    def __init__(self, calls, name):
        self.calls, self.name = calls, name

    def log(self, values, step=None):
        self.calls.append((self.name, "log", values if step is None else {"step": step} | values))

    def define_metric(self, name, step_metric):
        self.calls.append((self.name, "define_metric", (name, step_metric)))

    def finish(self):
        self.calls.append((self.name, "finish", None))


@pytest.fixture
def calls(monkeypatch):
    """What the fake modules were called with, as (tracker, call, arguments)."""
    calls = []
    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)

        def init(project, name=None, _name=name, **options):
            calls.append((_name, "init", options | {"project": project, "name": name}))
            return FakeRun(calls, _name)

        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def settings(run, **changes):
    return resolve(tiny.config(run=run, log__trackers=("tensorboard", "wandb", "trackio"), **changes))


def logged(calls, tracker, call):
    return [values for name, kind, values in calls if (name, kind) == (tracker, call)]


def test_a_run_with_all_trackers(calls, pairs, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setenv("TRACKIO_PROJECT", "birds")
    run = tmp_path / "mine"
    trainer.run(tiny.short(pairs, run, log__trackers=("tensorboard", "wandb", "trackio")))
    run_id = json.loads((run / "trackers.json").read_text())["id"]
    names = {"wandb": ("xclip_jax", "mine"), "trackio": ("birds", f"mine-{run_id}")}
    for name, shown in names.items():
        (init,) = logged(calls, name, "init")
        assert (init["project"], init["name"], init["resume"]) == (*shown, "allow")
        assert init["config"]["optim"]["lr"] == 1e-3
        assert logged(calls, name, "log") == tiny.lines(run)
        assert logged(calls, name, "finish") == [None]
    assert logged(calls, "wandb", "init")[0]["id"] == run_id
    assert logged(calls, "wandb", "init")[0]["dir"] == str(run)
    assert logged(calls, "wandb", "define_metric") == [("*", "step")]
    assert any((run / "tensorboard").iterdir())


def test_a_resumed_run_goes_on_in_the_same_run(calls, tmp_path):
    def start(step):
        Trackers(RunReader(tmp_path), settings(tmp_path), step).close()
        return logged(calls, "wandb", "init")[-1]["id"], logged(calls, "trackio", "init")[-1]["name"]

    first = start(0)
    assert start(5) == first
    restarted = start(0)  # without a checkpoint: another run
    assert restarted[0] != first[0] and restarted[1] != first[1]


@pytest.mark.parametrize("call", ["init", "log"])
def test_one_that_fails_is_one_warning_and_the_others_go_on(call, calls, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ConnectionError("no route to host\nmore of it")

    broken = types.SimpleNamespace(define_metric=lambda *_, **__: None, log=fail)
    monkeypatch.setattr(sys.modules["wandb"], "init", fail if call == "init" else lambda *_, **__: broken)
    opened = Trackers(RunReader(tmp_path), settings(tmp_path), 0)
    for step in (1, 2):
        opened.log(step, {"loss": 1.0})
    opened.close()
    warning = f"WARNING: wandb failed and is disabled (ConnectionError: no route to host); {tmp_path}/metrics.jsonl"
    assert capsys.readouterr().out.count(warning) == 1
    assert logged(calls, "trackio", "log") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    assert logged(calls, "trackio", "finish") == [None] and not logged(calls, "wandb", "finish")


def test_trackers_that_are_unknown_or_not_installed_are_named(monkeypatch):
    assert tuple(callbacks.TRACKERS) == schema.TRACKERS
    with pytest.raises(UserError, match=r"log\.trackers is \('mlflow',\)"):
        resolve(tiny.config(log__trackers=("mlflow",)))
    monkeypatch.setattr(callbacks.importlib.util, "find_spec", lambda _: None)
    config = resolve(tiny.config(log__trackers=("wandb",)))
    callbacks.check_names(config, installed=False)
    with pytest.raises(UserError, match=r"log\.trackers names 'wandb'"):
        callbacks.check_names(config)


def test_process_0_alone_writes(calls, pairs, tmp_path, monkeypatch):
    config = resolve(tiny.short(pairs, tmp_path / "run", log__trackers=("tensorboard", "wandb")))
    prepared, _ = prepare.prepare(config, RunWriter(config.run))
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    ledger = BadSampleLog(tmp_path / "run", max_bad_fraction=1.0, start=0, counters=None)
    threads = {*threading.enumerate()}
    log.MetricLogger(prepared, 0, ledger, types.SimpleNamespace(file=ledger.file), began=0.0).end()
    for thread in {*threading.enumerate()} - threads:  # the clock's
        thread.join(10)
        assert not thread.is_alive()
    assert calls == [] and not list((tmp_path / "run").iterdir())


def test_a_signal_in_the_report_leaves_it_and_ends_the_trackers(calls, pairs, tmp_path, capsys):
    run, reported, stops = tmp_path / "run", [], [Callback(), Callback()]
    stops[0].on_end = lambda *_: signal.raise_signal(signal.SIGTERM)
    stops[1].on_end = lambda *_: reported.append(1)
    with pytest.raises(SystemExit) as stopped:
        trainer.run(tiny.short(pairs, run, log__trackers=("wandb",)), stops)
    assert stopped.value.code == EXIT_RESUMABLE and not reported and calls[-1] == ("wandb", "finish", None)
    assert f"the report was interrupted; xclip-jax report {run} makes it" in capsys.readouterr().out
    assert RunReader(run).results_file.exists()


def test_a_disk_that_fails_under_tensorboard_does_not_block_the_run(tmp_path, monkeypatch, capsys):
    """Its thread ends at the first error, and nobody empties its queue then."""

    def full(*_):
        raise OSError(28, "No space left on device")

    opened = Trackers(RunReader(tmp_path), resolve(tiny.config(run=tmp_path)), 0)
    opened.log(0, {"a": 0.0})
    monkeypatch.setattr(event_file_writer.EventsWriter, "write_event", full)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    opened.log(0, {"a": 1.0})
    opened._open["tensorboard"]._writer.file_writer.event_writer._worker.join(30)
    thread = threading.Thread(
        target=lambda: [*(opened.log(i, {"a": 1.0, "b": 2.0}) for i in range(200)), opened.close()], daemon=True
    )
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert capsys.readouterr().out.count("WARNING: tensorboard failed") == 1
