import errno
import fcntl
import json
import os
import pathlib
import shutil
import threading
import time
import types

import chex
import pytest

from tests.data.test_tokenizer import save_words
from tests.helpers import tiny
from tests.helpers.checkpoints import damage
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import loader
from xclip_jax.evaluators.prompts import read_class_names
from xclip_jax.train import checkpoint_files, trainer, weights
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.run_writer import RunWriter

pytestmark = pytest.mark.long

run = tiny.copied


def test_a_first_command_that_fails_leaves_nothing(pairs, tmp_path):
    run = tmp_path / "deep" / "run"
    for changes in (
        {"data__tokenizer": "foo"},
        {"data__sources": ("folder:nowhere",)},
        {"init__weights": "nowhere"},
        {"eval__sets_at_end": ("nothing",)},
    ):
        with pytest.raises(UserError):
            trainer.run(tiny.short(pairs, run, steps=1, **changes))
        assert not (tmp_path / "deep").exists(), changes


def test_a_folder_without_a_checkpoint_takes_the_new_config(pairs, tmp_path):
    for lr in (1e-3, 2e-3):
        config = schema.resolve(tiny.short(pairs, tmp_path, optim__lr=lr))
        folder = RunWriter(tmp_path)
        folder.check(config)
        with folder.claimed(config, []):
            assert folder.read_config()["config"]["optim"]["lr"] == lr


def test_metrics_before_a_first_checkpoint(pairs, tmp_path):
    """A shorter interval, in a start that ends before it logs, does not make them those of lost checkpoints."""
    folder = RunWriter(tmp_path)
    for every in (1000, 100, 100):
        config = schema.resolve(tiny.short(pairs, tmp_path, steps=2000, checkpoint__every=every))
        with folder.claimed(config, []):
            folder.metrics_file.write_text('{"step": 900, "loss": 1.0}\n')
    folder.metrics_file.write_text('{"step": 250, "loss": 1.0}\n')
    with pytest.raises(UserError, match="metrics up to step 250 and no checkpoint"):
        folder.check(config)
    folder.skipped_steps_file.write_text('{"step": 100, "position": 1584}\n')  # whose parameters are not saved
    folder.check(config)


def test_a_run_may_be_moved_with_its_data_tokenizer_and_class_names(pairs, tmp_path, capsys):
    vocabulary = tmp_path / "tokenizer.json"
    save_words(vocabulary, ["?", "<pad>", "<s>", "</s>", "picture", "number"])
    data = pathlib.Path(shutil.copytree(pairs, tmp_path / "data"))
    names = tmp_path / "names.json"
    names.write_text('{"fox": "a red fox"}')
    short = {"steps": 1, "data__tokenizer": str(vocabulary), "eval__class_names": str(names)}
    trainer.run(tiny.short(data, tmp_path / "run", **short))
    (tmp_path / "moved").mkdir()
    for name in ("run", "data"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    vocabulary.rename(tmp_path / "moved" / "words.json")
    names.rename(tmp_path / "moved" / "names.json")
    there = tmp_path / "moved"
    short["data__tokenizer"] = str(there / "words.json")
    short["eval__class_names"] = str(there / "run" / "class_names.json")
    trainer.run(tiny.short(there / "data", there / "run", **short))
    assert "resuming at step 1" in capsys.readouterr().out
    loaded, *_ = weights.load(str(there / "run"))
    assert loaded.data.tokenizer == str(there / "run" / "tokenizer.json")
    assert loaded.eval.class_names == str(there / "run" / "class_names.json")
    assert read_class_names(loaded.eval.class_names) == {"fox": "a red fox"}
    (there / "words.json").write_text("{}")
    (there / "run" / "results.json").unlink()
    with pytest.raises(UserError, match=r"data\.tokenizer='.*words\.json' differs from "):
        trainer.run(tiny.short(there / "data", there / "run", **short))


def test_checkpoints_without_a_config_are_not_taken_for_those_of_any_run(pairs, run):
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"has checkpoints and no config\.json"):
        RunWriter(run).check(schema.resolve(tiny.short(pairs, run, data__batch=8)))


def test_the_tokenizer_is_that_of_the_start(pairs, tmp_path, monkeypatch):
    """What a start that came to nothing has left is not read."""
    words = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, more in zip(words, ([], ["more"]), strict=True):
        save_words(path, ["?", "<pad>", "<s>", "</s>", "picture", "number", *more])
    folder = RunWriter(tmp_path / "new")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (words[0], words[1], "bytes", "~/second.json"):
        c = schema.resolve(tiny.short(pairs, folder.path, data__tokenizer=str(name)))
        assert folder.tokenizer(c) == str(name)
        with folder.claimed(c, []):
            assert folder.tokenizer_file.exists() == (name != "bytes")
    assert folder.tokenizer_file.read_bytes() == words[1].read_bytes()


