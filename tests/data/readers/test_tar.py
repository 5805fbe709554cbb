"""Pairs in tars: what is good is read, what is bad has its reason, on any number of hosts and after a resume."""

import collections
import os
import pathlib
import resource
import tarfile

import fsspec
import numpy as np
import pytest
from etils import epath

from tests.data.test_loader import config, read
from tests.helpers import bad_tars, tiny
from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, images, ledger, sources
from xclip_jax.data.readers.tar import TarSource

tortured, plain = bad_tars.tortured, bad_tars.plain


def log(folder, **options):
    return ledger.BadSampleLog(epath.Path(folder), **{"max_bad_fraction": 1.0} | options)


def assert_parts(parts, batches):
    for g, batch in enumerate(batches):
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([part[g][key] for part in parts]), batch[key])


def name(entry):
    return entry["tar"].rpartition("/")[2], entry["key"]


def test_every_case_is_read_or_has_its_reason(tortured):
    pattern, good, bad = tortured
    source = TarSource(pattern)
    found, faults = collections.Counter(), {}
    for i in range(len(source)):
        try:
            record = source[i]
            pixels = images.decode(record["image"])
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
            found[name(source.describe(i)), record["text"][0]] += 1
        except BadSample as error:
            assert name(source.describe(i)) not in faults
            faults[name(source.describe(i))] = error.reason
    assert faults == bad
    assert found == collections.Counter((place[:2], caption) for place, caption in good.items())


@pytest.mark.parametrize("hosts", [1, 4])
def test_resumed_on_other_hosts_as_if_never_stopped(tortured, tmp_path, hosts):
    """Stopped after a random step with a ledger that ran ahead; the rest, and the ledger, are those of one run."""
    source = TarSource(tortured[0])
    at = int(np.random.default_rng(hosts).integers(1, 9))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    book = log(whole)
    batches = read([source], config(), stop=12, ledger=book)
    book.sync(96)
    killed = log(cut)
    read([source], config(), stop=at, ledger=killed)
    killed.sync(8 * at)
    counters = killed.counters
    read([source], config(), start=at, stop=10, ledger=killed)  # no checkpoint was made of these
    killed.sync(80)
    with (cut / "bad_samples.jsonl").open("a") as file:
        file.write('{"position": 3')  # killed while it wrote
    resumed = log(cut, start=8 * at, counters=counters)
    parts = [read([source], config(), start=at, stop=12, ledger=resumed, host=h, hosts=hosts) for h in range(hosts)]
    resumed._pending = type(resumed._pending)(sorted(resumed._pending, key=lambda noted: noted[0]))
    resumed.sync(96)
    assert_parts(parts, batches[at:])
    assert tiny.lines(cut, "bad_samples.jsonl") == tiny.lines(whole, "bad_samples.jsonl")
    assert resumed.counters == book.counters


def test_too_many_bad_samples_stop_the_run(tortured, tmp_path):
    source = TarSource(tortured[0])
    book = log(tmp_path, max_bad_fraction=0.01)
    read([source], config(), ledger=book)
    book.sync(40)
    with pytest.raises(UserError, match=r"data\.max_bad_fraction=0\.01 .*bad_samples\.jsonl"):
        book.check()
    assert tiny.lines(tmp_path, "bad_samples.jsonl")
    with pytest.raises(UserError, match="cannot be used"):  # at once without a ledger
        read([source], config(batch=64))
    bad_tars.shard(tmp_path / "0.tar", [(str(i), {"jpg": b"<html>", "txt": b"x"}) for i in range(5)])
    with pytest.raises(UserError, match=r"source 0 .*'not an image'"):  # and where nothing else is there
        read([TarSource(f"{tmp_path}/0.tar")], config(), ledger=log(tmp_path))


def test_captions_from_json(plain, tmp_path):
    spec, keys = f"tar:{plain}", ("text", "caption", "alts")
    source = sources.open_pairs(spec, base.SourceOptions(text_columns=keys, tags_key="nested/tag"))
    assert source[15]["text"] == ["picture 15", "json 15", "alt 15"] and source[15]["tags"] == ["a", "b"]
    assert source[15]["id"].endswith("1.tar#000000015")
    assert sources.open_pairs(spec, base.SourceOptions(text_columns=("caption",)))[0]["text"] == ["json 0"]
    with pytest.raises(BadSample, match="caption is empty"):
        sources.open_pairs(spec, base.SourceOptions(text_columns=("title",)))[0]
    # Lists of objects, and keywords between commas, as in tables.
    fields = b'{"captions": [{"text": "a fox"}, {"text": "red fur"}], "tags": "cat, dog,, grass", "all": ["a, b", "c"]}'
    bad_tars.shard(tmp_path / "0.tar", [("a", {"jpg": bad_tars.jpeg(0), "json": fields})])
    for key, tags in (("tags", ["cat", "dog", "grass"]), ("all", ["a, b", "c"])):
        options = base.SourceOptions(text_columns=("captions/text",), tags_key=key)
        record = TarSource(str(tmp_path / "0.tar"), options)[0]
        assert record["text"] == ["a fox", "red fur"] and record["tags"] == tags
    # "text" is the caption's file only for captions.
    content = {"jpg": bad_tars.jpeg(0), "txt": b"a fox", "json": b'{"text": "a hen"}'}
    bad_tars.shard(tmp_path / "1.tar", [("a", content)])
    record = TarSource(str(tmp_path / "1.tar"), base.SourceOptions(tags_key="text", negative_columns=("text",)))[0]
    assert (record["text"], record["tags"], record["negatives"]) == (["a fox"], ["a hen"], ["a hen"])


