"""Which files and folders a command may write to."""

import os
import pathlib

import pytest

from tests.helpers import bucket
from xclip_jax.core import outputs
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import as_path


@pytest.fixture(params=["", "a folder/", "s3://outputs/"])
def place(request, tmp_path):
    """A new folder in a local folder, one whose name has a space, or a bucket."""
    bucket.register()
    path = as_path(request.param + "new") if "://" in request.param else as_path(tmp_path / request.param / "new")
    yield path
    if path.exists():
        path.rmtree()


def test_a_file_is_new_or_ours(place):
    path = outputs.check_file("--out", place / "x.json", b"^ours")
    path.write_text("ours, older")
    assert outputs.check_file("--out", place / "x.json", b"^ours").read_text() == "ours, older"
    path.write_text("theirs, not ours")
    for mark in ({"mark": b"^ours"}, {}):
        with pytest.raises(UserError, match=r"--out: .*x\.json' was not written by this command; name another file"):
            outputs.check_file("--out", place / "x.json", **mark)
    assert path.read_text() == "theirs, not ours"


def test_a_folder_is_new_or_empty_or_ours(place):
    assert outputs.check_folder("OUT", place) == place and not place.exists()
    place.mkdir(parents=True)
    for harmless in (".hidden", "job-17.out", "run.log"):
        (place / harmless).write_text("")
    outputs.check_folder("OUT", place)
    (place / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"OUT: .*new' has other files, such as 'notes\.txt'; name a new folder"):
        outputs.check_folder("OUT", place)
    outputs.check_folder("OUT", place, lambda: True)


def test_links_are_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/x.json")
    assert os.fspath(outputs.check_file("--out", tmp_path / "link")) == str(tmp_path / "real" / "x.json")
    (tmp_path / "real" / "x.json").write_text("theirs")
    with pytest.raises(UserError, match="link' was not written"):
        outputs.check_file("--out", tmp_path / "link", b"^ours")
    (tmp_path / "run" / "other_disk").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to("other_disk")
    outputs.check_folder("--config.run", tmp_path / "run")


def test_a_relative_path_stays_one(tmp_path, monkeypatch):
    """Messages name the file as its user did."""
    monkeypatch.chdir(tmp_path)
    assert [os.fspath(outputs.check_file("--out", path)) for path in ("x.json", "a/x.json")] == ["x.json", "a/x.json"]


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere/else")
    for check, fault in (
        (lambda: outputs.check_file("--out", tmp_path), "is a folder; name a file"),
        (lambda: outputs.check_file("--out", "/dev/null"), "is no regular file; name a file"),
        (lambda: outputs.check_file("--out", tmp_path / "file" / "x"), "is not a folder; name another"),
        (lambda: outputs.check_folder("--out", tmp_path / "file"), "is not a folder; name another"),
        (lambda: outputs.check_folder("--out", tmp_path / "link"), "is not a folder; name another"),
    ):
        with pytest.raises(UserError, match=f"^--out: .* {fault}"):
            check()
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != tmp_path)  # root may write anywhere
    for check in (outputs.check_file, outputs.check_folder):
        with pytest.raises(UserError, match=r"--out: .* cannot be written to; name another folder\."):
            check("--out", tmp_path / "new" / "x")
    assert not (tmp_path / "new").exists()
