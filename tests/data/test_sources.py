"""Folders, TFDS data sets, specs of sources, and the cards that say which data a run reads."""

import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from tests.helpers import bad_tars, tiny
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, prefetch, sources
from xclip_jax.data.readers import glue
from xclip_jax.data.readers.folder_source import FolderSource
from xclip_jax.data.readers.tfds_source import TfdsSource, open_tfds


def open_source(spec, data_dir="", **keys):
    return sources.open_pairs(spec, base.SourceOptions(data_dir, **keys))


def names(source):
    return [str(path.relative_to(source.path)) for path in source.images]


def test_hidden_folders_and_files_are_no_pairs(tmp_path):
    tiny.folder(tmp_path / ".data" / "pairs", n=3)  # above the root a dot means nothing
    root = tmp_path / ".data" / "pairs"
    before = names(FolderSource(root))
    for place in (".ipynb_checkpoints/a-checkpoint.jpg", "sub/.thumbs/b.jpg", "._c.jpg", "sub/d/e.JPG", "sub-1/f.png"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(bad_tars.jpeg(0))
    (root / "folder.jpg").mkdir()
    after = names(FolderSource(root))
    assert sorted(after) == sorted([*before, "sub/d/e.JPG", "sub-1/f.png"])
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
    source, reasons = FolderSource(tmp_path), {}
    for i, path in enumerate(source.images):
        try:
            source[i]
        except BadSample as error:
            reasons[path.stem] = error.reason
    assert reasons == {
        "pipe": "file cannot be read",
        "pipe_text": "file cannot be read",
        "large": "file too large",
        "large_text": "file too large",
        "no_text": "no caption file",
        "link": "no image file",
    }


def test_card_of_a_folder(tmp_path):
    """It is that of a copy in another place; another name, size or number of files changes it."""
    root = tiny.folder(tmp_path / "a", n=4)
    card = sources.Decoded(FolderSource(root)).fingerprint()
    assert card["samples"] == 4 and len(card["hash"]) == 32
    shutil.copytree(root, tmp_path / "b")
    [image, *_] = sorted((tmp_path / "b").glob("*.*g"))
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


def test_card_of_a_folder_takes_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.jpg"
    with open(path, "wb") as file:
        file.write(bad_tars.jpeg(0))
    (tmp_path / "\udcff.txt").write_text("x")
    assert FolderSource(tmp_path).fingerprint()["samples"] == 1


def test_card_of_the_demo():
    splits = ("train", "train", "train[:10]", "test_line")
    cards = [open_source(f"demo:{split}", text_keys=("name",)).fingerprint() for split in splits]
    assert cards[0] == cards[1] and cards[0]["name"].startswith("emoji_pairs/")
    assert [card["samples"] for card in cards[1:]] == [4309, 10, 1474]
    assert len({card["hash"] for card in cards}) == 3
    with pytest.raises(UserError, match=r"^source 'demo:tests': unknown split; expected one of .*test_line, .*train"):
        open_source("demo:tests")


class Numbers(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set; one with the images in bytes needs no TensorFlow."""

    VERSION = tfds.core.Version("1.2.0")
    n = 3

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "text": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(self.n):
            yield i, {"image": io.BytesIO(bad_tars.encode(bad_tars.picture(i), "PNG")), "text": f"number {i}"}


def prepare(folder, n, file_format="array_record"):
    Numbers.n = n
    builder = Numbers(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
    return str(folder)


def test_tfds(tmp_path):
    folder = prepare(tmp_path / "a", 3)
    source = open_source("tfds:numbers/train", folder)
    assert source[1]["text"] == ["number 1"]
    card = source.fingerprint()
    assert (card["samples"], card["name"], card["split"]) == (3, "numbers/1.2.0", "train")
    shutil.copytree(folder, tmp_path / "b")
    assert open_source("tfds:numbers/train", str(tmp_path / "b")).fingerprint() == card
    for changes in ({"text_keys": ("title/text",)}, {"image_key": "title"}, {"tags_key": "title"}):
        with pytest.raises(
            base.MissingColumnError, match=r"numbers/1\.2\.0 has no feature 'title.*'; it has image, text; set"
        ):
            open_source("tfds:numbers/train", folder, **changes)
    part = open_source("tfds:numbers/train[:2]", folder)
    assert len(part) == 2 and part.fingerprint()["hash"] != card["hash"]
    other = open_source("tfds:numbers/train[:3]", prepare(tmp_path / "c", 4))
    fewer = open_source("tfds:numbers/train[:3]", folder)
    assert len(other) == 3 and other.fingerprint()["hash"] != fewer.fingerprint()["hash"]
    with pytest.raises(UserError, match=r"^TFDS data set 'numbers', split 'tests', cannot be read from .*/a \(.*tests"):
        open_source("tfds:numbers/tests", folder)


def test_tfds_that_needs_tensorflow_to_be_prepared(monkeypatch, capsys):
    def builder(*_, **__):
        print("*****")
        raise ModuleNotFoundError("Failed to construct dataset: No module named 'tensorflow'")

    monkeypatch.setattr(tfds, "builder", builder)
    message = r"'coco_captions' is not prepared in .*, which needs TensorFlow; .*tfds-prepare.*tfds build coco_captions"
    with pytest.raises(UserError, match=message):
        open_tfds("coco_captions", "train", None)
    assert not capsys.readouterr().out


def test_captions_of_tfds_that_are_empty_are_bad_samples():
    captions = ([b" two dogs\n", b"", b"\t"], [b"", b"  "], [])
    records = [{"image": b"x", "captions": {"text": texts}, "title": b" "} for texts in captions]
    info = type("Info", (), {"full_name": "x/1.0.0", "splits": {}, "features": ("image", "captions", "title")})
    source = TfdsSource(records, info, "train", base.SourceOptions(text_keys=("captions/text", "title")))
    assert source[0]["text"] == ["two dogs"]
    for i in (1, 2):
        with pytest.raises(BadSample, match="caption is empty"):
            source[i]


class Photos(Numbers):
    """Grey images that are not called so, and keywords some of which are empty."""

    def _info(self):
        photo = tfds.features.Image(shape=(None, None, 1))
        features = {"photo": photo, "title": tfds.features.Text(), "tag": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _generate_examples(self):
        for i in range(3):
            photo = io.BytesIO(bad_tars.encode(bad_tars.picture(i).convert("L"), "PNG"))
            yield i, {"photo": photo, "title": f"number {i}", "tag": "x" * (i % 2)}


def test_images_of_tfds_that_have_another_name(tmp_path):
    """They too are read as files, which training decodes, and not decoded to one channel."""
    Photos(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = open_source("tfds:photos/train", str(tmp_path), image_key="photo", text_keys=("title",), tags_key="tag")
    records = {record["text"][0]: record for record in (source[i] for i in range(3))}
    for i in range(3):
        assert records[f"number {i}"]["image"] == bad_tars.encode(bad_tars.picture(i).convert("L"), "PNG")
        assert records[f"number {i}"]["tags"] == ["x"] * (i % 2)


def test_tfds_that_is_not_there_or_in_another_format(tmp_path):
    command = r"`tfds build numbers --file_format=array_record --data_dir=.*`\.$"
    with pytest.raises(UserError, match=r"^TFDS data set 'numbers' is not prepared in .*/x; prepare .*" + command):
        open_source("tfds:numbers/train", str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"^unknown TFDS data set 'no_numbers'; see https://"):
        open_source("tfds:no_numbers/train", str(tmp_path / "x"))


def test_tfds_without_random_access(monkeypatch):
    class Builder:
        info = type("Info", (), {"features": {}, "file_format": tfds.core.FileFormat.TFRECORD})

        def is_prepared(self):
            return True

        def as_data_source(self, *_, **__):
            raise NotImplementedError("Random access data source for file format FileFormat.TFRECORD is not supported.")

    monkeypatch.setattr(tfds, "builder", lambda *_, **__: Builder())
    message = (
        r"^TFDS data set 'x' in the default data_dir is prepared as tfrecord, which does not allow random access; .*"
    )
    with pytest.raises(UserError, match=message + r"--file_format=array_record`\.$"):
        open_tfds("x", "train", None)


def test_a_path_without_its_prefix(tmp_path):
    for name, meant in (("pairs", "folder"), ("a.tar", "tar"), ("a.tsv", "csv"), ("a.parquet", "parquet")):
        path = tmp_path / name
        path.mkdir() if meant == "folder" else path.touch()
        with pytest.raises(UserError, match=rf"^unknown source '{path}'; .*did you mean '{meant}:{path}'\?$"):
            open_source(str(path))
    with pytest.raises(
        UserError, match=r"^unknown source 'what:x'; write tar:PATTERN, .* or package.module:Class:REST\.$"
    ):
        open_source("what:x")


def test_a_misspelt_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "sheet.png").touch()
    for read in (sources.spec_from_path, sources.parse):
        for path, rest in (
            ("falt", "no file or folder 'falt'; did you mean 'flat'?"),
            ("flat/shet.png", "no file or folder 'flat/shet.png'; did you mean 'flat/sheet.png'?"),
            (f"{tmp_path}/falt", f"no file or folder '{tmp_path}/falt'; did you mean '{tmp_path}/flat'?"),
            (
                "pictures",
                "no file or folder 'pictures'; check the path; a source is written KIND:REST, as in hf:ORG/NAME/train.",
            ),
            ("flat/sheet.png", "'flat/sheet.png' is a file of no known kind; name its folder or a table."),
            ("flat/*.png", "'flat/*.png' is a pattern of images; name the folder, 'flat'."),
        ):
            with pytest.raises(UserError, match=f"^{re.escape(rest)}$"):
                read(path)
    with pytest.raises(UserError, match=r"^unknown source 'foldr:flat'; .*did you mean 'folder:flat'"):
        sources.parse("foldr:flat")


def test_incomplete_rows_of_glue_are_counted_and_many_refused(tmp_path, capsys):
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = [f"{i}\t1\t2\tWhat {i}?\tWhy?\t{i % 2}" for i in range(300)]
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows]))
    assert len(glue.read("qqp", "validation", str(tmp_path))[0]) == 300
    assert capsys.readouterr().out == ""
    rows[7], rows[9] = "7\t1\t2\tWhat?\t\t1", "9\t1\t2\tWhat?"
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows]))
    texts, labels = glue.read("qqp", "validation", str(tmp_path))
    assert len(texts) == len(labels) == 298
    message = "dev.tsv': 2 of 300 rows lack a text or the label (1 end too early) and are left out\n"
    assert capsys.readouterr().out.endswith(message)
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows[:100]]))
    with pytest.raises(UserError, match=r"dev\.tsv': 2 of 100 rows lack .* \(1 end too early\); the file is damaged"):
        glue.read("qqp", "validation", str(tmp_path))


def test_threads_below_zero():
    with pytest.raises(UserError, match="threads is -1; it must be 0, for one a core, or more"):
        prefetch.ThreadPrefetcher(str, 3, threads=-1)


def test_the_end_of_a_process_does_not_wait_for_a_read_that_hangs():
    script = (
        "import time; from xclip_jax.data.prefetch import ThreadPrefetcher\n"
        "with ThreadPrefetcher(lambda i: time.sleep(300 * i), 4, threads=2) as ahead: ahead[0]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_an_error_of_a_prefetched_item_is_raised_where_it_is_read():
    def make(i):
        if i == 2:
            raise ValueError(f"item {i}")
        return 10 * i

    with prefetch.ThreadPrefetcher(make, 5, threads=2, window=3) as ahead:
        assert [ahead[1], ahead[0], ahead[3]] == [10, 0, 30]
        with pytest.raises(ValueError, match="item 2"):
            ahead[2]
        assert ahead[4] == 40
