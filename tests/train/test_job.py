"""A run before its first step: names are checked without data, and extras are known."""

import pathlib
import shutil

import jax
import pytest

from tests.helpers import tiny
from xclip_jax.core.errors import UserError
from xclip_jax.train import build, job, trainer
from xclip_jax.train.callbacks import Callback
from xclip_jax.train.checkpoint import Checkpointer


@pytest.fixture
def run(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


def test_check_needs_neither_data_nor_a_folder(tmp_path):
    config = tiny.config(run=tmp_path / "run", data__sources=("folder:/on/the/pod",), eval__sets=("imagenet",))
    job.check(config)
    for key, value, message in (
        ("eval__final_sets", ("imagenett",), "unknown evaluation set 'imagenett'; did you mean 'imagenet'"),
        ("data__sources", ("foldr:/data",), "unknown source 'foldr:/data'.*did you mean 'folder:/data'"),
        ("data__sources", (), r"data\.sources is empty"),
        ("optim__lr", -1.0, r"optim\.lr is -1\.0"),
    ):
        with pytest.raises(UserError, match=message):
            job.check(tiny.config(run=tmp_path / "run", **({"data__sources": ("folder:x",)} | {key: value})))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "extras"),
    [
        ({"data__sources": ("tfds:x/train", "folder:/x"), "log__to": ("tensorboard",)}, []),
        ({"data__sources": ("hf:org/name/train",), "log__to": ("tensorboard", "trackio")}, ["datasets", "trackio"]),
        ({"data__sources": ("parquet:/x", "demo:train")}, ["demo", "parquet"]),
        ({"init__weights": "hf:org/name"}, ["hub"]),
        ({"eval__sets": ("wds:/x", "imagenet", "probe/wds:/x")}, []),
        ({"eval__sets": ("probe/wds:/x",), "eval__final_sets": ("wds:hf:org/name",)}, ["hub"]),
        ({"eval__sets": ("emoji/test_concepts", "retrieval/hf:org/name/test")}, ["datasets", "demo"]),
        ({"eval__sets": ("tests.extension.greys:Greys",)}, []),
    ],
)
def test_extras_that_a_config_needs(changes, extras):
    assert job.extras(job.check(tiny.config(**({"data__sources": ("folder:x",)} | changes)))) == extras


def config(pairs, run, **changes):
    return tiny.config(run=run, **{"data__sources": (f"folder:{pairs}",)} | changes)


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

    def on_end(self, job, variables, results):
        self.ends.append((job.folder.read_results()["results"], sorted(variables), results))


@pytest.fixture(scope="module")
def straight(pairs, tmp_path_factory):
    """Ten steps without a break: the config, the last state and position, and what a callback was called with."""
    c, recorder = config(pairs, tmp_path_factory.mktemp("straight") / "run"), Recorder()
    trainer.run(c, [recorder])
    return c, *final_state(c), recorder


def test_a_complete_run_is_not_one_of_other_data(pairs, straight, tmp_path, capsys):
    """Two recipes may give one folder to different pairs; the same pairs elsewhere are the same run."""
    run = shutil.copytree(straight[0].run, tmp_path / "run")
    other = shutil.copytree(pairs, tmp_path / "other")
    assert trainer.run(config(other, run)) == trainer.run(config(pairs, run)) == {}
    next(other.glob("*.txt")).write_text("another caption, longer than any")
    with pytest.raises(UserError, match=r"source 0, 'folder:.*other', has changed since"):
        trainer.run(config(other, run))
