import json
import pathlib
import shutil
import signal

import chex
import jax
import pytest

from tests.helpers import tiny
from tests.torture.soak import CLOCKS
from xclip_jax.core import storage
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.processes.interrupt import EXIT_RESUMABLE
from xclip_jax.train import build, prepare, trainer
from xclip_jax.train.callbacks import Callback
from xclip_jax.train.checkpoint import Checkpointer

pytestmark = pytest.mark.long


def config(pairs, run, **changes):
    return tiny.config(run=run, **{"data__sources": (f"folder:{pairs}",)} | changes)


def logged(run):
    """Training metrics by step, without those that measure time."""
    return {line["step"]: {k: v for k, v in line.items() if k not in CLOCKS} for line in tiny.lines(run)}


def final_state(c):
    p = build.build(c)
    with Checkpointer(c.run) as checkpointer:
        state, position = checkpointer.restore(p.abstract)
    return jax.device_get(state), position


class Recorder(Callback):
    def __init__(self):
        self.steps, self.ends = [], []

    def on_log(self, step, metrics):
        self.steps.append((step, metrics["loss"]))

    def on_end(self, run, variables, results):
        self.ends.append((run.folder.read_results()["results"], sorted(variables), results))


@pytest.fixture(scope="module")
def straight(pairs, tmp_path_factory):
    """Ten steps without a break: the config, the last state and position, and what a callback was called with."""
    c, recorder = config(pairs, tmp_path_factory.mktemp("straight") / "run"), Recorder()
    trainer.run(c, [recorder])
    return c, *final_state(c), recorder


def test_resume_is_bit_exact(pairs, tmp_path, straight):
    """Killed at step 7, resumed from step 5: state and metrics, and so the data, are those of ten steps."""
    c = config(pairs, tmp_path / "run")
    with tiny.cut_off(7):
        trainer.run(c)
    trainer.run(c)
    state, position = final_state(c)
    chex.assert_trees_all_equal(state, straight[1])
    counters = position.pop("counters")
    assert counters == straight[2].pop("counters")
    assert position == straight[2] == {"batch": tiny.BATCH, "samples": 10 * tiny.BATCH, "seed": 0}
    assert counters["samples"] == 10 * tiny.BATCH
    assert counters["bad"] == {}
    assert counters["tokens"] == logged(tmp_path / "run")[10]["tokens"] > 10 * tiny.BATCH
    assert logged(tmp_path / "run") == logged(pathlib.Path(straight[0].run))
    assert list(logged(tmp_path / "run")) == list(range(1, 11))


def test_callbacks_receive_metrics_and_the_model(straight):
    recorder = straight[3]
    assert recorder.steps == [(step, line["loss"]) for step, line in logged(pathlib.Path(straight[0].run)).items()]
    assert recorder.ends == [({}, ["batch_stats", "params"], [])]


def test_sigterm_saves_and_the_same_command_goes_on(pairs, tmp_path, straight, capsys):
    class Stops(Callback):
        def on_log(self, step, metrics):
            if step == 3:
                signal.raise_signal(signal.SIGTERM)

    run = tmp_path / "run"
    c = config(pairs, run, checkpoint__every=1000)
    with pytest.raises(SystemExit) as stopped:
        trainer.run(c, [Stops()])
    saved = RunReader(run).latest_step()
    assert stopped.value.code == EXIT_RESUMABLE and saved == tiny.lines(run)[-1]["step"] >= 3
    trainer.run(c)
    assert f"resuming at step {saved}, sample {16 * saved:,}" in capsys.readouterr().out
    assert logged(run) == logged(straight[0].run)


def test_complete_run_says_so_and_trains_no_more(straight, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "build", lambda _: pytest.fail("a complete run was built again"))
    trainer.run(straight[0])
    assert "is complete at step 10" in capsys.readouterr().out


def test_run_folder_holds_what_is_needed_to_repeat_it(straight):
    record = json.loads((pathlib.Path(straight[0].run) / "config.json").read_text())
    assert record["config"]["optim"]["lr"] == 1e-3
    assert record["environment"]["versions"].keys() >= {"jax", "flax", "xclip_jax"}
    assert record["environment"]["commit"]
    line = logged(pathlib.Path(straight[0].run))[10]
    alarms = {"clip/ln_b", "nclip/mutual_information_img", "nclip/clusters_txt", "nclip/agreement", "rank/img"}
    assert alarms | {"loss", "grad_norm", "lr", "epoch"} <= line.keys()
    assert line["epoch"] == pytest.approx(10 * tiny.BATCH / 40)
    assert any((pathlib.Path(straight[0].run) / "tensorboard").iterdir())
    results = json.loads((pathlib.Path(straight[0].run) / "results.json").read_text())
    assert {"results", "config", "environment"} <= results.keys()


def test_a_checkpoint_finds_the_lines_before_it_written(pairs, tmp_path, monkeypatch):
    """Also in a bucket: a run that resumes from it after a kill does not make them again."""
    monkeypatch.setattr(storage, "is_remote", lambda _: True)
    there = {}
    save = trainer.Checkpointer.save

    def observed(self, state, position):
        there[int(state.step)] = [line["step"] for line in tiny.lines(tmp_path / "run")]
        save(self, state, position)

    monkeypatch.setattr(trainer.Checkpointer, "save", observed)
    trainer.run(config(pairs, tmp_path / "run", steps=2, checkpoint__every=1))
    assert there == {1: [1], 2: [1, 2]}


def test_a_complete_run_is_not_one_of_other_data(pairs, straight, tmp_path):
    """Two recipes may give one folder to different pairs; the same pairs elsewhere are the same run."""
    run = shutil.copytree(straight[0].run, tmp_path / "run")
    other = shutil.copytree(pairs, tmp_path / "other")
    assert trainer.run(config(other, run)) == {}
    other = other.rename(tmp_path / "changed")
    next(other.glob("*.txt")).write_text("another caption, longer than any")
    with pytest.raises(UserError, match=r"source 0, 'folder:.*changed', has changed since"):
        trainer.run(config(other, run))
