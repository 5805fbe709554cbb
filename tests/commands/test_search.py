"""The search page's embeddings, kept in a file, and its index."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.helpers import bad_tars
from xclip_jax.commands import search
from xclip_jax.commands.embed import open_images
from xclip_jax.commands.search import Embedded, Index
from xclip_jax.core.errors import UserError
from xclip_jax.data.images import decode


class Model:
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
def model():
    return Model()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        paint(folder / f"{i:02d}.png", i)
    return folder


def paint(path, value):
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path)


def embedded(model, images, file):
    """How many images the model had to embed, and by name (caption, red)."""
    before, source = model.embedded, open_images(str(images))
    numbers, texts, rows = search.embed(model, source, file)
    names = [pathlib.PurePath(source.name(i)).name for i in numbers]
    return model.embedded - before, dict(zip(names, zip(texts, rows[:, 0].tolist(), strict=True), strict=True))


def test_one_new_file_of_2000_embeds_one(model, tmp_path):
    (tmp_path / "many").mkdir()
    paint(tmp_path / "many" / "0000.png", 7)
    for i in range(1, 2000):
        os.link(tmp_path / "many" / "0000.png", tmp_path / "many" / f"{i:04d}.png")
    assert embedded(model, tmp_path / "many", tmp_path / "cache.npz")[0] == 2000
    paint(tmp_path / "many" / "1000a.png", 9)
    count, found = embedded(model, tmp_path / "many", tmp_path / "cache.npz")
    assert count == 1 and len(found) == 2001 and found["1000a.png"] == ("", 9) and found["1999.png"] == ("", 7)
    assert embedded(model, tmp_path / "many", tmp_path / "cache.npz")[0] == 0


def test_changed_files_are_embedded_and_vanished_ones_forgotten(model, images, tmp_path):
    embedded(model, images, tmp_path / "cache.npz")
    paint(images / "03.png", 200)
    (images / "04.png").unlink()
    count, found = embedded(model, images, tmp_path / "cache.npz")
    assert count == 1 and len(found) == 19 and found["03.png"] == ("", 200) and found["05.png"] == ("", 5)
    paint(images / "04.png", 4)
    assert embedded(model, images, tmp_path / "cache.npz")[0] == 1  # the file does not grow for ever


def test_captions_are_read_again_without_embedding(model, images, tmp_path):
    embedded(model, images, tmp_path / "cache.npz")
    for caption in ("a fox", "two foxes"):
        (images / "02.txt").write_text(caption)
        count, found = embedded(model, images, tmp_path / "cache.npz")
        assert count == 0 and found["02.png"] == (caption, 2) and found["01.png"] == ("", 1)
    (images / "02.txt").unlink()
    assert embedded(model, images, tmp_path / "cache.npz")[1]["02.png"] == ("", 2)


def test_unreadable_images_are_said_and_tried_once(model, images, tmp_path, capsys):
    (images / "bad.png").write_bytes(b"<html>")
    for count in (21, 0):
        assert embedded(model, images, tmp_path / "cache.npz")[0] == count
        assert f"1 images cannot be read; the first is {images}/bad.png: not an image" in capsys.readouterr().out
    paint(images / "bad.png", 3)
    assert embedded(model, images, tmp_path / "cache.npz")[0] == 1
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"no image can be read; the first is .*a\.png"):
        embedded(model, tmp_path / "none", tmp_path / "none.npz")


def test_an_interruption_loses_one_part(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_PART", 8)
    encode, calls = model.encode_prepared, []

    def interrupted(part):
        calls.append(len(part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(part)

    model.encode_prepared = interrupted
    with pytest.raises(KeyboardInterrupt):
        embedded(model, images, tmp_path / "cache.npz")
    paint(images / "50.png", 50)
    for count in (5, 0):  # the last four, and a new one
        made, found = embedded(model, images, tmp_path / "cache.npz")
        assert made == count and found["50.png"] == ("", 50) and found["00.png"] == ("", 0) and len(found) == 21
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.npz", "images"]


def test_samples_of_tars_follow_their_tar(model, tmp_path):
    def write(name, colors):
        made = [bad_tars.encode(Image.new("RGB", (8, 8), (color, 0, 0)), "PNG") for color in colors]
        bad_tars.shard(tmp_path / name, [("k", {"png": data, "txt": b"x"}) for data in made])

    write("a.tar", [1, 2])
    write("b.tar", [3])
    file, pattern = tmp_path / "cache.npz", f"{tmp_path}/*.tar"
    assert embedded(model, pattern, file)[0] == 3 and embedded(model, pattern, file)[0] == 0
    write("b.tar", [4, 5, 6])
    count, found = embedded(model, pattern, file)
    assert count == 3 and found["b.tar#k"] == ("x", 6)


def test_default_names_are_captions_or_folders(model, images, tmp_path):
    source = open_images(str(images))
    texts = ["\n a fox \r\nin the snow", " \n", "a fox", "a hen"]
    assert Index(model, source, Embedded(list(range(4)), texts, np.eye(4))).names == ["a fox", "a hen"]
    for label in ("red_fox", "hen"):
        (tmp_path / "set" / label).mkdir(parents=True)
        paint(tmp_path / "set" / label / "0.png", 1)
    source = open_images(str(tmp_path / "set"))
    assert Index(model, source, Embedded([0, 1], ["", ""], np.eye(2))).names == ["hen", "red fox"]
