import collections
import hashlib
import io
import itertools
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile

import fsspec
import numpy as np
import pytest
from absl import flags
from etils import epath

from tests import torture
from xclip_jax import storage
from xclip_jax.data import base, ledger, loader, sources, tar_headers, tar_index, tar_source, tokenizer, transforms
from xclip_jax.errors import BadSample, UserError


@pytest.fixture(scope="module")
def tortured(tmp_path_factory):
    """The pattern, what is good and what is bad."""
    folder = tmp_path_factory.mktemp("torture")
    good, bad = torture.make(folder)
    return f"{folder}/{{00..16}}.tar", good, bad


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two tars of 13 and 8 good pairs."""
    folder = tmp_path_factory.mktemp("plain")
    torture.pairs(folder / "0.tar", 0, 13)
    torture.pairs(folder / "1.tar", 13, 8)
    return f"{folder}/{{0..1}}.tar"


def config(**changes):
    return loader.DataConfig(**{"sources": ("x",), "batch": 8, "tokenizer": "bytes", "max_bad_fraction": 1.0} | changes)


def read(found, c, book=None, start=0, stop=5, length=300, **hosts):
    transform = loader.Transform(c, 8, tokenizer.load("bytes"), length)
    order = loader.sample_order(found, c, seed=3)
    return list(loader.batches(order, transform, batch=c.batch, start=start, stop=stop, seed=3, ledger=book, **hosts))


def texts(batches):
    rows = np.concatenate([b["text"] for b in batches])
    return [bytes(int(t) - 3 for t in row if t >= 3).decode("utf-8", "replace") for row in rows]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def name(entry):
    return entry["tar"].rpartition("/")[2], entry["key"]


def test_every_case_is_read_or_has_its_reason(tortured):
    pattern, good, bad = tortured
    source = tar_source.TarSource(pattern)
    found, faults = collections.Counter(), {}
    for i in range(len(source)):
        try:
            record = source[i]
            pixels = transforms.decode(record["image"])
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
            found[name(source.describe(i)), record["text"][0]] += 1
        except BadSample as error:
            assert name(source.describe(i)) not in faults
            faults[name(source.describe(i))] = error.reason
    assert faults == bad
    assert found == collections.Counter((place[:2], caption) for place, caption in good.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_delivers_each_good_one_once_and_writes_down_each_bad_one(tortured, tmp_path, workers):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers ask absl, which only app.run sets up
    pattern, good, bad = tortured
    source = tar_source.TarSource(pattern)
    n = len(source)
    c = config(batch=n, workers=workers)
    book = ledger.Ledger(epath.Path(tmp_path), max_bad_fraction=1.0)
    batches = read([source], c, book, stop=2)
    book.sync(2 * n)
    written = lines(tmp_path / "bad_samples.jsonl")
    assert {name(entry): entry["reason"] for entry in written} == bad
    assert len(written) == len(bad)
    order = loader.sample_order([source], c, seed=3)
    for epoch, batch in enumerate(batches):
        places = [order.places[epoch * n + i] for i in range(n)]
        delivered = collections.Counter(
            caption
            for (_, index), caption in zip(places, texts([batch]), strict=True)
            if name(source.describe(index)) not in bad
        )
        assert delivered == collections.Counter(caption.strip()[:298] for caption in good.values())
    assert book.counters["samples"] == 2 * n
    assert book.bad >= 2 * len(bad)  # replacements may be bad too
    assert set(book.counters["bad"]) == set(bad.values())


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_see_the_same_batches_and_replacements(tortured, plain, hosts):
    """Also with eight hosts on one tar, and across the end of an epoch."""
    for pattern in (tortured[0], plain.replace("{0..1}", "0")):
        source = tar_source.TarSource(pattern)
        stop = len(source) // 8 + 3
        book = ledger.Ledger(epath.Path("/nonexistent"), max_bad_fraction=1.0)
        whole = read([source], config(), book, stop=stop)
        parts = [read([source], config(), book, stop=stop, host=h, hosts=hosts) for h in range(hosts)]
        for g, batch in enumerate(whole):
            for key in batch:
                np.testing.assert_array_equal(np.concatenate([part[g][key] for part in parts]), batch[key])


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_resumed_on_other_hosts_as_if_never_stopped(tortured, tmp_path, hosts):
    """Stopped after a random step with a ledger that ran ahead; the rest, and the ledger, are those of one run."""
    source = tar_source.TarSource(tortured[0])
    at = int(np.random.default_rng(hosts).integers(1, 9))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    book = ledger.Ledger(epath.Path(whole), max_bad_fraction=1.0)
    batches = read([source], config(), book, stop=12)
    book.sync(96)
    killed = ledger.Ledger(epath.Path(cut), max_bad_fraction=1.0)
    read([source], config(), killed, stop=at)
    killed.sync(8 * at)
    counters = killed.counters
    read([source], config(), killed, start=at, stop=10)  # no checkpoint was made of these
    killed.sync(80)
    with (cut / "bad_samples.jsonl").open("a") as file:
        file.write('{"position": 3')  # killed while it wrote
    resumed = ledger.Ledger(epath.Path(cut), max_bad_fraction=1.0, start=8 * at, counters=counters)
    parts = [read([source], config(), resumed, start=at, stop=12, host=h, hosts=hosts) for h in range(hosts)]
    resumed._pending = type(resumed._pending)(sorted(resumed._pending, key=lambda noted: noted[0]))
    resumed.sync(96)
    for g, batch in enumerate(batches[at:]):
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([part[g][key] for part in parts]), batch[key])
    assert lines(cut / "bad_samples.jsonl") == lines(whole / "bad_samples.jsonl")
    assert resumed.counters == book.counters


def test_too_many_bad_samples_stop_the_run(tortured, tmp_path):
    source = tar_source.TarSource(tortured[0])
    book = ledger.Ledger(epath.Path(tmp_path), max_bad_fraction=0.01)
    read([source], config(), book)
    message = (
        r"of \d+ samples are bad, more than data\.max_bad_fraction=0\.01 allows \(.*is empty: \d.*bad_samples\.jsonl"
    )
    book.sync(40)
    with pytest.raises(UserError, match=message):
        book.check()
    assert lines(tmp_path / "bad_samples.jsonl")


def test_nothing_but_bad_samples_stop_the_run_at_once(tmp_path):
    torture.shard(tmp_path / "0.tar", [(str(i), {"jpg": b"<html>", "txt": b"x"}) for i in range(5)])
    source = tar_source.TarSource(f"{tmp_path}/0.tar")
    book = ledger.Ledger(epath.Path(tmp_path), max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"source 0 gave 100 bad samples in a row.*'not an image'"):
        read([source], config(), book)


def test_without_a_ledger_a_bad_sample_is_an_error(tortured):
    with pytest.raises(UserError, match="cannot be used"):
        read([tar_source.TarSource(tortured[0])], config(batch=64))


def test_captions_from_json(plain):
    spec, keys = f"tar:{plain}", ("text", "caption", "alts")
    source = sources.open_pairs(spec, base.SourceOptions(text_keys=keys, tags_key="nested/tag"))
    assert source[15]["text"] == ["picture 15", "json 15", "alt 15"]
    assert source[15]["tags"] == ["a", "b"]
    assert source[15]["id"].endswith("1.tar#000000015")
    alone = sources.open_pairs(spec, base.SourceOptions(text_keys=("caption",)))
    assert alone[0]["text"] == ["json 0"]
    with pytest.raises(BadSample, match="caption is empty"):
        sources.open_pairs(spec, base.SourceOptions(text_keys=("title",)))[0]


def test_json_that_is_nested_or_holds_half_a_letter(tmp_path):
    texts = ['"cut \\ud83d"', '"\\ud83d\\ude00"', '"\\ude00 \\ud83d"', "[" * 100_000, '{"a":' * 100_000]
    image = torture.jpeg(0)
    torture.shard(
        tmp_path / "0.tar",
        [(str(i), {"jpg": image, "json": b'{"caption": %s}' % text.encode()}) for i, text in enumerate(texts)],
    )
    source = tar_source.TarSource(str(tmp_path / "0.tar"), ("caption",))
    assert [source[i]["text"] for i in range(3)] == [["cut \ufffd"], ["😀"], ["\ufffd \ufffd"]]
    for i in (3, 4):
        with pytest.raises(BadSample, match="JSON file is damaged"):
            source[i]


def test_index_is_stored_once_and_follows_the_tar(tmp_path, monkeypatch):
    path = torture.pairs(tmp_path / "0.tar", 0, 3)
    assert len(tar_source.TarSource(str(path))) == 3
    [stored] = (tmp_path / ".xclip_index").iterdir()
    monkeypatch.setattr(tar_index, "index", lambda _: pytest.fail("indexed again"))
    assert len(tar_source.TarSource(str(path))) == 3
    monkeypatch.undo()
    torture.pairs(path, 0, 5)
    assert len(tar_source.TarSource(str(path))) == 5
    assert stored.exists()


def test_a_stored_index_that_is_damaged_is_made_again(tmp_path, monkeypatch):
    path = torture.pairs(tmp_path / "0.tar", 0, 3)
    expected = tar_source.TarSource(str(path))
    [stored] = (tmp_path / ".xclip_index").iterdir()
    whole, rng, indexed = stored.read_bytes(), np.random.default_rng(0), []
    index = tar_index.index
    monkeypatch.setattr(tar_index, "index", lambda path: indexed.append(path) or index(path))
    damaged = [b"", b"x", whole[:100], whole[:-1], whole + b"x", bytes(len(whole)), whole[:-16], rng.bytes(300)]
    for at in rng.integers(len(whole), size=40):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
    for number, content in enumerate(damaged, 1):
        stored.unlink()  # else it would change under the maps of the source before
        stored.write_bytes(content)
        source = tar_source.TarSource(str(path))
        assert [source[i] for i in range(3)] == [expected[i] for i in range(3)]
        assert len(indexed) == number
        assert stored.read_bytes() == whole
    stored.unlink()
    stored.mkdir()
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    assert len(tar_source.TarSource(str(path))) == 3
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("fault", 7), ("fault", 255), ("image_size", 1 << 31), ("json_size", 1 << 30), ("text", (1 << 64) - 1)],
)
def test_an_index_that_came_with_its_tar_is_not_believed(field, value, tmp_path):
    path = torture.pairs(tmp_path / "0.tar", 0, 3)
    expected = tar_source.TarSource(str(path))
    [stored] = (tmp_path / ".xclip_index").iterdir()
    rows = np.load(stored).copy()
    rows[field][1] = value
    content = io.BytesIO()
    np.save(content, rows)
    stored.unlink()
    stored.write_bytes(content.getvalue() + hashlib.blake2b(content.getvalue(), digest_size=16).digest())
    assert tar_index.read(stored) is None
    source = tar_source.TarSource(str(path))
    assert [source[i] for i in range(3)] == [expected[i] for i in range(3)]


def test_an_index_whose_header_is_damaged_is_not_read(tmp_path):
    path = tmp_path / "x.npy"
    for header in (
        b"{'descr': (",
        b"{" * 5000,
        b"\xff" * 60,
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    ):
        data = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header
        path.write_bytes(data + hashlib.blake2b(data, digest_size=16).digest())
        assert tar_index.read(path) is None


def test_names_that_lead_elsewhere_are_names_alone(tmp_path, monkeypatch):
    """Nothing is unpacked: absolute names, "..", links and devices open no file but the tar."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "data").mkdir()
    image, path = torture.jpeg(1), tmp_path / "data" / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key in (f"{tmp_path}/secret", "../secret", "../../x/../y", "a/../../b"):
            torture.add(tar, f"{key}.jpg", image)
            torture.add(tar, f"{key}.txt", b"its own caption")
        torture.add(tar, "link.jpg", image)
        torture.add(tar, "link.txt", b"", type=tarfile.SYMTYPE, linkname="../secret.txt")
        torture.add(tar, "hard.jpg", image)
        torture.add(tar, "hard.txt", b"", type=tarfile.LNKTYPE, linkname=f"{tmp_path}/secret.txt")
        torture.add(tar, "device.jpg", b"", type=tarfile.CHRTYPE)
        torture.add(tar, "device.txt", b"a device")
        torture.add(tar, "pipe.jpg", b"", type=tarfile.FIFOTYPE)
        torture.add(tar, "pipe.txt", b"a pipe")
    source = tar_source.TarSource(str(path))
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
    assert reasons == dict.fromkeys(("link", "hard"), "no caption file") | dict.fromkeys(
        ("device", "pipe"), "no image file"
    )
    assert set(map(str, opened)) <= {str(path)}
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".npy") == ["0.tar", "secret.txt"]


