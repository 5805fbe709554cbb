"""Odd texts and images: every reader follows the table of docs/data.md."""

import json
import pathlib
import re
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from tests.data.readers import test_wds
from tests.helpers import bad_tars
from xclip_jax.core.errors import UserError
from xclip_jax.data import base, images, sources
from xclip_jax.data.readers import tfds, wds

RED, GREY = (255, 0, 0), (128, 128, 128)


def solid(mode, color, **size):
    return Image.new(mode, tuple((size or {"w": 40, "h": 30}).values()), color)


def sixteen_bits():
    return bad_tars.encode(Image.fromarray(np.full((30, 40), 0x80FF, np.uint16)), "PNG")


JPEG = bad_tars.encode(solid("RGB", RED), subsampling=0, quality=95)
LONG = "caption too large|file too large|a row is longer than a megabyte"
# By the row of the documented table: a text, as it is or encoded, and the caption or reason.
TEXTS = {
    "NUL, other control characters": [("a\0fox", "caption is not text"), ("a fox\x1b", "caption is not text")],
    "byte order mark": [("\ufeffa fox", "a fox")],
    "CR, CR LF": [("a fox\r", "a fox"), ("a fox\r\n", "a fox")],
    "Latin-1, UTF-16": [("café".encode("latin-1"), "is not UTF-8"), ("a fox".encode("utf-16"), "not UTF-8")],
    "lone surrogate": [("\ud83d fox", "is not UTF-8"), (b"\xed\xa0\xbd fox", "is not UTF-8")],
    "text of more than 1 MiB": [("word " * 2_000_000, LONG)],
}
IMAGES = {
    "image cut off": [(JPEG[:9], "image cut off"), (JPEG[:200], "image cut off"), (JPEG[:-40], "image cut off")],
    "over 67 million pixels, or 65,500 a side": [
        (bad_tars.bomb(65_535), "image too large"),
        (bad_tars.encode(solid("RGB", RED, w=65_535, h=1), "PNG"), "image too large"),
        (bad_tars.encode(solid("RGB", RED, w=65_500, h=1), "PNG"), RED),
    ],
    "animated": [
        (bad_tars.encode(solid("RGB", RED), kind, save_all=True, append_images=[solid("RGB", GREY)]), RED)
        for kind in ("GIF", "WEBP", "PNG")
    ],
    "CMYK": [(bad_tars.encode(solid("CMYK", (0, 255, 255, 0)), quality=95), RED)],
    "16 bits": [(sixteen_bits(), GREY)],
    "wrong suffix": [(bad_tars.encode(solid("RGB", RED), "BMP"), RED)],
}


def text_bytes(text):
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


def table(image, text):
    """Arrow does not check strings."""
    strings = pyarrow.array([text_bytes(text)], pyarrow.binary()).view(pyarrow.string())
    return pyarrow.table({"image": pyarrow.array([image], pyarrow.binary()), "text": strings})


def open_folder(root, image, text):
    (root / "0.jpg").write_bytes(image)
    (root / "0.txt").write_bytes(text_bytes(text))
    return sources.open_pairs(f"folder:{root}")


def open_tar(root, image, text):
    bad_tars.shard(root / "0.tar", [("0", {"jpg": image, "txt": text_bytes(text)})])
    return sources.open_pairs(f"tar:{root}/0.tar")


def open_json(root, image, text):
    content = b'{"caption": "%b"}' % text if isinstance(text, bytes) else json.dumps({"caption": text}).encode()
    bad_tars.shard(root / "0.tar", [("0", {"jpg": image, "json": content})])
    return sources.open_pairs(f"tar:{root}/0.tar", base.SourceOptions(text_columns=("caption",)))


def open_csv(root, image, text):
    (root / "0.jpg").write_bytes(image)
    (root / "0.csv").write_bytes(b'image,text\n0.jpg,"%b"\n' % text_bytes(text))
    return sources.open_pairs(f"csv:{root}/0.csv")


def open_parquet(root, image, text):
    pyarrow.parquet.write_table(table(image, text), root / "0.parquet")
    return sources.open_pairs(f"parquet:{root}/0.parquet")


def open_hub(root, image, text):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(datasets.table.InMemoryTable(table(image, text))).save_to_disk(str(root / "set"))
    return sources.open_pairs(f"hf:{root}/set")


def open_array_record(root, image, text):
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["text"].bytes_list.value.append(text_bytes(text))
    writer = array_record_module.ArrayRecordWriter(str(root / "0.array_record"), "group_size:1")
    writer.write(example.SerializeToString())
    writer.close()
    return sources.open_pairs(f"array_record:{root}/0.array_record")


def open_tfds(root, image, text):
    info = types.SimpleNamespace(full_name="set", features=("image", "text"), splits={})
    record = {"image": image, "text": text_bytes(text)}
    return tfds.TfdsSource([record], info, "train", base.SourceOptions())


def open_wds(root, image, text):
    sample = {"jpg": image, "txt": text_bytes(text)}
    split = wds.locate(str(test_wds.write(root / "set", [sample], dataset_type=["retrieval"])))
    (image,), (texts,) = wds.open_captions(split)
    return [{"image": image, "text": texts}]


READERS = {name.removeprefix("open_"): reader for name, reader in globals().items() if name.startswith("open_")}


def read(reader, root, image=JPEG, text="a fox"):
    """The caption and the colour of the image, or the fault of a sample or a set."""
    root.mkdir()
    try:
        record = READERS[reader](root, image, text)[0]
        (caption,) = record["text"]
        return caption, images.decode(record["image"])[0, 0]
    except UserError as error:
        return str(error), ""


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_follows_the_table(reader, tmp_path):
    places = (tmp_path / str(number) for number in range(1000))
    for name, cases in TEXTS.items():
        for text, expected in cases:
            if (reader, name) == ("json", "lone surrogate") and isinstance(text, str):
                expected = "\ufffd fox"  # of an escape such as \ud83d
            if reader == "wds" and name.startswith("text of"):
                expected = "needs .txt"  # it must be complete
            assert re.search(expected, read(reader, next(places), text=text)[0]), (name, text[:20])
    for name, cases in IMAGES.items():
        for image, expected in cases:
            caption, color = read(reader, next(places), image=image)
            if isinstance(expected, str):
                assert expected in caption, name
            else:
                assert caption == "a fox" and np.abs(color.astype(int) - expected).max() <= 2, name


def test_the_table_lists_what_is_tested():
    page = (pathlib.Path(__file__).parents[3] / "docs" / "data.md").read_text()
    section = page.partition("\n## Odd texts and images\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
    assert rows[1:] == [*TEXTS, *IMAGES]


@pytest.mark.parametrize("tab", ",\t")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_table_in_utf16_is_refused_by_its_encoding(tmp_path, tab, encoding):
    (tmp_path / "x.csv").write_bytes(f"image{tab}text\n0.jpg{tab}ein Fuchs\n".encode(encoding))
    with pytest.raises(UserError, match=r"x\.csv' is UTF-16, not UTF-8; convert .* iconv -f utf-16 -t utf-8"):
        sources.open_pairs(f"csv:{tmp_path}/x.csv")
