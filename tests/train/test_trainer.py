import json
import pathlib
import shutil
import signal

import chex
import pytest

from tests.helpers import tiny
from tests.torture.soak import CLOCKS
from xclip_jax.core import storage
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.processes.interrupt import EXIT_RESUMABLE
from xclip_jax.train import prepare, trainer
from xclip_jax.train.callbacks import Callback

pytestmark = pytest.mark.long


def logged(run):
    return {line["step"]: {k: v for k, v in line.items() if k not in CLOCKS} for line in tiny.lines(run)}


@pytest.fixture(scope="module")
def straight(pairs, trained, tmp_path_factory):
    c = tiny.short(pairs, shutil.copytree(trained, tmp_path_factory.mktemp("straight") / "run"))
    return c, *tiny.restored(c)


def test_resume_is_bit_exact(pairs, tmp_path, straight):
    """Killed at step 3, resumed from step 2: state and metrics, and so the data, are those of four steps."""
    c = tiny.short(pairs, tmp_path / "run")
    with tiny.cut_off(3):
        trainer.run(c)
    trainer.run(c)
    state, position = tiny.restored(c)
    chex.assert_trees_all_equal((state, position), straight[1:])
    counters = position.pop("counters")
    assert position == {"batch": tiny.BATCH, "samples": 4 * tiny.BATCH, "seed": 0}
    assert counters["samples"] == 4 * tiny.BATCH and counters["bad"] == {}
    assert counters["tokens"] == logged(tmp_path / "run")[4]["tokens"] > 4 * tiny.BATCH
    assert logged(tmp_path / "run") == logged(straight[0].run) and len(logged(tmp_path / "run")) == 4


def test_sigterm_saves_and_the_same_command_goes_on(pairs, tmp_path, straight, capsys):
    class Stops(Callback):
        def on_log(self, step, metrics):
            if step == 1:
                signal.raise_signal(signal.SIGTERM)

    run = tmp_path / "run"
    c = tiny.short(pairs, run, checkpoint__every=1000)
    with pytest.raises(SystemExit) as stopped:
        trainer.run(c, [Stops()])
    saved = RunReader(run).latest_step()
    assert stopped.value.code == EXIT_RESUMABLE and saved == tiny.lines(run)[-1]["step"] >= 1
    trainer.run(c)
    assert f"resuming at step {saved}, sample {16 * saved:,}" in capsys.readouterr().out
    assert logged(run) == logged(straight[0].run)


def test_complete_run_says_so_and_trains_no_more(straight, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "build", lambda _: pytest.fail("a complete run was built again"))
    trainer.run(straight[0])
    assert "is complete at step 4" in capsys.readouterr().out


def test_run_folder_holds_what_is_needed_to_repeat_it(straight):
    run = pathlib.Path(straight[0].run)
    record = json.loads((run / "config.json").read_text())
    assert record["config"]["optim"]["lr"] == 1e-3
    assert record["environment"]["versions"].keys() >= {"jax", "flax", "xclip_jax"} and record["environment"]["commit"]
    line = logged(run)[4]
    alarms = {"clip/ln_b", "nclip/mutual_information_img", "nclip/clusters_txt", "nclip/agreement", "rank/img"}
    assert alarms | {"loss", "grad_norm", "lr", "epoch"} <= line.keys()
    assert line["epoch"] == pytest.approx(4 * tiny.BATCH / 40)
    assert {"results", "config", "environment"} <= json.loads((run / "results.json").read_text()).keys()


def test_a_checkpoint_finds_the_lines_before_it_written(pairs, tmp_path, monkeypatch):
    """Also in a bucket: a run that resumes from it after a kill does not make them again."""
    monkeypatch.setattr(storage, "is_remote", lambda _: True)
    there = {}
    save = trainer.Checkpointer.save

    def observed(self, state, position):
        there[int(state.step)] = [line["step"] for line in tiny.lines(tmp_path / "run")]
        save(self, state, position)

    monkeypatch.setattr(trainer.Checkpointer, "save", observed)
    trainer.run(tiny.short(pairs, tmp_path / "run", checkpoint__every=1))
    assert there == {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 3, 4]}


def test_a_complete_run_is_not_one_of_other_data(pairs, straight, tmp_path):
    """Two recipes may give one folder to different pairs; the same pairs elsewhere are the same run."""
    run = shutil.copytree(straight[0].run, tmp_path / "run")
    other = shutil.copytree(pairs, tmp_path / "other")
    assert trainer.run(tiny.short(other, run)) == {}
    other = other.rename(tmp_path / "changed")
    next(other.glob("*.txt")).write_text("another caption, longer than any")
    with pytest.raises(UserError, match=r"source 0, 'folder:.*changed', has changed since"):
        trainer.run(tiny.short(other, run))
