import pickle

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from tests import torture
from xclip_jax.data import sources, tables
from xclip_jax.errors import BadSample, UserError


def open_source(spec, image="image", text=("text",), tags=""):
    return sources.open_source(spec, data_dir="", image_key=image, text_keys=text, tags_key=tags)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(torture.jpeg(i))
    return [torture.jpeg(i) for i in range(3)]


@pytest.mark.parametrize("tab", [",", "\t"])
def test_csv(tmp_path, images, tab):
    head = tab.join(("title", "filepath", "words"))
    rows = [
        head, tab.join(('"a, ""b""\nc"', "images/0.jpg", '"x, y"')),
        tab.join(("ünï", str(tmp_path / "images/1.jpg"), "")), "",
        tab.join(("", "images/2.jpg", "")), tab.join(("lost", "images/9.jpg", "")), "short",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    (tmp_path / "more.csv").write_text(head + "\n" + tab.join(("more", "images/2.jpg", "z")))
    source = open_source(f"csv:{tmp_path}/pairs.csv,{tmp_path}/more.csv", "filepath", ("title",), "words")
    assert len(source) == 6
    assert source[0]["text"] == ['a, "b"\nc']
    assert source[0]["tags"] == ["x", "y"]
    assert source[1]["text"] == ["ünï"]
    assert [source[i]["image"] for i in (0, 1, 5)] == images
    assert source[5] == pickle.loads(pickle.dumps(source))[5]
    for i, reason in ((2, "caption is empty"), (3, "file cannot be read"), (4, "no image in the row")):
        with pytest.raises(BadSample, match=reason):
            source[i]
    assert source.where(3) == {"file": str(tmp_path / "images" / "9.jpg")}
    with pytest.raises(UserError, match=r"has no column 'image' but 'title', 'filepath', 'words'; set data\.image_key"):
        open_source(f"csv:{tmp_path}/pairs.csv")
    (tmp_path / "empty.csv").write_text("image,text\n")
    with pytest.raises(UserError, match="has no row"):
        open_source(f"csv:{tmp_path}/empty.csv")


def test_parquet(tmp_path, images):
    paths = pyarrow.table({"image": ["images/0.jpg", None], "text": [["one", "two"], ["x"]]})
    pyarrow.parquet.write_table(paths, tmp_path / "0.parquet")
    source = open_source(f"parquet:{tmp_path}/0.parquet")
    assert source[0] == {
        "image": images[0], "text": ["one", "two"], "tags": [], "id": str(tmp_path / "images" / "0.jpg")
    }
    with pytest.raises(BadSample, match="no image in the row"):
        source[1]
    inside = pyarrow.table({"image": [{"bytes": images[1], "path": "x"}], "text": ["t"], "tags": [["a", "b"]]})
    pyarrow.parquet.write_table(inside, tmp_path / "1.parquet")
    source = open_source(f"parquet:{tmp_path}/1.parquet", tags="tags")
    assert source[0] == {"image": images[1], "text": ["t"], "tags": ["a", "b"], "id": "0"}
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_array_record(tmp_path, images):
    def example(**features):
        found = tf_example_pb2.Example()
        for key, values in features.items():
            found.features.feature[key].bytes_list.value.extend(values)
        return found.SerializeToString()

    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (
        example(image=[images[0]], text=[b"one", b"two"]), example(image=[images[1]]), example(text=[b"x"]), b"\xff\xff"
    ):
        writer.write(record)
    writer.close()
    source = open_source(f"array_record:{tmp_path}/*.array_record")
    assert len(source) == 4
    assert source[0] == {"image": images[0], "text": ["one", "two"], "tags": [], "id": "0"}
    for i, reason in ((1, "caption is empty"), (2, "no image in the record"), (3, "record cannot be read")):
        with pytest.raises(BadSample, match=reason):
            source[i]
    assert sources.card(source)["samples"] == 4
    (tmp_path / "b.array_record").write_bytes(b"rubbish" * 100)
    with pytest.raises(UserError, match="cannot be read as ArrayRecord"):
        tables.ArrayRecordSource(f"{tmp_path}/b.array_record", "image", ("text",))
