"""Captions and names in other encodings than UTF-8: a bad sample with the remedy, never another text."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers import bad_tars, tiny
from xclip_jax.commands import check, evaluate
from xclip_jax.core.errors import BadSample
from xclip_jax.data import sources
from xclip_jax.data.base import SourceOptions

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
    source = sources.open_pairs(SOURCES[kind](tmp_path), SourceOptions(text_keys=keys))
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
