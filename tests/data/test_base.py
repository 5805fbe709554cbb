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

from tests.data.test_loader import Numbers, config, read, texts
from tests.helpers import bad_tars, tiny
from xclip_jax.commands import check, evaluate
from xclip_jax.core.errors import BadSample, UserError, describe
from xclip_jax.data import images, ledger, records, sources, tokenizer
from xclip_jax.data.base import SourceOptions


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
    c = config(spread_duplicate_captions=apart)
    batches = read([Hostile("a", 16)], c, stop=2, ledger=book)
    book.sync(16)
    entries = {entry["index"]: entry for entry in map(json.loads, book.path.read_text().splitlines())}
    assert entries.keys() == {3, 5, 8, 9}
    assert entries[3]["reason"] == "RecursionError" and "maximum recursion" in entries[3]["detail"]
    assert entries[5]["reason"] == "TypeError" and entries[9]["reason"] == "KeyError"
    rows = texts(batches)
    assert len(rows) == 16 and not set(rows) & {"a 3", "a 5", "a 8", "a 9"}
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
    monkeypatch.setattr(records, "READ_TIMEOUT", 0.2)
    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    try:
        rows = texts(read([Dead("a", 16)], config(), stop=2, ledger=book))
    finally:
        Dead.disk.set()  # ends the threads
    book.sync(16)
    entries = {entry["index"]: entry for entry in map(json.loads, book.path.read_text().splitlines())}
    assert entries.keys() == {3, 9}
    assert entries[3]["reason"] == "read takes too long" and entries[3]["detail"] == "more than 0.2 s"
    expected = texts(read([Numbers("a", 16)], config(), stop=2))
    same = [row == other for row, other in zip(rows, expected, strict=True) if other not in ("a 3", "a 9")]
    assert len(same) == 14 and all(same)
    assert not set(rows) & {"a 3", "a 9"}


def picky(name, error):
    """A tokenizer that raises on the text "a 5"."""

    def encode(text):
        if text == "a 5":
            raise error
        return [7] * len(text)

    return tokenizer.Tokenizer(name, encode, vocab_size=10, sot_id=1, eot_id=2, pad_id=0)


def test_a_text_that_the_tokenizer_cannot_encode_is_a_bad_sample(tmp_path):
    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    batches = read([Numbers("a", 16)], config(), stop=2, ledger=book, tokens=picky("x", OverflowError("too long")))
    book.sync(16)
    (entry,) = map(json.loads, book.path.read_text().splitlines())
    assert (entry["index"], entry["reason"], entry["detail"]) == (5, "OverflowError", "too long")
    assert sum(len(batch["text"]) for batch in batches) == 16 and (batches[0]["text"][:, 0] == 1).all()


def test_a_tokenizer_that_lacks_something_ends_the_run_with_the_sample(tmp_path):
    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    with pytest.raises(UserError) as error:
        read([Numbers("a", 16)], config(), stop=2, ledger=book, tokens=picky("x", UserError("no unknown token")))
    assert describe(error.value) == 'no unknown token; in sample {"source": 0, "index": 5}.'


