"""Folders of image-text pairs: which files are read, what cannot be read, and fingerprints."""

import os
import pathlib
import shutil

import pytest

from tests.helpers import bad_tars, tiny
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, records, sources
from xclip_jax.data.readers.folder import FolderSource


def names(source, root):
    return [os.path.relpath(path, root) for path in source.images]


def test_hidden_folders_and_files_are_no_pairs(tmp_path):
    tiny.folder(tmp_path / ".data" / "pairs", n=3)  # above the root a dot means nothing
    root = tmp_path / ".data" / "pairs"
    before, others = names(FolderSource(root), root), ("g.avif", "h.JP2", "i.jpe", "sub/d/e.JPG", "sub-1/f.png")
    for place in (".ipynb_checkpoints/a-checkpoint.jpg", "sub/.thumbs/b.jpg", "._c.jpg", *others):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(bad_tars.jpeg(0))
    (root / "folder.jpg").mkdir()
    after = names(FolderSource(root), root)
    assert sorted(after) == sorted([*before, *others])
    assert after.index("sub/d/e.JPG") < after.index("sub-1/f.png")  # by folders, not by letters


def test_what_a_folder_cannot_read_is_a_bad_sample(tmp_path, monkeypatch):
    tiny.folder(tmp_path, n=1)
    for name in ("pipe", "pipe_text", "large", "large_text", "no_text", "link"):
        (tmp_path / f"{name}.jpg").write_bytes(bad_tars.jpeg(0))
        (tmp_path / f"{name}.txt").write_text("caption")
    for name in ("pipe.jpg", "pipe_text.txt"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    (tmp_path / "no_text.txt").unlink()
    (tmp_path / "link.jpg").unlink()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    monkeypatch.setitem(base.MAX_BYTES, "image", 10_000)
    monkeypatch.setitem(base.MAX_BYTES, "text", 1000)
    (tmp_path / "large.jpg").write_bytes(bytes(10_001))
    (tmp_path / "large_text.txt").write_bytes(b"x" * 1001)
    source = FolderSource(tmp_path)
    read = {pathlib.Path(path).stem: records.read(source, i) for i, path in enumerate(source.images)}
    reasons = {name: record.reason for name, record in read.items() if isinstance(record, BadSample)}
    expected = {"no_text": "no caption file", "link": "no image file"}
    expected |= dict.fromkeys(("pipe", "pipe_text"), "file cannot be read")
    assert reasons == expected | dict.fromkeys(("large", "large_text"), "file too large")


def test_card_of_a_folder(tmp_path):
    """A copy in another place has the same; another name, size or number of files changes it."""
    root = tiny.folder(tmp_path / "a", n=4)
    for name in ("\udcff.png", "\udcff.txt"):  # not in UTF-8
        (root / name).write_bytes(b"x")
    card = sources.Decoded(FolderSource(root)).fingerprint()
    assert card["samples"] == 5 and len(card["hash"]) == 32
    shutil.copytree(root, tmp_path / "b")
    image = tmp_path / "b" / "000.png"
    os.utime(image, (1, 1))
    copy = FolderSource(tmp_path / "b")
    assert copy.fingerprint() == card
    text = image.with_suffix(".txt")
    hashes = {card["hash"]}
    for change in (
        lambda: text.write_text(f"{text.read_text()}!"),
        lambda: image.write_bytes(image.read_bytes() + b"x"),
        lambda: image.rename(image.with_stem("new")),
        lambda: text.rename(text.with_stem("new")),
    ):
        change()
        hashes.add(FolderSource(tmp_path / "b").fingerprint()["hash"])
    assert len(hashes) == 5


def test_lines_of_a_caption_end_where_lines_do(tmp_path):
    (tmp_path / "a.jpg").write_bytes(bad_tars.jpeg(0))
    (tmp_path / "a.txt").write_text("a dog\u2028on the beach, wait\x85 what\r\n\nanother\n", newline="")
    assert FolderSource(tmp_path)[0]["text"] == ["a dog\u2028on the beach, wait\x85 what", "another"]


def test_a_folder_that_has_no_pairs_or_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    tiny.folder(tmp_path / "pairs" / "sub", n=2)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(PermissionError, match="sub"):
            FolderSource(tmp_path / "pairs")
    for text in (tmp_path / "pairs" / "sub").glob("*.txt"):
        text.unlink()
    with pytest.raises(UserError, match=r"pairs' has 2 images .* none has a caption.* csv:FILE"):
        FolderSource(tmp_path / "pairs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty' has 0 images"):
        FolderSource(tmp_path / "empty", base.SourceOptions(captions=False))
