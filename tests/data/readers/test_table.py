"""Tables and ArrayRecord files: which rows are pairs or classes, what cannot be read, and fingerprints."""

import json
import os

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from tests.helpers import bad_tars, web
from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, records, sources
from xclip_jax.data.base import read_csv
from xclip_jax.data.readers.table import ImageColumn


def open_source(spec, image="image", text=("text",), tags=""):
    return sources.open_pairs(spec, base.SourceOptions("", image, text, tags))


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(bad_tars.jpeg(i))
    return [bad_tars.jpeg(i) for i in range(3)]


def write(path, rows, tab=","):
    path.write_text("\n".join(tab.join(row) if isinstance(row, tuple) else row for row in rows), encoding="utf-8-sig")


def record(image, text, name, tags=()):
    numbers = [0] * len(text)
    return {"image": image, "text": text, "columns": numbers, "negatives": [], "tags": [*tags], "id": name}


def write_parquet(path, metadata=None, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize(("tab", "first"), [(",", 'a, "b"\nc'), ("\t", 'a, ""b"" c')])
def test_csv(tmp_path, images, tab, first):
    head = ("title", "filepath", "words")
    write(
        tmp_path / "pairs.csv",
        [
            head,
            ('"a, ""b""\nc"' if tab == "," else first, "images/0.jpg", '"x, y"' if tab == "," else "x, y"),
            ("ünï", str(tmp_path / "images/1.jpg"), ""),
            "",
            ("", "images/2.jpg", ""),
            ("lost", "images/9.jpg", ""),
            ("none", "", ""),
        ],
        tab,
    )
    write(tmp_path / "more.csv", [head, ("more", "images/2.jpg", "z")], tab)
    source = open_source(f"csv:{tmp_path}/pairs.csv,{tmp_path}/more.csv", "filepath", ("title",), "words")
    assert len(source) == 6
    assert source[0]["text"] == [first] and source[0]["tags"] == ["x", "y"] and source[1]["text"] == ["ünï"]
    assert [source[i]["image"] for i in (0, 1, 5)] == images
    for i, reason in ((2, "caption is empty"), (3, "file does not exist"), (4, "no image in the row")):
        with pytest.raises(BadSample, match=reason):
            source[i]
    assert source.describe(3) == {"file": str(tmp_path / "images" / "9.jpg")}
    with pytest.raises(UserError, match=r"'image'; its columns are 'title', 'filepath', 'words'"):
        open_source(f"csv:{tmp_path}/pairs.csv")
    with pytest.raises(UserError, match="'filepath/bytes'"):  # only texts have fields
        open_source(f"csv:{tmp_path}/pairs.csv", "filepath/bytes", ("title",))


UNCLOSED = [("a.jpg", "x", "caption"), ("a.jpg", "x", '"never closed'), *[("a.jpg", "x", "caption")] * 90]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([("image", "text"), ("",)], "has no row"),
        ([("image", "text"), ("0.jpg", "a fox", "red")], "got 3: 0.jpg"),
        ([], "Empty CSV file"),
        ([("image", "text", "text"), ("0.jpg", "a fox", "a hen")], "2 columns 'text'"),
        ([("image", "notes", "text"), *UNCLOSED], "column 'text'"),
        ([("image", "text", "notes"), *UNCLOSED], "column 'notes'"),  # one that is not read
    ],
)
def test_open__names_the_table_and_the_fault(tmp_path, rows, named):
    write(tmp_path / "x.csv", rows)
    with pytest.raises(UserError, match=rf"x\.csv'.*{named}"):
        open_source(f"csv:{tmp_path}/x.csv")


def test_an_unpaired_quote_in_a_large_table_is_named(tmp_path):
    rows = ["image,text", '0.jpg,"a 5 screen', *(f"{i}.jpg,{'a long caption ' * 4}{i}" for i in range(40_000))]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"x\.csv': a row is longer than a megabyte: .* close the quote"):
        read_csv(f"{tmp_path}/x.csv", ["text"])


