"""Inputs of embed and serve: which files a folder or pattern has, their names and captions."""

import os

import pytest

from tests.helpers import bad_tars, tiny
from xclip_jax.commands import inputs
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, sources

pytestmark = pytest.mark.long


def test_tars_need_no_captions(tmp_path):
    bad_tars.shard(tmp_path / "0.tar", [("a", {"jpg": bad_tars.jpeg(0)})])
    assert inputs.open_images(str(tmp_path)).read(0) == (bad_tars.jpeg(0), "")
    with pytest.raises(UserError, match=r"no caption file.* KEY\.jpg and KEY\.txt"):
        sources.open_pairs(f"tar:{tmp_path}")
    bad_tars.shard(tmp_path / "0.tar", [("a", {"txt": b"a fox"})])
    with pytest.raises(UserError, match=r"no image file.* KEY\.jpg, "):
        inputs.open_images(str(tmp_path))


def test_a_pipe_in_place_of_a_caption_is_none(tmp_path):
    """And so is a file that is too large."""
    pictures = tiny.folder(tmp_path / "pictures", 3)
    (pictures / "000.txt").unlink()
    os.mkfifo(pictures / "000.txt")
    (pictures / "001.txt").write_bytes(b"x" * (base.MAX_BYTES["text"] + 1))
    source = inputs.open_images(str(pictures))
    assert [source.read(i)[1] for i in range(3)] == ["", "", "picture 2"]


def test_captions_that_are_missing(tmp_path):
    (tmp_path / "0.jpg").write_bytes(bad_tars.jpeg(0))
    bad_tars.shard(tmp_path / "0.tar", [("a", {"jpg": bad_tars.jpeg(0)})])
    for name, remedy in (
        (str(tmp_path / "0.tar"), r"\?text=COLUMN"),
        (f"folder:{tmp_path}", "a .txt file named like its image"),
    ):
        with pytest.raises(UserError, match=f"has no caption; .*{remedy}"):
            inputs.Captions(inputs.open_images(name))


def test_names_are_utf8_where_paths_are_not(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    bad_tars.pairs(folder / "0.tar", 0, 1)
    (folder / "lines.txt").write_text("one\n")
    named = [inputs.open_images(str(folder)), inputs.Lines(str(folder / "lines.txt"))]
    assert list(map(len, named)) == [1, 1]
    assert all("caf\N{REPLACEMENT CHARACTER}" in each.name(0).encode().decode() for each in named)


def test_linked_folders_and_patterns(tmp_path):
    pictures = tiny.folder(tmp_path / "elsewhere", 2)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(pictures)
    assert len(inputs.open_images(str(tmp_path / "images"))) == 2
    assert len(inputs.open_images(f"{pictures}/*1.png")) == 1


def test_lines_of_another_packages_source(tmp_path):
    """They have their own names, and captions only if a column is named; a damaged line is a bad image."""
    file = tmp_path / "x.jsonl"
    (tmp_path / "0.jpg").write_bytes(bad_tars.jpeg(0))
    file.write_text('{"image": "0.jpg", "text": "a"}\n{"image": \n{"image": "1.jpg"}\n')
    spec = f"tests.extension.json_lines:JsonLines:{file}"
    source = inputs.open_images(spec)
    assert [source.name(i) for i in range(3)] == [f"{file}#{line}" for line in (1, 2, 3)]
    assert source.read(0) == (bad_tars.jpeg(0), "") and inputs.open_images(f"{spec}?text=text").read(0)[1] == "a"
    for i, reason in ((1, "JSONDecodeError"), (2, "file cannot be read")):
        with pytest.raises(BadSample, match=reason):
            source.read(i)