def test_json_that_is_nested_or_holds_half_a_letter(tmp_path):
    texts = ['"cut \\ud83d"', '"\\ud83d\\ude00"', '"\\ude00 \\ud83d"', "[" * 100_000, '{"a":' * 100_000]
    samples = [{"jpg": bad_tars.jpeg(0), "json": b'{"caption": %s}' % text.encode()} for text in texts]
    bad_tars.shard(tmp_path / "0.tar", [(str(i), sample) for i, sample in enumerate(samples)])
    source = TarSource(str(tmp_path / "0.tar"), base.SourceOptions(text_columns=("caption",)))
    assert [source[i]["text"] for i in range(3)] == [["cut \ufffd"], ["😀"], ["\ufffd \ufffd"]]
    for i in (3, 4):
        with pytest.raises(BadSample, match="JSON file is damaged"):
            source[i]


def test_names_that_lead_elsewhere_are_names_alone(tmp_path, monkeypatch):
    """Nothing is unpacked: absolute names, "..", links and devices open no file but the tar."""
    for name in ("secret", "other"):
        (tmp_path / f"{name}.txt").write_text("secret")
    (tmp_path / "data").mkdir()
    image, path = bad_tars.jpeg(1), tmp_path / "data" / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key in (f"{tmp_path}/secret", "../secret", "../../x/../y", "a/../../b"):
            bad_tars.add(tar, f"{key}.jpg", image)
            bad_tars.add(tar, f"{key}.txt", b"its own caption")
        bad_tars.add(tar, "link.jpg", image)
        bad_tars.add(tar, "link.txt", b"", type=tarfile.SYMTYPE, linkname="../other.txt")
        bad_tars.add(tar, "hard.jpg", image)
        bad_tars.add(tar, "hard.txt", b"", type=tarfile.LNKTYPE, linkname=f"{tmp_path}/other.txt")
        for key, kind in (("device", tarfile.CHRTYPE), ("pipe", tarfile.FIFOTYPE)):
            bad_tars.add(tar, f"{key}.jpg", b"", type=kind)
            bad_tars.add(tar, f"{key}.txt", b"a caption")
    source = TarSource(str(path))
    opened, opens = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *args, **options: opened.append(path) or opens(path, *args, **options))
    reasons = {}
    for i in range(len(source)):
        try:
            record = source[i]
            assert record["text"] == ["its own caption"] and record["image"] == image
        except BadSample as error:
            reasons[source.describe(i)["key"]] = error.reason
    assert len(source) == 8
    links, others = dict.fromkeys(("link", "hard"), "no caption file"), ("device", "pipe")
    assert reasons == links | dict.fromkeys(others, "no image file")
    assert set(map(str, opened)) <= {str(path)}
    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".npy")
    assert left == ["0.tar", "other.txt", "secret.txt"]


def test_a_tar_that_shrinks_while_it_is_read(tmp_path):
    path = bad_tars.pairs(tmp_path / "0.tar", 0, 3)
    source = TarSource(str(path))
    os.truncate(path, 1000)
    with pytest.raises(BadSample, match="tar cut off"):
        source[2]


def test_a_tar_that_is_replaced_while_it_is_read_is_read_on(tmp_path):
    path = bad_tars.pairs(tmp_path / "0.tar", 0, 3)
    source = TarSource(str(path))
    expected, before = [source[i] for i in range(3)], source.fingerprint()
    os.replace(bad_tars.pairs(tmp_path / "other.tar", 7, 3), path)
    assert [source[i] for i in range(3)] == expected
    renewed = TarSource(str(path))
    assert renewed.fingerprint() != before  # which a run that resumes compares
    assert renewed[0]["image"] == bad_tars.jpeg(7) != expected[0]["image"]
    path.unlink()
    assert [source[i] for i in range(3)] == expected


def test_a_tar_that_is_overwritten_while_it_is_read_gives_reasons(tmp_path):
    path = bad_tars.pairs(tmp_path / "0.tar", 0, 3)
    source = TarSource(str(path))
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    with pytest.raises(BadSample, match="caption is not text"):
        source[0]


def test_no_sample_at_all(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.tar' .*tar without samples"):
        TarSource(str(tmp_path / "0.tar"))


def test_remote_tars_are_read_alike(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for path in storage.expand(plain):
        memory.pipe_file("/tars/" + path.rpartition("/")[2], pathlib.Path(path).read_bytes())
    here, there = TarSource(plain), TarSource("memory://tars/*.tar")
    assert len(there) == len(here) == 21
    for i in (0, 12, 13, 20):
        assert {**here[i], "id": ""} == {**there[i], "id": ""}
    assert here.fingerprint()["hash"] == there.fingerprint()["hash"]


def test_more_tars_than_the_limit_of_open_files_are_read(tmp_path):
    for i in range(60):
        bad_tars.shard(tmp_path / f"{i:02d}.tar", [("a", {"jpg": b"x", "txt": b"caption"})])
    source = TarSource(str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, limits[1]))
        source = TarSource(str(tmp_path))
        assert len(source) == 60 and all(source[i]["text"] for i in range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