def test_fields_with_several_lines_are_named(tmp_path, capsys):
    rows = ["image,text", "0.jpg,a fox", '1.jpg,"24 inch screen', "2.jpg,a hen", '3.jpg,a TV of 24"', "4.jpg,a dog"]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    assert len(read_csv(f"{tmp_path}/x.csv", ["text"])) == 3
    said = capsys.readouterr().out
    assert "x.csv': fields of column 'text' with several lines: 1, the first in row 1; if a quote" in said
    (tmp_path / "x.csv").write_text("\n".join(rows[:2]))
    read_csv(f"{tmp_path}/x.csv", ["text"])
    assert not capsys.readouterr().out


def test_quotes_mean_nothing_between_tabs(tmp_path):
    captions = [f"caption {i}" for i in range(1001)]
    captions[500] = '"a quote that nobody closes'
    captions[700] = '"quoted" and not'
    write(tmp_path / "x.tsv", [("image", "text"), *((f"{i}.jpg", text) for i, text in enumerate(captions))], "\t")
    assert read_csv(f"{tmp_path}/x.tsv", ["text"])["text"].to_pylist() == captions
    assert len(open_source(f"csv:{tmp_path}/x.tsv")) == 1001


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_remote_tables_are_read_alike(tmp_path, images, kind):
    names = ["images/0.jpg", "images/1.jpg"]
    write(tmp_path / "x.csv", [("image", "text"), (names[0], "a fox"), (names[1], "a dog")])
    write_parquet(tmp_path / "x.parquet", image=names, text=["a fox", "a dog"])
    memory = fsspec.filesystem("memory")
    for name in (f"x.{kind}", *names):
        memory.pipe_file(f"/tables/{name}", (tmp_path / name).read_bytes())
    source = open_source(f"{kind}:memory://tables/x.{kind}")
    assert [source[i]["image"] for i in (0, 1)] == images[:2] and source[1]["text"] == ["a dog"]
    assert source.fingerprint()["samples"] == 2
    memory.pipe_file(f"/tables/{kind}", b"")
    with pytest.raises(UserError, match=rf"table 'memory://tables/{kind}' cannot be read"):
        open_source(f"{kind}:memory://tables/{kind}")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_requests_for_a_table_on_the_web_are_tried_again(tmp_path, kind, monkeypatch):
    write(tmp_path / "x.csv", [("image", "text"), *[("a.jpg", "a fox")] * 50])
    write_parquet(tmp_path / "x.parquet", image=["a.jpg"] * 50, text=["a fox"] * 50)
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(base, "_REQUEST", 100)
    with web.serve() as site:
        site.files["x"] = (tmp_path / f"x.{kind}").read_bytes()
        site.statuses["x"] = [503, 503, 0, 503, 429, 0, 503]  # HEAD and GET for the size, HEAD; parts of the content
        source = open_source(f"{kind}:{site.url('x')}")
        assert not site.statuses["x"] and source.texts(49) == [["a fox"]] and len(source) == 50
        site.statuses["x"] = [0, 503, 503, 503]
        with pytest.raises(UserError, match=f"table '{site.url('x')}' cannot be read .*, status 503"):
            open_source(f"{kind}:{site.url('x')}")


def test_semicolons_as_spreadsheets_write_them(tmp_path, images):
    (tmp_path / "x.csv").write_text('image;text\nimages/0.jpg;"a fox; red, and small"\nimages/1.jpg;a, b\n')
    source = open_source(f"csv:{tmp_path}/x.csv")
    assert [source[i]["text"] for i in (0, 1)] == [["a fox; red, and small"], ["a, b"]]


