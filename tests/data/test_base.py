"""Samples that cannot be read, decoded or encoded: bad ones are listed and replaced, what concerns the run ends it.

Captions and names in other encodings than UTF-8 are bad samples with the remedy, never other texts.
"""

import json
import os
import threading

import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from tests.data.test_loader import KEYWORDS, Numbers, config, read, texts
from tests.helpers import bad_tars
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import images, ledger, records, sources, tokenizer
from xclip_jax.data.base import SourceOptions
from xclip_jax.evaluators import registry


def listed(book, samples=16):
    book.sync(samples)
    return {entry["index"]: entry for entry in map(json.loads, book.path.read_text().splitlines())}


class Hostile(Numbers):
    """Records with which sources, decoders and tokens' readers raise whatever they like."""

    def __getitem__(self, i):
        record = super().__getitem__(i)
        if i == 3:
            raise RecursionError("maximum recursion depth exceeded")
        if i == 5:
            return record | {"tags": None}
        if i == 8:
            return record | {"image": None}
        if i == 9:
            del record["tags"]
        return record


@pytest.mark.parametrize("apart", [False, True])
def test_any_exception_of_a_sample_makes_it_a_bad_one(tmp_path, apart):
    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    c = config(spread_duplicate_captions=apart, caption_transform=KEYWORDS)
    batches = read([Hostile("a", 16)], c, stop=2, ledger=book)
    entries = listed(book)
    assert entries.keys() == {3, 5, 8, 9}
    assert entries[3]["reason"] == "RecursionError" and "maximum recursion" in entries[3]["detail"]
    assert entries[5]["reason"] == "TypeError" and entries[9]["reason"] == "KeyError"
    assert not set(texts(batches)) & {"a 3", "a 5", "a 8", "a 9"}
    with pytest.raises(UserError, match=r"sample \{.*'index': .* cannot be used"):
        read([Hostile("a", 16)], c, stop=2)


class Dead(Numbers):
    """Samples 3 and 9 are on a disk that does not answer."""

    disk = threading.Event()

    def __getitem__(self, i):
        if i in (3, 9):
            self.disk.wait()
        return super().__getitem__(i)


def test_a_sample_that_is_never_read_is_a_bad_one(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "READ_TIMEOUT", 0.1)
    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    try:
        rows = texts(read([Dead("a", 16)], config(), stop=2, ledger=book))
    finally:
        Dead.disk.set()  # ends the threads
    entries = listed(book)
    assert entries.keys() == {3, 9} and entries[3]["reason"] == "read takes too long"
    expected = texts(read([Numbers("a", 16)], config(), stop=2))
    same = [row == other for row, other in zip(rows, expected, strict=True) if other not in ("a 3", "a 9")]
    assert len(same) == 14 and all(same) and not set(rows) & {"a 3", "a 9"}


def picky(error):
    """A tokenizer that raises on the text "a 5"."""

    def encode(text):
        if text == "a 5":
            raise error
        return [7] * len(text)

    return tokenizer.Tokenizer("x", encode, tokenizer.load("bytes").model, vocab_size=10, sot_id=1, eot_id=2, pad_id=0)


def test_a_text_that_the_tokenizer_cannot_encode_is_a_bad_sample(tmp_path):
    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    batches = read([Numbers("a", 16)], config(), stop=2, ledger=book, tokens=picky(OverflowError("too long")))
    (entry,) = listed(book).values()
    assert (entry["index"], entry["reason"], entry["detail"]) == (5, "OverflowError", "too long")
    assert sum(len(batch["text"]) for batch in batches) == 16 and (batches[0]["text"][:, 0] == 1).all()


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("record", UserError("no bucket")), ("record", MemoryError("all of it")), ("record", KeyboardInterrupt("stop")),
        ("image", MemoryError("all of it")), ("text", UserError("no unknown token")),
    ],
)  # fmt: skip
def test_what_concerns_the_whole_run_ends_it(tmp_path, monkeypatch, where, error):
    def fail(*_, **__):
        raise error

    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    if where == "record":
        monkeypatch.setattr(Numbers, "__getitem__", fail)
    elif where == "image":
        monkeypatch.setattr(images, "decode", fail)
    tokens = picky(error) if where == "text" else None
    with pytest.raises(type(error), match=str(error)):
        read([Numbers("a", 16)], config(threads=1), stop=2, ledger=book, tokens=tokens)


LATIN = "caf\xe9 cr\xe8me".encode("latin-1")


def folder(path):
    (path / "latin.png").write_bytes(bad_tars.encode(bad_tars.picture(0), "PNG"))
    (path / "latin.txt").write_bytes(LATIN)
    return f"folder:{path}"


def table(path, column):
    """A table with LATIN in one column."""
    (path / "latin.png").write_bytes(bad_tars.jpeg(0))
    row = [LATIN if name == column else b"latin.png" if name == "image" else b"x" for name in ("image", "text", "tags")]
    (path / "x.csv").write_bytes(b"image,text,tags\n" + b",".join(row) + b"\n")
    return f"csv:{path}/x.csv"


def arrow(path):
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([LATIN]).buffers())
    columns = {"image": [{"bytes": bad_tars.jpeg(0), "path": None}], "text": column}
    pyarrow.parquet.write_table(pyarrow.table(columns), path / "x.parquet")
    return f"parquet:{path}/x.parquet"


def tar(path):
    files = {"jpg": bad_tars.jpeg(0), "json": b'{"caption": "%s"}' % LATIN}
    bad_tars.shard(path / "x.tar", [("latin", files)])
    return f"tar:{path}/x.tar"


SOURCES = {
    "folder": folder,
    "csv": lambda path: table(path, "text"),
    "keywords": lambda path: table(path, "tags"),
    "parquet": arrow,
    "tar of json": tar,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_caption_that_is_not_utf8_is_a_bad_sample(kind, tmp_path):
    options = SourceOptions(tags_key="tags" if kind == "keywords" else "")
    if kind == "tar of json":
        options = SourceOptions(text_columns=("caption",))
    source = sources.open_pairs(SOURCES[kind](tmp_path), options)
    with pytest.raises(BadSample, match="caption is not UTF-8") as caught:
        source[0]
    assert kind == "parquet" or ("caf\\xe9" in caught.value.detail and "iconv" in caught.value.detail)


def test_images_and_classes_whose_names_are_not_utf8_are_read(tmp_path):
    for label in (b"h\xfcnd", b"cat"):
        where = tmp_path / "set" / os.fsdecode(label)
        where.mkdir(parents=True)
        for i in range(2):
            bad_tars.picture(i).save(where / os.fsdecode(b"caf\xe9%d.png" % i))
    data = registry.load(f"folder:{tmp_path / 'set'}", 16)
    assert len([image for image in data.images if image.shape == (16, 16, 3)]) == 4
    source = sources.open_labelled(f"folder:{tmp_path / 'set'}")
    assert "h\ufffdnd" in source.names and json.dumps(source.fingerprint()).encode()
