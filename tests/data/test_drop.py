"""Captions that `xclip-jax check --suspects` lists and training leaves out."""

import itertools
import json
import pathlib
import zlib

import numpy as np
import pytest

from tests.data.test_loader import texts
from tests.helpers import tiny
from tests.helpers.bad_tars import plain  # noqa: F401
from xclip_jax.commands import check
from xclip_jax.config.schema import resolve
from xclip_jax.core.errors import UserError
from xclip_jax.data import loader, sources, tokenizer
from xclip_jax.data.config import DataConfig
from xclip_jax.model import ZeroShotResult
from xclip_jax.objectives.similarity import CosineSimilarity
from xclip_jax.train import prepare
from xclip_jax.train.run_writer import RunWriter

LIMIT = 1e-4


def wrong(caption):
    return zlib.crc32(caption.encode()) % 3 == 0


class Judge:
    """A model that finds wrong captions far less likely than a random one, whatever the image."""

    similarities = (CosineSimilarity(),)

    def zero_shot(self, images, names, templates, by):
        p = np.array([[1e-6 if wrong(name) else 0.5 for name in names]] * len(images)) / len(names)
        return ZeroShotResult([names[0]] * len(images), p, p)


@pytest.fixture(autouse=True)
def judge(monkeypatch):
    monkeypatch.setattr(check.inference, "load", lambda path, trust: Judge())


def suspects(source, out):
    check.main([source, "--samples", "0", "--by", "a/run", "--suspects", str(out), "--tokenizer", "bytes"])
    return str(out)


def config(*specs, **changes):
    return DataConfig(**{"sources": specs, "batch": 4, "drop_threshold": LIMIT} | changes)


def captions(opened):
    found = []
    for source in opened:
        for record in map(source.__getitem__, range(len(source))):
            columns = record.get("columns", [0] * len(record["text"]))
            found += zip(itertools.repeat(record["id"]), record["text"], columns, strict=False)
    return found


@pytest.mark.parametrize("kind", ["folder", "csv", "tar", "tfds"])
def test_each_kind_of_source(kind, pairs, table_of_pairs, plain, tmp_path):  # noqa: F811
    spec, image, text = {
        "folder": (f"folder:{pairs}", "image", ("text",)),
        "csv": (f"csv:{table_of_pairs}", "file", ("words",)),
        "tar": (f"tar:{plain}", "image", ("text", "caption")),
        "tfds": ("demo:train[:20]", "image", ("name", "aliases")),
    }[kind]
    c = config(spec, image_column=image, text_columns=text)
    file = suspects(f"{spec},image={image},text={','.join(text)}", tmp_path / "all.jsonl")
    (whole,) = sources.open_sources(c)
    (part,) = sources.open_sources(config(spec, image_column=image, text_columns=text, drop=file))
    expected = [row for row in captions([whole]) if not wrong(row[1])]
    assert captions([part]) == expected and len(part) == len({name for name, *_ in expected}) < len(whole)
    if kind != "csv":  # some records keep a part of their captions
        assert len(captions([whole])) - len(expected) > len(whole) - len(part)
    own = part.fingerprint()
    assert own.pop("data.drop") and own == whole.fingerprint() | {"samples": len(part)}


def test_several_sources_with_pairs_held_out(pairs, table_of_pairs, tmp_path):
    """What is held out stays, and each epoch has each other record once, from any start."""
    specs = (f"folder:{pairs}", f"csv:{table_of_pairs}")
    columns = {"image_column": "file", "text_columns": ("words",), "holdout": 0.25}
    files = [suspects(f"{spec},image=file,text=words", tmp_path / f"{i}.jsonl") for i, spec in enumerate(specs)]
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join(pathlib.Path(file).read_text() for file in files))  # with an empty line
    c = config(*specs, drop=str(both), **columns)
    opened = sources.open_sources(c)
    before = sources.open_sources(config(*specs, **columns))
    assert captions(opened) == [row for row in captions(before) if not wrong(row[1])]
    order = loader.sample_order(opened, c, seed=3)
    n = sum(map(len, opened))
    places = [(number, index) for number, source in enumerate(opened) for index in range(len(source))]
    for epoch in range(3):
        assert sorted(order.locate(epoch * n + i) for i in range(n)) == places
    transform = loader.Transform(c, 8, tokenizer.load("bytes"), 24)
    first, later = (
        list(loader.batches(loader.sample_order(sources.open_sources(c), c, seed=3), transform, **limits, seed=3))
        for limits in ({"batch": 8, "start": 0, "stop": 6}, {"batch": 8, "start": 4, "stop": 6})
    )
    for a, b in zip(first[4:], later, strict=True):
        np.testing.assert_array_equal(a["text"], b["text"])
    assert not any(map(wrong, texts(first)))