def test_rows_whose_image_cannot_be_read_are_bad_samples(tmp_path, images, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setitem(base.MAX_BYTES, "image", 2000)
    (tmp_path / "large.jpg").write_bytes(bytes(2001))
    names = ["images/0.jpg", "nul\0.jpg", "foo://x/y.jpg", "pipe", "images", "large.jpg", "x" * 5000]
    write(tmp_path / "x.csv", [("image", "text"), *((name, "caption") for name in names)])
    source = open_source(f"csv:{tmp_path}/x.csv")
    assert source[0]["image"] == images[0]
    for i, detail in enumerate(("null byte", "foo", "not a regular", "not a regular", "2,000 bytes", "too long"), 1):
        with pytest.raises(BadSample, match=detail) as error:
            source[i]
        assert error.value.reason == ("file too large" if names[i] == "large.jpg" else "file cannot be read")
        assert source.describe(i)["file"]


def test_card_of_tables_changes_with_their_content_alone(tmp_path, images):
    rows = [("image", "text"), ("images/0.jpg", "one"), ("images/1.jpg", "two")]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "x.csv", rows)
    cards = [open_source(f"csv:{tmp_path}/{folder}/x.csv").fingerprint() for folder in "ab"]
    assert cards[0] == cards[1]
    assert cards[0]["samples"] == 2 and cards[0]["files"][0]["name"] == "x.csv"
    write(tmp_path / "b" / "x.csv", [rows[0], rows[2], rows[1]])
    changed = open_source(f"csv:{tmp_path}/b/x.csv").fingerprint()
    assert changed["hash"] != cards[0]["hash"] and changed["files"] == cards[0]["files"]
    hashes = set()
    for captions in (["one", "two"], ["two", "one"]):
        path = write_parquet(tmp_path / "x.parquet", image=["a", "b"], text=captions)
        hashes.add(open_source(f"parquet:{path}").fingerprint()["hash"])
    assert len(hashes) == 2 and "" not in hashes
    path = write_parquet(tmp_path / "x.parquet", front=["a"], back=["b"], text=["one"])
    front, back = (open_source(f"parquet:{path}?image={column}").fingerprint() for column in ("front", "back"))
    assert front["hash"] != back["hash"] and front["files"] == back["files"]


def test_parquet(tmp_path, images):
    path = write_parquet(tmp_path / "0.parquet", image=["images/0.jpg", None], text=[["one", "two"], ["x"]])
    source = open_source(f"parquet:{path}")
    assert source[0] == record(images[0], ["one", "two"], str(tmp_path / "images" / "0.jpg"))
    with pytest.raises(BadSample, match="no image in the row"):
        source[1]
    inside = [{"bytes": images[1], "path": "x"}]
    path = write_parquet(tmp_path / "1.parquet", image=inside, text=["t"], tags=[["a", "b"]])
    assert open_source(f"parquet:{path}", tags="tags")[0] == record(images[1], ["t"], "0", ["a", "b"])
    sentences = [[{"raw": "one"}, {"raw": "two"}]]
    path = write_parquet(tmp_path / "2.parquet", image=[images[1]], sentences=sentences)
    assert open_source(f"parquet:{path}", text=("sentences/raw",))[0]["text"] == ["one", "two"]


def test_a_table_in_a_bucket_names_no_files_of_this_machine(tmp_path, images):
    """A table of this machine does, with absolute paths too."""
    names = [str(tmp_path / "images" / "0.jpg"), "../images/0.jpg"]
    source = open_source(f"parquet:{write_parquet(tmp_path / '0.parquet', image=names, text=['x', 'y'])}")
    assert source[0]["image"] == images[0]
    source.tables[:] = ["gs://bucket/tables/0.parquet"]
    assert source.describe(1) == {"file": "gs://bucket/tables/../images/0.jpg"}
    source.tables[:] = ["https://host/tables/0.parquet?key=a/b"]
    assert source.describe(1) == {"file": "https://host/tables/../images/0.jpg"}
    with pytest.raises(BadSample, match="may not name it"):
        source[0]


def write_classes(path, images, labels, metadata=None, **columns):
    columns = {"image": images[: len(labels)], "kind": labels} | columns
    return f"parquet:{write_parquet(path, metadata, **columns)}?label=kind"


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["Navy Blue", "red", " red "], ["Navy Blue", "red"], [0, 1, 1]),
        ([10, 9, -1], ["-1", "9", "10"], [2, 1, 0]),
        (pyarrow.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"], [1, 0, 1]),
    ],
)
def test_a_column_of_classes(tmp_path, images, labels, names, expected):
    source = sources.open_labelled(write_classes(tmp_path / "x.parquet", images, labels))
    assert source.names == names and source.labels().tolist() == expected
    assert source[1] == {"image": images[1], "label": expected[1], "id": "1"}