def test_index_beside_read_only_data_goes_to_the_cache(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path = torture.pairs(tmp_path / "data" / "0.tar", 0, 3)
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    writable = storage.writable
    monkeypatch.setattr(storage, "writable", lambda folder: folder.name != ".xclip_index" and writable(folder))
    assert len(tar_source.TarSource(str(path))) == 3
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["0.tar"]
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


def test_index_in_processes_is_that_of_one(tmp_path, capfd):
    paths = [str(torture.pairs(tmp_path / f"{i}.tar", 10 * i, 4)) for i in range(5)]
    places = tar_index.load(paths, processes=2)
    for path, place in zip(paths, places, strict=True):
        np.testing.assert_array_equal(np.load(place), tar_index.index(path))
    assert "indexed 5 tars in" in capfd.readouterr().out
    os.unlink(paths[0])
    with pytest.raises(UserError, match=r"names do not exist, the first is .*0\.tar"):
        tar_source.TarSource(f"{tmp_path}/{{0..4}}.tar")


def test_names_with_line_breaks(tmp_path):
    paths = [str(torture.pairs(tmp_path / f"a\n{i}\udcff.tar", 0, 1)) for i in range(3)]
    assert [len(np.load(place)) for place in tar_index.load(paths, processes=2)] == [1, 1, 1]


@pytest.mark.parametrize(
    "size",
    [
        b"-0000001000\0",
        b"+0000001000\0",
        b"0000_001000\0",
        b"0o000001000\0",
        b"00000010 00\0",
        b"99999999999\0",
        b"\xff" * 12,
        b"\xff" * 11 + b"\0",
        b"\xc0" + bytes(11),
        b"\x80" + b"\xff" * 11,
        b"-1\0".ljust(12, b"\0"),
    ],
)
def test_a_header_with_an_odd_size_neither_hangs_the_index_nor_ends_it(size, tmp_path):
    path = torture.shard(tmp_path / "x.tar", [(key, {"jpg": b"x" * 600, "txt": b"y"}) for key in ("a", "b", "c")])
    with tarfile.open(path) as tar:
        at = tar.getmember("b.jpg").offset
    data = bytearray(path.read_bytes())
    data[at + 124 : at + 136] = size
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 512]) - sum(data[at + 148 : at + 156]) + 8 * 32)
    path.write_bytes(data)
    names = [name for name, *_ in itertools.islice(tar_headers.members(str(path), len(data)), 20)]
    assert names[:2] == [b"a.jpg", b"a.txt"] and len(names) < 20
    rows = tar_index.index(str(path))
    assert rows["key"][0] == b"a" and rows["fault"][0] == tar_index.OK


