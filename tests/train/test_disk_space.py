"""Space for the checkpoints of a run, checked before it is started."""

import shutil
import types

import pytest

from tests.helpers import checkpoints
from tests.helpers.checkpoints import ABSTRACT
from xclip_jax.config import schema
from xclip_jax.core.console import format_bytes
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.train import checkpoint_files
from xclip_jax.train.checkpoint_files import num_bytes

saved, run = checkpoints.saved, checkpoints.run
SIZE = num_bytes(ABSTRACT)


def space(monkeypatch, run, checkpoints, *, keep=3, every=2, keep_every=0, steps=100):
    """Check a run on a disk with free space for so many checkpoints."""
    usage = types.SimpleNamespace(free=int(checkpoints * SIZE))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    config = schema.resolve(
        {"steps": steps, "optim": {"warmup": 1}, "checkpoint": {"every": every, "keep": keep, "keep_every": keep_every}}
    )
    checkpoint_files.check(config, RunFolder(run), ABSTRACT)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({}, 2, 4),
        ({"keep": 1}, 2, 2),
        ({"every": 0}, 1, 1),  # one, at the end
        ({"steps": 3}, 2, 2),
        ({"keep_every": 20}, 2, 9),
    ],
)
def test_space_is_looked_at_before_a_run(monkeypatch, tmp_path, capsys, options, least, most):
    with pytest.raises(
        UserError, match=rf"has .* free, and {least} checkpoints? of up to {format_bytes(SIZE)} must fit; make room"
    ):
        space(monkeypatch, tmp_path / "new", least - 0.01, **options)
    assert not (tmp_path / "new").exists() and capsys.readouterr().out == ""
    if most > least:
        space(monkeypatch, tmp_path / "new", most - 0.01, **options)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("WARNING: the disk of ") and f"need up to {format_bytes(most * SIZE)} more" in line
    space(monkeypatch, tmp_path / "new", most, **options)
    assert capsys.readouterr().out == ""


def test_what_is_kept_for_ever_stays_when_a_run_resumes(monkeypatch, tmp_path, capsys):
    for step in (20, 40, 54, 56, 58):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    # Those of steps 60, 80 and 100 come beside those of 20 and 40; one of 54 to 58 is deleted for each of the others.
    space(monkeypatch, tmp_path, 3.9, keep_every=20)
    assert f"need up to {format_bytes(4 * SIZE)} more" in capsys.readouterr().out
    space(monkeypatch, tmp_path, 4, keep_every=20)
    assert capsys.readouterr().out == ""


def test_what_is_saved_already_needs_no_space_again(monkeypatch, run, capsys):
    with pytest.raises(UserError, match="and 1 checkpoint of up to"):
        space(monkeypatch, run, 0.9)
    space(monkeypatch, run, 2)
    assert capsys.readouterr().out == ""
    # What an interrupted save left is deleted when the folder is opened.
    half = run / "checkpoints" / "6.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    (half / "data").write_bytes(bytes(SIZE))
    space(monkeypatch, run, 1)
    assert capsys.readouterr().out == ""