def test_rows_without_a_label_are_left_out_and_counted(tmp_path, images, capsys):
    for i, empty in enumerate((None, " ")):
        spec = write_classes(tmp_path / f"{i}.parquet", images, ["b", empty, "a"])
        source = sources.open_labelled(spec)
        assert [source[j]["image"] for j in range(len(source))] == [images[0], images[2]]
        assert source.labels().tolist() == [1, 0] and source.describe(1) == {"file": "row 2"}
        assert f"{spec}: 1 of 3 rows have no 'kind' and are left out, row 1 first" in capsys.readouterr().out
        other = sources.open_labelled(write_classes(tmp_path / "x.parquet", images, ["b", "a", empty]))
        assert other.labels().tolist() == [1, 0] and other.fingerprint() != source.fingerprint()
    latin = pyarrow.array([b"\xff", b"a"]).cast(pyarrow.string(), safe=False)
    for labels, kind in (([None], "null"), ([0.5, 1.0], "double"), ([["a"], ["b"]], "list"), (latin, "string")):
        with pytest.raises(UserError, match=f"x.parquet.* column 'kind' of type {kind}"):
            sources.open_labelled(write_classes(tmp_path / "x.parquet", images, labels))


def test_classes_are_named_in_the_spec(tmp_path, images):
    names = {"info": {"features": {"kind": {"names": ["fox", "dog"], "_type": "ClassLabel"}}}}
    spec = write_classes(tmp_path / "x.parquet", images, [1, 0, -1], {"huggingface": json.dumps(names)}, text=["a"] * 3)
    source = sources.open_labelled(spec)
    assert source.names == ["fox", "dog"] and source.labels().tolist() == [1, 0]
    assert open_source(spec)[2]["image"] == images[2]  # pairs need no label
    table = pyarrow.table({"image": images, "my/kind": ["b", "a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "y.parquet")
    assert sources.open_labelled(f"parquet:{tmp_path}/y.parquet?label=my%2Fkind").labels().tolist() == [1, 0, 1]
    pyarrow.parquet.write_table(table.rename_columns(["image", "a+b"]), tmp_path / "z.parquet")
    assert sources.open_labelled(f"parquet:{tmp_path}/z.parquet?label=a+b").names == ["a", "b"]
    names["info"]["features"]["kind"]["names"].reverse()
    write_classes(tmp_path / "w.parquet", images, [0], {"huggingface": json.dumps(names)})
    with pytest.raises(UserError, match=r"w\.parquet' and .*x\.parquet' number other classes in 'kind'"):
        sources.open_labelled(f"parquet:{tmp_path}/[wx].parquet?label=kind")
    with pytest.raises(UserError, match=r"'label'; its columns are .*label=COLUMN"):
        sources.open_labelled(f"parquet:{tmp_path}/x.parquet")


@pytest.mark.parametrize("name", ["set", "{a}, b"])
def test_tables_of_a_split(tmp_path, images, name):
    folder = tmp_path / name
    folder.mkdir()
    for name, labels in (
        ("train-0", ["b", "a"]),
        ("train-1", ["a"]),
        ("my_own", ["a"]),
        ("trainer", ["x"]),
        ("train-small", ["x"]),
    ):
        write_classes(folder / f"{name}.parquet", images, labels)
    kind, options = sources.SOURCES["parquet"], base.SourceOptions()
    found = [kind.has_split(f"{folder}?label=kind", x, options) for x in ("train", "my_own", "test")]
    assert found == [True, True, False]
    assert sources.open_labelled(f"parquet:{folder}?label=kind/train").labels().tolist() == [1, 0, 0]
    for split in ("my_own", "my_own/"):
        assert sources.open_labelled(f"parquet:{folder}/{split}?label=kind").names == ["a"]
    write_classes(folder / "train.parquet", images, ["b"])
    assert sources.open_labelled(f"parquet:{folder}?label=kind/train").names == ["b"]
    with pytest.raises(UserError, match=r"no file matches .*test"):
        sources.open_labelled(f"parquet:{folder}/test?label=kind")


def test_damaged_parquet_is_a_sentence(tmp_path):
    write_parquet(tmp_path / "x.parquet", image=["a"] * 50, text=["x"] * 50)
    whole = (tmp_path / "x.parquet").read_bytes()
    rng = np.random.default_rng(0)
    cut = [whole[: rng.integers(len(whole))] for _ in range(20)]
    hurt = [whole[:i] + rng.bytes(9) + whole[i + 9 :] for i in rng.integers(len(whole), size=100)]
    refused = 0
    for content in (b"", b"rubbish" * 9, *cut, *hurt):
        (tmp_path / "x.parquet").write_bytes(content)
        try:
            source = open_source(f"parquet:{tmp_path}/x.parquet")
            for i in range(len(source)):
                source.describe(i)
                with pytest.raises(BadSample):
                    source[i]
        except UserError as error:
            refused += "\n" not in str(error) and "x.parquet" in str(error)
    assert refused > 30


def test_parquet_tables_of_different_schemas(tmp_path):
    for name, image, text in (("0", ["a"], ["x"]), ("1", [b"a"], ["x"]), ("2", ["a"], pyarrow.nulls(1))):
        write_parquet(tmp_path / f"{name}.parquet", image=image, text=text)
    for order in ("02", "20"):
        assert len(open_source("parquet:" + ",".join(f"{tmp_path}/{name}.parquet" for name in order))) == 2
    with pytest.raises(UserError, match=r"parquet' .*image.*string vs binary"):
        open_source(f"parquet:{tmp_path}/*.parquet")
    write_parquet(tmp_path / "n.parquet", image=[5], text=["x"])
    with pytest.raises(BadSample, match="no image in the row"):
        open_source(f"parquet:{tmp_path}/n.parquet")[0]


def test_array_record(tmp_path, images):
    def example(**features):
        found = tf_example_pb2.Example()
        for key, values in features.items():
            found.features.feature[key].bytes_list.value.extend(values)
        return found.SerializeToString()

    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    pair = example(image=[images[0]], text=[b"one", b"two"])
    for content in (pair, example(image=[images[1]]), example(text=[b"x"]), b"\xff\xff"):
        writer.write(content)
    writer.close()
    source = open_source(f"array_record:{tmp_path}/*.array_record")
    assert source[0] == record(images[0], ["one", "two"], "0")
    for i, reason in ((1, "caption is empty"), (2, "no image in the record"), (3, "DecodeError")):
        assert records.read(source, i).reason == reason
    card = source.fingerprint()
    assert len(source) == card["samples"] == 4 and len(card["hash"]) == 32
    (tmp_path / "b.array_record").write_bytes(b"rubbish" * 100)
    with pytest.raises(UserError, match=r"b\.array_record"):
        open_source(f"array_record:{tmp_path}/b.array_record")


def test_files_that_a_column_of_bytes_names_are_told_apart():
    def sizes(*cells):
        column = pyarrow.chunked_array([pyarrow.array(cells)])
        return list(ImageColumn(column, lambda index, name: (name, "")).sizes())

    named = [{"bytes": None, "path": f"/x/{name}"} for name in ("cat1.jpg", "cat2.jpg")]
    assert sizes(*named) == [("cat1.jpg", 0), ("cat2.jpg", 0)]
    assert sizes({"bytes": b"abc", "path": "x.jpg"}) == [("0", 3)]
    assert sizes({"bytes": b"abc"}, None) == [("0", 3), ("1", 0)]
    assert sizes("/x/cat.jpg", "") == [("cat.jpg", 0), ("", 0)] and sizes(b"abcd") == [("0", 4)]