def test_clusters_drop_what_has_a_higher_cross_entropy(pairs, tmp_path):
    file = suspects(f"folder:{pairs}", tmp_path / "all.jsonl")
    lines = [json.loads(line) for line in pathlib.Path(file).read_text().splitlines()]
    for line in lines:
        line["cross_entropy"] = 9.0 if line.pop("probability") < LIMIT else 3.0
    (tmp_path / "clusters.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {"drop": str(tmp_path / "clusters.jsonl"), "drop_threshold": 5.0}
    by_probability, by_clusters = (
        sources.open_sources(config(f"folder:{pairs}", **x)) for x in ({"drop": file}, changes)
    )
    assert captions(by_probability) == captions(by_clusters)
    # Without a threshold, a file of few lines lists all that is left out.
    (tmp_path / "two.jsonl").write_text("\n".join(pathlib.Path(file).read_text().splitlines()[:2]))
    (part,) = sources.open_sources(config(f"folder:{pairs}", drop=str(tmp_path / "two.jsonl"), drop_threshold=0.0))
    assert len(captions([part])) == len(lines) - 2


def test_files_that_do_not_fit(pairs, table_of_pairs, tmp_path):
    file = suspects(f"folder:{pairs}", tmp_path / "all.jsonl")
    other = suspects(f"csv:{table_of_pairs},image=file,text=words", tmp_path / "other.jsonl")
    (tmp_path / "text.jsonl").write_text("000.png\n")
    spec = f"folder:{pairs}"
    for changes, named in (
        ({"drop": str(tmp_path / "none.jsonl")}, r"none\.jsonl.* --suspects on data\.sources, .*FileNotFoundError"),
        ({"drop": str(tmp_path / "text.jsonl")}, r"text\.jsonl.* --suspects"),
        ({"drop": other}, r"other\.jsonl.* --suspects on data\.sources, .*:words'"),
        ({"drop": file, "text_columns": ("title",)}, r"all\.jsonl.*text=COLUMN.*:title'.*:text'"),
        ({"drop": file, "drop_threshold": 1e-12}, r"all\.jsonl' leave 40 of the 40.*data\.drop_threshold"),
        ({"drop": file, "drop_threshold": 0.0}, r"all\.jsonl' leave 0 of the 40"),
    ):
        with pytest.raises(UserError, match=named):
            sources.open_sources(config(spec, **changes))


def test_a_resumed_run_needs_the_same_captions_at_any_path(pairs, tmp_path):
    """Also if the number of pairs stays, since each has another caption."""
    file = tmp_path / "all.jsonl"
    suspects(f"folder:{pairs}", file)
    entries = map(json.loads, file.read_text().splitlines())
    lines = [json.dumps(line) for line in {line["index"]: line for line in entries if line["captions"] == 2}.values()]
    file.write_text("\n".join(lines))

    def prepared(drop):
        keys = {"data__drop": str(drop), "data__batch": 8}
        return prepare.prepare(resolve(tiny.short(pairs, tmp_path / "run", **keys)), RunWriter(tmp_path / "run"))[0]

    run = prepared(file)
    assert run.num_samples == 40 and len(lines) == 14
    with run.folder.claimed(run.config, run.fingerprints):
        (run.folder.checkpoints / "2").mkdir(parents=True)
    moved = file.rename(tmp_path / "moved.jsonl")
    again = prepared(moved)
    assert [again.order.locate(i) for i in range(99)] == [run.order.locate(i) for i in range(99)]
    file.write_text("\n".join(lines[1:]))
    for other in (file, ""):
        with pytest.raises(UserError, match=r"source 0, .* has changed"):
            prepared(other)


def test_addresses_in_captions_lose_their_secrets_in_the_file_alone(tmp_path):
    folder = tiny.folder(tmp_path / "pairs", 9)
    (folder / "004.txt").write_text("one\nhttps://host/a.jpg?signature=secret\n")
    file = pathlib.Path(suspects(f"folder:{folder}", tmp_path / "all.jsonl"))
    lines = [line for line in file.read_text().splitlines() if "https://host" in line]
    assert len(lines) == 1 and "secret" not in lines[0]
    file.write_text(lines[0])
    (part,) = sources.open_sources(config(f"folder:{folder}", drop=str(file), drop_threshold=0.0))
    assert len(part) == 9 and part[4]["text"] == ["one"]


def test_weights_and_negatives_of_a_run(tmp_path):
    """The files of negatives belong to a folder's fingerprint."""
    folder = tiny.folder(tmp_path / "pairs", 9)
    (folder / "004.wrong.txt").write_text("a fox")
    keys = {"text_columns": ("text:0.5",), "negatives": 1, "negative_columns": ("wrong",)}
    file = suspects(f"folder:{folder},text=text:0.5,negatives=wrong", tmp_path / "all.jsonl")
    (whole,) = sources.open_sources(config(f"folder:{folder}", **keys))
    (part,) = sources.open_sources(config(f"folder:{folder}", drop=file, **keys))
    assert captions([part]) == [row for row in captions([whole]) if not wrong(row[1])] != captions([whole])
