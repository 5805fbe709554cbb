"""Embeddings that the search page keeps in a file: what is embedded again, and what an interruption loses."""

import errno
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tests.helpers import bad_tars
from xclip_jax.commands import serve as command
from xclip_jax.commands.inputs import open_images
from xclip_jax.commands.serve import Embedded, Index
from xclip_jax.core.errors import UserError
from xclip_jax.data.images import decode

pytestmark = pytest.mark.long


class FakeModel:
    """Embeds an image as its mean colour, and counts."""

    size, batch = 4, 8

    def __init__(self, name="a"):
        self.name, self.embedded, self.prepare = name, 0, tiny_pixels

    def fingerprint(self):
        return self.name

    def encode_prepared(self, images):
        self.embedded += len(images)
        return np.stack([image.mean((0, 1)) for image in images]).astype(np.float32)


def tiny_pixels(data):
    return decode(data)[:4, :4]


@pytest.fixture
def fake():
    return FakeModel()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        paint(folder / f"{i:02d}.png", i)
    return folder


def paint(path, value):
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path)


def embedded(fake, images, file):
    """How many images the model had to embed, and by name (caption, red)."""
    before, source = fake.embedded, open_images(str(images))
    numbers, texts, rows = command.embed(fake, source, file)
    names = [pathlib.PurePath(source.name(i)).name for i in numbers]
    return fake.embedded - before, dict(zip(names, zip(texts, rows[:, 0].tolist(), strict=True), strict=True))


def test_changed_files_are_embedded_and_vanished_ones_forgotten(fake, images, tmp_path):
    embedded(fake, images, tmp_path / "cache.parquet")
    paint(images / "03.png", 200)
    (images / "04.png").unlink()
    count, found = embedded(fake, images, tmp_path / "cache.parquet")
    assert count == 1 and len(found) == 19 and found["03.png"] == ("", 200) and found["05.png"] == ("", 5)
    paint(images / "04.png", 4)
    assert embedded(fake, images, tmp_path / "cache.parquet")[0] == 1  # the file does not grow for ever


def test_captions_are_read_again_without_embedding(fake, images, tmp_path):
    embedded(fake, images, tmp_path / "cache.parquet")
    for caption in ("a fox", "two foxes"):
        (images / "02.txt").write_text(caption)
        count, found = embedded(fake, images, tmp_path / "cache.parquet")
        assert count == 0 and found["02.png"] == (caption, 2) and found["01.png"] == ("", 1)
    (images / "02.txt").unlink()
    assert embedded(fake, images, tmp_path / "cache.parquet")[1]["02.png"] == ("", 2)


def test_unreadable_images_are_said_and_tried_again(fake, images, tmp_path, capsys):
    (images / "bad.png").write_bytes(b"<html>")
    for count in (21, 1):
        assert embedded(fake, images, tmp_path / "cache.parquet")[0] == count
        assert f"1 images cannot be read; the first is {images}/bad.png: not an image" in capsys.readouterr().out
    paint(images / "bad.png", 3)
    assert embedded(fake, images, tmp_path / "cache.parquet")[0] == 1
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"no image can be read; the first is .*a\.png"):
        embedded(fake, tmp_path / "none", tmp_path / "none.parquet")


def test_an_interruption_loses_one_part(fake, images, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_PART", 8)
    encode, calls = fake.encode_prepared, []

    def interrupted(part):
        calls.append(len(part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(part)

    fake.encode_prepared = interrupted
    with pytest.raises(KeyboardInterrupt):
        embedded(fake, images, tmp_path / "cache.parquet")
    paint(images / "50.png", 50)
    for count in (5, 0):  # the last four, and a new one
        made, found = embedded(fake, images, tmp_path / "cache.parquet")
        assert made == count and found["50.png"] == ("", 50) and found["00.png"] == ("", 0) and len(found) == 21
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.parquet", "images"]


def test_a_power_cut_loses_what_was_not_stored_yet(fake, images, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_PART", 8)
    monkeypatch.setattr(command, "_STORE_SECONDS", 0)
    write, sizes = command._write, []
    monkeypatch.setattr(command, "_write", lambda path, rows: sizes.append(len(rows)) or write(path, rows))
    assert embedded(fake, images, tmp_path / "cache.parquet")[0] == 20
    assert sizes[0] == 8 and sizes[-1] == 20


def test_samples_of_tars_follow_their_tar(fake, tmp_path):
    def write(name, colors):
        made = [bad_tars.encode(Image.new("RGB", (8, 8), (color, 0, 0)), "PNG") for color in colors]
        bad_tars.shard(tmp_path / name, [("k", {"png": data, "txt": b"x"}) for data in made])

    write("a.tar", [1, 2])
    write("b.tar", [3])
    file, pattern = tmp_path / "cache.parquet", f"{tmp_path}/*.tar"
    assert embedded(fake, pattern, file)[0] == 3 and embedded(fake, pattern, file)[0] == 0
    write("b.tar", [4, 5, 6])
    count, found = embedded(fake, pattern, file)
    assert count == 3 and found["b.tar#k"] == ("x", 6)


def test_default_names_are_captions_or_folders(fake, images, tmp_path):
    source = open_images(str(images))
    texts = ["\n a fox \r\nin the snow", " \n", "a fox", "a hen"]
    assert Index(fake, source, Embedded(list(range(4)), texts, np.eye(4))).names == ["a fox", "a hen"]
    for label in ("red_fox", "hen"):
        (tmp_path / "set" / label).mkdir(parents=True)
        paint(tmp_path / "set" / label / "0.png", 1)
    source = open_images(str(tmp_path / "set"))
    assert Index(fake, source, Embedded([0, 1], ["", ""], np.eye(2))).names == ["hen", "red fox"]


def test_embeddings_that_cannot_be_stored_are_served(fake, images, tmp_path, monkeypatch, capsys):
    def full(table, path, **options):
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    made, _ = embedded(fake, images, tmp_path / "cache.parquet")
    assert made == 20 and f"{tmp_path / 'cache.parquet'}: No space left on device" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_rows_of_a_table_are_embedded_again_if_it_changes(fake, tmp_path):
    """An index of a table has its captions; a changed table is embedded anew, an unchanged one is not."""
    path, spec = tmp_path / "shop.parquet", f"parquet:{tmp_path}/shop.parquet?text=title"

    def write(titles):
        images = [{"bytes": bad_tars.jpeg(i), "path": None} for i in range(len(titles))]
        pyarrow.parquet.write_table(pyarrow.table({"image": images, "title": titles}), path)

    write(["red shirt", "blue shoe"])
    for _ in range(2):
        index = command.make_index(fake, spec, cache=str(tmp_path / "cache"))
        assert fake.embedded == 2 and index.names == ["red shirt", "blue shoe"]
    write(["red shirt", "blue shoe", "hat"])
    assert len(command.make_index(fake, spec, cache=str(tmp_path / "cache"))) == 3 and fake.embedded == 5
