"""Negative texts of pairs in sources of each kind, and in the rows of a batch."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers import bad_tars, tiny
from xclip_jax.core.errors import UserError
from xclip_jax.data import base, loader, sources, tokenizer
from xclip_jax.train import build, prepare

WRONG = [["a cat", "two dogs"], [], ["no dog"]]
COLUMNS = {"negatives": 2, "negative_columns": ("wrong", "more")}


def folder(root):
    root.mkdir()
    for i, texts in enumerate(WRONG):
        (root / f"{i}.jpg").write_bytes(bad_tars.jpeg(i))
        (root / f"{i}.txt").write_text("a dog")
        if texts:
            (root / f"{i}.wrong.txt").write_text("".join(f"{text}\n\n" for text in texts[:1]))
            (root / f"{i}.more.txt").write_text("".join(texts[1:]))
    return f"folder:{root}"


def tar(root):
    root.mkdir()
    fields = [{"wrong": texts[:1], "more": texts[1:]} if texts else {"wrong": None} for texts in WRONG]
    files = [{"jpg": bad_tars.jpeg(i), "txt": b"a dog", "json": json.dumps(x).encode()} for i, x in enumerate(fields)]
    bad_tars.shard(root / "0.tar", [(str(i), sample) for i, sample in enumerate(files)])
    return f"tar:{root}"


def csv(root):
    folder(root)
    rows = [",".join([f"{i}.jpg", "a dog", *texts, *[""] * (2 - len(texts))]) for i, texts in enumerate(WRONG)]
    (root / "pairs.csv").write_text("\n".join(["image,text,wrong,more", *rows]))
    return f"csv:{root / 'pairs.csv'}"


def parquet(root):
    root.mkdir()
    columns = {"image": [bad_tars.jpeg(i) for i in range(3)], "text": ["a dog"] * 3}
    columns |= {"wrong": [WRONG[0], None, [" "]], "more": [None, [], ["no dog", None]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "pairs.parquet")
    return f"parquet:{root / 'pairs.parquet'}"


@pytest.mark.parametrize("write", [folder, tar, csv, parquet])
def test_every_kind_of_source_reads_them(write, tmp_path):
    spec = write(tmp_path / "set")
    config = loader.DataConfig(sources=(spec,), batch=2, **COLUMNS)
    (source,) = sources.open_sources(config, fields=("image", "text"))
    assert [source[i]["negatives"] for i in range(3)] == WRONG
    assert sources.open_pairs(spec, sources.source_options(config))[0]["negatives"] == []  # for evaluations
    if write in (csv, parquet):
        with pytest.raises(UserError, match="has no column 'worse'"):
            sources.open_sources(loader.DataConfig(sources=(spec,), negatives=1, negative_columns=("worse",)))


def test_files_of_a_folder_belong_to_its_fingerprint(tmp_path):
    spec = folder(tmp_path / "set")
    options = [base.SourceOptions(negative_columns=names) for names in ((), ("wrong",))]
    before = [sources.open_pairs(spec, x).fingerprint()["hash"] for x in options]
    (tmp_path / "set" / "1.wrong.txt").write_text("a fox")
    after = [sources.open_pairs(spec, x).fingerprint()["hash"] for x in options]
    assert before[0] == after[0] and len({*before, *after}) == 3
    (tmp_path / "set" / "1.wrong.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(base.BadSample, match="not UTF-8"):
        sources.open_pairs(spec, options[1])[1]


def shout(caption, tags, rng):
    return " ".join([caption.upper(), *tags])


def row_of(record, rng, **changes):
    config = loader.DataConfig(tokenizer="bytes", **{"negatives": 2, "negative_columns": ("x",)} | changes)
    transform = loader.Transform(config, 8, tokenizer.load("bytes"), 16, ("text", "negatives"))
    row = {name: np.full(shape, 7, dtype) for name, (shape, dtype) in transform.arrays(1).items()}
    transform(record, rng, row)
    return row["text"][0], row["negatives"][0]


def test_a_row_has_some_of_them_and_else_the_caption():
    rng = np.random.default_rng(0)
    tokens = tokenizer.load("bytes")(["dog", "cat", "fox", "cow"], 16)
    drawn = set()
    for _ in range(50):
        text, wrong = row_of({"id": "0", "text": ["dog"], "tags": [], "negatives": ["cat", "fox", "cow"]}, rng)
        np.testing.assert_array_equal(text, tokens[0])
        drawn.add(tuple(int(np.flatnonzero((tokens == one).all(axis=1))[0]) for one in wrong))
    assert drawn == {(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)}
    for given in ([], ["cat"]):
        _, wrong = row_of({"id": "0", "text": ["dog"], "tags": [], "negatives": given}, rng)
        np.testing.assert_array_equal(wrong, tokens[[1, 0] if given else [0, 0]])
    record = {"id": "0", "text": ["dog"], "tags": ["red"], "negatives": ["cat"]}  # red is right, and so no negative
    _, wrong = row_of(record, rng, negatives=1, caption_transform=f"{__name__}:shout:tags")
    np.testing.assert_array_equal(wrong, tokenizer.load("bytes")(["CAT"], 16))
    with pytest.raises(UserError, match=r"'0': its source gives no 'negatives'; set data\.negatives to 0"):
        row_of({"id": "0", "text": ["dog"], "tags": []}, rng)


def test_the_longest_text_of_a_pair_is_counted(tmp_path):
    changes = {f"data__{name}": value for name, value in COLUMNS.items()}
    made = build.build(tiny.config("clip", data__sources=(folder(tmp_path / "set"),), data__batch=8, **changes))
    opened = sources.open_sources(made.config.data)
    counts = prepare.count_lengths(made, opened)
    assert counts.tolist() == np.bincount([10, 7, 8], minlength=13).tolist()  # start, bytes and end