def test_changed_data_is_refused(pairs, run, tmp_path):
    data = pathlib.Path(shutil.copytree(pairs, tmp_path / "data"))
    (run / "results.json").unlink()
    (data / "000.txt").write_text("another caption, longer than the first\n")
    with pytest.raises(UserError, match=r"source 0, 'folder:.*', has changed since .*data\.json"):
        trainer.run(tiny.short(data, run))
    with pytest.raises(UserError, match=r"source 0, .* has changed since"):
        trainer.run(tiny.short(data, run, data__sources=(f"folder:{pairs}", f"folder:{data}")))


def test_free_keys_are_written_and_earlier_starts_are_kept(pairs, run):
    (run / "results.json").unlink()
    trainer.run(tiny.short(pairs, run, log__every=3, eval__ema=True))
    content = json.loads((run / "config.json").read_text())
    assert content["config"]["log"]["every"] == 3
    assert content["config"]["eval"]["ema"] is True
    (start,) = content["starts"]
    assert start["step"] == 4
    assert start["changed"]["eval.ema"] == [False, True]
    assert start["environment"]["versions"].keys() == content["environment"]["versions"].keys()


def test_two_runs_cannot_share_a_folder(pairs, run):
    (run / "results.json").unlink()
    c = schema.resolve(tiny.short(pairs, run))
    with RunWriter(run).claimed(c, []):
        with pytest.raises(UserError, match=r"is in use by process \d+ on "):
            trainer.run(c)
        with pytest.raises(UserError, match=r"is in use by process \d+ on "), RunWriter(run).claimed(c, []):
            pass
    assert RunReader(run).writer() == ""


def test_a_file_system_without_locks_is_used(pairs, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with RunWriter(tmp_path / "run").claimed(schema.resolve(tiny.short(pairs, tmp_path / "run")), []):
        assert RunReader(tmp_path / "run").writer() == ""
    assert RunReader(tmp_path / "run").is_run()


def test_a_run_goes_back_to_its_newest_whole_checkpoint_and_ends_as_it_would_have(pairs, trained, run, capsys):
    """What only reads the run says which checkpoint is whole, and changes nothing."""
    c = tiny.short(pairs, run)
    (run / "results.json").unlink()
    name = damage(run / "checkpoints" / "4")
    with pytest.raises(UserError, match=rf"4 is damaged: {name} has other bytes .* --step 2"):
        weights.load(str(run))
    assert weights.load(str(run), 2).step == 2 and (run / "checkpoints" / "4").exists()
    trainer.run(c)
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and f"{name} has other bytes" in out and "resuming at step 2" in out
    chex.assert_trees_all_equal(*(tiny.restored(tiny.short(pairs, where), 4)[0] for where in (trained, run)))
    assert tiny.losses(run) == tiny.losses(trained)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(pairs, tmp_path, monkeypatch):
    """Not at the next checkpoint, which may be an hour later."""

    called, original, batches = threading.Event(), loader.to_global, []

    def full(*_):
        called.set()
        raise OSError(28, "No space left on device")

    def to_global(*args):
        batches.append(args)
        if len(batches) > 8:  # as long as a step of a real model
            assert called.wait(60)
            time.sleep(0.2)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "write_digest", full)
        patch.setattr(loader, "to_global", to_global)
        c = tiny.short(pairs, tmp_path / "run", steps=24, checkpoint__every=8)
        with pytest.raises(UserError, match=r"checkpoint of step 8 could not be written to .*No space left on device"):
            trainer.run(c)
    assert 8 <= tiny.lines(tmp_path / "run")[-1]["step"] < 16


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_written(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"has 1000 B free"):
        trainer.run(tiny.short(pairs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_stores_that_cannot_hold_checkpoints(pairs):
    """Orbax would refuse the first checkpoint, which may be due after hours."""
    for run in ("s3://bucket/run", "az://box/run"):
        with pytest.raises(UserError, match=rf"'{run}.*' cannot hold checkpoints, .* on a disk or at gs://"):
            trainer.run(tiny.short(pairs, run))
        with pytest.raises(UserError, match="cannot hold checkpoints"):
            Checkpointer(run, read_only=True)


def test_a_folder_that_orbax_would_take_for_a_pattern(pairs, tmp_path, monkeypatch):
    (tmp_path / "lr[1e-3]").mkdir()
    monkeypatch.chdir(tmp_path / "lr[1e-3]")
    for run in (str(tmp_path / "[a]"), "run", "gs://bucket/[a]"):
        with pytest.raises(UserError, match=r"its path contains '\['; name another folder"):
            trainer.run(tiny.short(pairs, run))


def test_folders_that_cannot_be_written(pairs, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for run in (file, file / "run", tmp_path / "link"):
        with pytest.raises(UserError, match=r"is not a folder"):
            trainer.run(tiny.short(pairs, run))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