@pytest.mark.parametrize("error", [UserError("no bucket"), MemoryError("all of it"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("where", ["record", "image"])
def test_what_concerns_the_whole_run_ends_it(tmp_path, monkeypatch, error, where):
    def fail(*_, **__):
        raise error

    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    if where == "record":
        monkeypatch.setattr(Numbers, "__getitem__", fail)
    else:
        monkeypatch.setattr(images, "decode", fail)
    with pytest.raises(type(error), match=str(error)):
        read([Numbers("a", 16)], config(threads=0), stop=2, ledger=book)


LATIN = "caf\xe9 cr\xe8me".encode("latin-1")
REMEDY = r"caption is not UTF-8: b'.*caf\\xe9.*; convert the file, as with iconv -f latin1 -t utf-8 FILE > NEW"


def folder(path):
    (path / "latin.png").write_bytes(bad_tars.encode(bad_tars.picture(0), "PNG"))
    (path / "latin.txt").write_bytes(LATIN)
    return f"folder:{path}"


def table(path, between):
    (path / "latin.png").write_bytes(bad_tars.jpeg(0))
    row = between.join(["latin.png", "@", "x"]).encode().replace(b"@", LATIN)
    (path / "x.csv").write_bytes(between.join(["image", "text", "tags"]).encode() + b"\n" + row + b"\n")
    return f"csv:{path}/x.csv"


def tar(path, suffix, data):
    bad_tars.shard(path / "x.tar", [("latin", {"jpg": bad_tars.jpeg(0), suffix: data})])
    return f"tar:{path}/x.tar"


SOURCES = {
    "folder": folder,
    "csv": lambda path: table(path, ","),
    "tsv": lambda path: table(path, "\t"),
    "tar": lambda path: tar(path, "txt", LATIN),
    "tar of json": lambda path: tar(path, "json", b'{"text": "%s"}' % LATIN),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_caption_that_is_not_utf8_is_a_bad_sample(kind, tmp_path):
    keys = ("caption",) if kind == "tar of json" else ("text",)
    source = sources.open_pairs(SOURCES[kind](tmp_path), SourceOptions(text_columns=keys))
    with pytest.raises(BadSample, match=REMEDY) as caught:
        source[0]
    assert caught.value.reason == "caption is not UTF-8"


def test_keywords_and_arrow_strings_count_too(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"image,text,tags\nx.jpg,one," + LATIN + b"\n")
    (tmp_path / "x.jpg").write_bytes(bad_tars.jpeg(0))
    source = sources.open_pairs(f"csv:{tmp_path}/x.csv", SourceOptions(tags_key="tags"))
    with pytest.raises(BadSample, match=REMEDY):
        source[0]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([LATIN]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"image": ["x.jpg"], "text": column}), tmp_path / "x.parquet")
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        sources.open_pairs(f"parquet:{tmp_path}/x.parquet")[0]


def test_check_counts_and_lists_them(tmp_path, capsys):
    tiny.folder(tmp_path, n=9)
    folder(tmp_path)
    assert check.main([str(tmp_path), "--tokenizer", "bytes"]) == 1
    out = capsys.readouterr().out
    assert "\nbad, caption is not UTF-8: 1 of 10 that were read\n" in out
    assert "iconv -f latin1 -t utf-8" in out and "latin.png" in out


def untrained(tmp_path):
    return tiny.untrained(tmp_path / "run", "clip")


def test_images_and_classes_whose_names_are_not_utf8_are_evaluated(tmp_path, capsys):
    for label in (b"h\xfcnd", b"cat"):
        where = tmp_path / "set" / os.fsdecode(label)
        where.mkdir(parents=True)
        for i in range(2):
            bad_tars.picture(i).save(where / os.fsdecode(b"caf\xe9%d.png" % i))
    run, spec = untrained(tmp_path), f"folder:{tmp_path / 'set'}"
    entry = evaluate.evaluate(str(run), spec)["results"][0]
    assert entry["n"] == 4
    assert "h�nd" in sources.open_labelled(spec).names
    capsys.readouterr()


def test_half_a_surrogate_in_a_caption_is_evaluated(tmp_path, capsys):
    images = []
    for i in range(3):
        bad_tars.picture(i).save(tmp_path / f"{i}.jpg")
        sentences = [{"raw": "half \ud83d pair" if i else "whole \ud83e\udd8a"}]
        images.append({"filename": f"{i}.jpg", "split": "test", "sentences": sentences})
    (tmp_path / "data.json").write_text(json.dumps({"images": images}))
    result = evaluate.evaluate(str(untrained(tmp_path)), f"flickr30k_retrieval@{tmp_path}/data.json")
    assert result["results"][0]["n"] == 3
    capsys.readouterr()