def test_a_long_number_in_an_extended_header(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        torture.add(tar, "a.jpg", torture.jpeg(0), pax_headers={"size": "9" * 5000})
        torture.add(tar, "a.txt", b"caption")
    assert tar_index.index(str(tmp_path / "x.tar"))["fault"][0] == tar_index.OK


def test_index_agrees_with_tarfile(tortured):
    for path in storage.expand(tortured[0])[:8]:
        with tarfile.open(path) as tar:
            there = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
        here = [(n.decode(), offset, size) for n, offset, size in tar_headers.members(path, os.path.getsize(path))]
        assert here == there


def test_a_source_travels_to_workers_without_its_arrays(plain):
    source = tar_source.TarSource(plain)
    data = pickle.dumps(source)
    assert len(data) < 2000
    assert pickle.loads(data)[20] == source[20]
    with pytest.raises(IndexError):
        source[21]


def test_a_tar_that_shrinks_while_it_is_read(tmp_path):
    path = torture.pairs(tmp_path / "0.tar", 0, 3)
    source = tar_source.TarSource(str(path))
    os.truncate(path, 1000)
    with pytest.raises(BadSample, match="tar cut off"):
        source[2]


def test_patterns():
    assert storage._split("a,{b,c}d,e") == ["a", "{b,c}d", "e"]
    assert list(storage._braces("x{08..11}y{a,b{1..2}}")) == [
        f"x{i}y{j}" for i in ("08", "09", "10", "11") for j in ("a", "b1", "b2")
    ]
    assert list(storage._braces("{2..0}")) == ["2", "1", "0"]
    assert list(storage._braces("{9..10}")) == ["9", "10"]
    with pytest.raises(UserError, match="do not match"):
        storage.expand("a{b,c")
    with pytest.raises(UserError, match=r"no file matches '/nowhere/\*\.tar'"):
        storage.expand("/nowhere/*.tar")


def test_globs_and_lists(plain):
    folder = plain.rpartition("/")[0]
    both = [f"{folder}/0.tar", f"{folder}/1.tar"]
    assert storage.expand(f"{folder}/*.tar") == both
    assert storage.expand(f"{folder}/1.tar,{folder}/*.tar") == both[::-1]


def test_no_sample_at_all(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"names 1 tars and none contains a whole sample \(tar without samples\)"):
        tar_source.TarSource(str(tmp_path / "0.tar"))


def test_remote_tars_are_read_alike(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for path in storage.expand(plain):
        memory.pipe_file("/tars/" + path.rpartition("/")[2], pathlib.Path(path).read_bytes())
    here, there = tar_source.TarSource(plain), tar_source.TarSource("memory://tars/*.tar")
    assert len(there) == len(here) == 21
    for i in (0, 12, 13, 20):
        assert {**here[i], "id": ""} == {**there[i], "id": ""}
    assert here.fingerprint()["hash"] == there.fingerprint()["hash"]


def test_indexing_command(plain, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "xclip_jax.data.tar_index", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    done = run(f"{tmp_path}/x.tar")
    assert done.returncode == 1
    assert done.stderr == f"error: no file or folder '{tmp_path}/x.tar'; check the path.\n"
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m xclip_jax.data.tar_index [-h] pattern")
    done = run()
    assert (done.returncode, done.stderr) == (1, "error: the following arguments are required: pattern; see --help\n")
    torture.pairs(tmp_path / "x.tar", 0, 2)
    assert run(f"{tmp_path}/x.tar").stdout.endswith("s\n")
    assert len(list((tmp_path / ".xclip_index").iterdir())) == 1
