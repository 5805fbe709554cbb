"""Data sets of TensorFlow Datasets as pairs or labelled images, read without TensorFlow."""

import io
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.helpers import bad_tars
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, sources
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers.tfds import TfdsSource, open_tfds
from xclip_jax.evaluators.base import pictures


def open_source(spec, data_dir="", **keys):
    return sources.open_pairs(spec, base.SourceOptions(str(data_dir), **keys))


def test_card_of_the_demo():
    splits = ("train", "train", "train[:10]", "test_line")
    cards = [open_source(f"demo:{split}", text_columns=("name",)).fingerprint() for split in splits]
    assert cards[0] == cards[1] and cards[0]["name"].startswith("emoji_pairs/")
    assert [card["samples"] for card in cards[1:]] == [4309, 10, 1474]
    assert len({card["hash"] for card in cards}) == 3
    with pytest.raises(UserError, match=r"'demo:tests'.* test_line, .*train"):
        open_source("demo:tests")


class Numbers(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set; one with the images in bytes needs no TensorFlow."""

    VERSION = tfds.core.Version("1.2.0")
    n = 3
    features = {"image": tfds.features.Image(), "text": tfds.features.Text()}  # noqa: RUF012

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(self.features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(self.n):
            yield i, {"image": io.BytesIO(bad_tars.encode(bad_tars.picture(i), "PNG")), "text": f"number {i}"}


class Photos(Numbers):
    """Grey images that are not called so, and keywords some of which are empty."""

    features = {  # noqa: RUF012
        "photo": tfds.features.Image(shape=(None, None, 1)), "title": tfds.features.Text(), "tag": tfds.features.Text(),
    }  # fmt: skip

    def _generate_examples(self):
        for i in range(3):
            photo = io.BytesIO(bad_tars.encode(bad_tars.picture(i).convert("L"), "PNG"))
            yield i, {"photo": photo, "title": f"number {i}", "tag": "x" * (i % 2)}


class Signs(Numbers):
    """Images in classes, one of which cannot be decoded."""

    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["stop", "go"])}  # noqa: RUF012

    def _generate_examples(self):
        for i in range(4):
            yield i, {"image": io.BytesIO(bad_tars.jpeg(i) if i else b"no image"), "label": i % 2}


def prepare(kind, folder):
    kind(data_dir=str(folder), file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=1)
    )
    return str(folder)


def test_tfds(tmp_path, monkeypatch):
    folder = prepare(Numbers, tmp_path / "a")
    source = open_source("tfds:numbers/train", folder)
    assert source[1]["text"] == ["number 1"]
    card = source.fingerprint()
    assert (card["samples"], card["name"], card["split"]) == (3, "numbers/1.2.0", "train")
    shutil.copytree(folder, tmp_path / "b")
    assert open_source("tfds:numbers/train", tmp_path / "b").fingerprint() == card
    for changes in ({"text_columns": ("title/text",)}, {"image_column": "title"}, {"tags_key": "title"}):
        with pytest.raises(UserError, match=r"'title.*'; its columns are 'image', 'text'"):
            open_source("tfds:numbers/train", folder, **changes)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("tfds:numbers/train", "~/a")) == 3
    part = open_source("tfds:numbers/train[:2]", folder)
    assert len(part) == 2 and part.fingerprint()["hash"] != card["hash"]
    monkeypatch.setattr(Numbers, "n", 4)
    other = open_source("tfds:numbers/train[:3]", prepare(Numbers, tmp_path / "c"))
    fewer = open_source("tfds:numbers/train[:3]", folder)
    assert len(other) == 3 and other.fingerprint()["hash"] != fewer.fingerprint()["hash"]
    with pytest.raises(UserError, match=r"'tfds:numbers/train' .* image and label"):
        sources.open_labelled("tfds:numbers/train", base.SourceOptions(folder))
    with pytest.raises(UserError, match=r"'numbers', split 'tests', .*/a`"):
        open_source("tfds:numbers/tests", folder)
    for name in ("numbers", "no_numbers"):
        with pytest.raises(UserError, match=rf"'{name}', split 'train', .*`tfds build {name} .*--data_dir=[^\n]*$"):
            open_source(f"tfds:{name}/train", tmp_path / "x")


def test_tfds_that_needs_tensorflow_to_be_prepared(monkeypatch):
    def builder(*_, **__):
        raise ModuleNotFoundError("Failed to construct dataset: No module named 'tensorflow'")

    monkeypatch.setattr(tfds, "builder", builder)
    with pytest.raises(UserError, match=r"tfds-prepare.*tfds build coco_captions .*No module named 'tensorflow'"):
        open_tfds("coco_captions", "train", None)


def test_captions_of_tfds_that_are_empty_are_bad_samples():
    captions = ([b" two dogs\n", b"", b"\t"], [b"", b"  "], [])
    records = [{"image": b"x", "captions": {"text": texts}, "title": b" "} for texts in captions]
    info = type("Info", (), {"full_name": "x/1.0.0", "splits": {}, "features": ("image", "captions", "title")})
    source = TfdsSource(records, info, "train", base.SourceOptions(text_columns=("captions/text", "title")))
    assert source[0]["text"] == ["two dogs"]
    for i in (1, 2):
        with pytest.raises(BadSample, match="caption is empty"):
            source[i]
    options = base.SourceOptions(text_columns=("title",), tags_key="title")
    with pytest.raises(BadSample, match="'title' has the type int64"):
        TfdsSource([{"image": b"x", "title": np.int64(3)}], info, "train", options)[0]
    keywords = TfdsSource([{"image": b"x", "title": b"red, blue"}], info, "train", options)
    assert keywords[0]["tags"] == ["red", "blue"]


def test_images_of_tfds_that_have_another_name(tmp_path):
    """They too are read as files, which training decodes, and not decoded to one channel."""
    keys = {"image_column": "photo", "text_columns": ("title",), "tags_key": "tag"}
    source = open_source("tfds:photos/train", prepare(Photos, tmp_path), **keys)
    records = {record["text"][0]: record for record in (source[i] for i in range(3))}
    for i in range(3):
        assert records[f"number {i}"]["image"] == bad_tars.encode(bad_tars.picture(i).convert("L"), "PNG")
        assert records[f"number {i}"]["tags"] == ["x"] * (i % 2)


def test_labelled_images_of_tfds(tmp_path):
    source = sources.open_labelled("tfds:signs/train", base.SourceOptions(prepare(Signs, tmp_path)))
    images, labels = [source[i]["image"] for i in range(4)], source.labels().tolist()
    assert source.names == ["stop", "go"] and labels == [source[i]["label"] for i in range(4)]
    bad = images.index(b"no image")
    with pytest.raises(BadSample) as caught:
        pictures(source.items, Preprocessing(16))[bad]
    assert caught.value.__notes__ == [f"image 'record {bad}'"]
    assert sorted(label for i, label in enumerate(labels) if i != bad) == [0, 1, 1]
