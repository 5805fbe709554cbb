"""The index of a tar: what it holds, where it is stored, and when it is not believed."""

import itertools
import os
import tarfile

import numpy as np
import pytest

from tests.helpers import bad_tars, bucket, web
from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.readers import tar_index
from xclip_jax.data.readers.tar import TarSource

tortured = bad_tars.tortured
HEADER = b"{'descr': '%s', 'fortran_order': False, 'shape': (1,), }"


@pytest.fixture
def indexed(monkeypatch):
    """Paths of the tars that are indexed in this process."""
    paths, index = [], tar_index.index
    monkeypatch.setattr(tar_index, "index", lambda path: paths.append(path) or index(path))
    return paths


def test_index_is_stored_once_and_follows_the_tar(tmp_path, indexed):
    path = bad_tars.pairs(tmp_path / "0.tar", 0, 3)
    assert len(TarSource(str(path))) == len(TarSource(str(path))) == 3
    [stored] = (tmp_path / ".xclip_index").iterdir()
    assert len(indexed) == 1
    bad_tars.pairs(path, 0, 5)
    assert len(TarSource(str(path))) == 5
    assert stored.exists()


def test_a_stored_index_that_is_damaged_is_made_again(tmp_path, monkeypatch, indexed):
    path = bad_tars.pairs(tmp_path / "0.tar", 0, 3)
    expected = TarSource(str(path))
    [stored] = (tmp_path / ".xclip_index").iterdir()
    whole, rng = stored.read_bytes(), np.random.default_rng(0)
    damaged = [b"", b"x", whole[:100], whole[:-1], bytes(len(whole)), rng.bytes(300)]
    for header in (b"{'descr': (", b"{" * 5000, b"\xff" * 60, HEADER % b"|O", HEADER % b"<f4"):
        damaged.append(b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + bytes(4))
    for content in damaged:
        stored.unlink()  # else it would change under the maps of the source before
        stored.write_bytes(content)
        assert tar_index.read(stored) is None
    source = TarSource(str(path))
    assert [source[i] for i in range(3)] == [expected[i] for i in range(3)]
    assert len(indexed) == 2 and stored.read_bytes() == whole
    stored.unlink()
    stored.mkdir()
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    assert len(TarSource(str(path))) == 3
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    with pytest.raises(UserError, match=r"none\.tar'.* XCLIP_CACHE"):
        tar_index.build(f"{tmp_path}/none.tar")


@pytest.mark.parametrize("writable", [True, False])
def test_hosts_share_indexes_in_a_bucket_that_they_may_write(writable, tmp_path, monkeypatch, indexed):
    bucket.register()
    system, _ = storage.file_system("s3://pairs")
    monkeypatch.setattr(bucket.Bucket, "writes", 0)
    tars = [f"s3://pairs/{i}.tar" for i in range(2)]
    for i, tar in enumerate(tars):
        system.pipe_file(tar, bad_tars.pairs(tmp_path / f"{i}.tar", 0, 3 + i).read_bytes())
    monkeypatch.setattr(bucket.Bucket, "away", not writable)
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "first"))
    first = tar_index.load(tars)
    for pattern in ("s3://pairs/*", "s3://pairs/**"):  # passes over the indexes
        assert [name.replace(":///", "://") for name in tar_index.find(pattern)] == tars
    shared = system.glob("s3://pairs/.xclip_index/*.npy")
    assert len(shared) == (2 if writable else 0)
    if writable:
        monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "second"))
        system.pipe_file(shared[0], b"damaged")
        indexed.clear()
        second = tar_index.load(tars)
        assert indexed == tars[:1] and len(system.cat_file(shared[0])) > 100  # the damaged one is written again
        for one, other in zip(first, second, strict=True):
            assert one != other and one.read_bytes() == other.read_bytes()
    system.rm("s3://pairs", recursive=True)


def test_requests_for_an_index_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path))
    with web.serve() as site:
        site.files["0.tar"] = bad_tars.pairs(tmp_path / "0.tar", 0, 3).read_bytes()
        site.statuses["0.tar"] = [503, 503, 0, 0, 503]  # HEAD and GET for the size, HEAD twice; the content
        assert len(TarSource(site.url("0.tar"))) == 3 and not site.statuses["0.tar"]


def test_a_link_has_the_content_of_its_file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(bad_tars.jpeg(0))
    (folder / "a.txt").write_text("a fox")
    for suffix in ("jpg", "txt"):
        os.link(folder / f"a.{suffix}", folder / f"b.{suffix}")
    (folder / "c.jpg").symlink_to("a.jpg")
    (folder / "c.txt").symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"./{path.name}")
    source = TarSource(f"{tmp_path}/x.tar")
    assert [source.describe(i)["key"] for i in range(len(source))] == ["a", "b", "c"]
    assert [source[i]["text"] for i in (0, 1)] == [["a fox"]] * 2
    assert source[0]["image"] == source[1]["image"] == bad_tars.jpeg(0)
    with pytest.raises(BadSample, match="no caption file"):
        source[2]


def test_a_tar_with_a_long_name(tmp_path):
    path = bad_tars.pairs(tmp_path / f"{'x' * 251}.tar", 0, 3)
    assert len(TarSource(str(path))) == len(TarSource(str(path))) == 3


def test_a_named_pipe_is_no_tar(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"x\.tar' cannot be indexed; .*not a regular file"):
        TarSource(str(tmp_path))


def test_names_with_line_breaks(tmp_path, capfd):
    """So many tars that processes index them."""
    tars = [str(bad_tars.pairs(tmp_path / f"a\n{i}\udcff.tar", 10 * i, 1)) for i in range(8)]
    for path, place in zip(tars, tar_index.load(tars), strict=True):
        np.testing.assert_array_equal(np.load(place), tar_index.index(path))
    assert "indexed 8 tars in" in capfd.readouterr().out


@pytest.mark.parametrize(
    "size", [b"-0000001000\0", b"0000_001000\0", b"99999999999\0", b"\xff" * 12, b"\x80" + b"\xff" * 11]
)
def test_a_header_with_an_odd_size_neither_hangs_the_index_nor_ends_it(size, tmp_path):
    path = bad_tars.shard(tmp_path / "x.tar", [(key, {"jpg": b"x" * 600, "txt": b"y"}) for key in ("a", "b", "c")])
    with tarfile.open(path) as tar:
        at = tar.getmember("b.jpg").offset
    data = bytearray(path.read_bytes())
    data[at + 124 : at + 136] = size
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 512]) - sum(data[at + 148 : at + 156]) + 8 * 32)
    path.write_bytes(data)
    names = [name for name, *_ in itertools.islice(tar_index.members(str(path), len(data)), 20)]
    assert names[:2] == [b"a.jpg", b"a.txt"] and len(names) < 20
    rows = tar_index.index(str(path))
    assert rows["key"][0] == b"a" and rows["fault"][0] == tar_index.OK


def test_a_long_number_in_an_extended_header(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        bad_tars.add(tar, "a.jpg", bad_tars.jpeg(0), pax_headers={"size": "9" * 5000})
        bad_tars.add(tar, "a.txt", b"caption")
    assert tar_index.index(str(tmp_path / "x.tar"))["fault"][0] == tar_index.OK


def test_a_damaged_header_behind_an_extended_one_costs_one_sample(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(20):  # webdataset writes fractions of a second, and so an extended header for each file
            bad_tars.add(tar, f"{i:02}.jpg", b"x" * 600, mtime=i + 0.5)
            bad_tars.add(tar, f"{i:02}.txt", b"caption", mtime=i + 0.5)
    with tarfile.open(path) as tar:
        header = tar.getmember("05.jpg").offset_data - 512
    with path.open("r+b") as file:
        file.seek(header)
        file.write(bytes(512))
    faults = tar_index.index(str(path))["fault"].tolist()
    assert sorted(faults) == sorted([tar_index.OK] * 19 + [tar_index.NO_IMAGE, tar_index.DAMAGED])


def test_extended_headers_without_end_are_one_fault(tmp_path):
    header = tarfile.TarInfo("x")
    header.type = b"L"
    path = tmp_path / "x.tar"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) * 400)
    assert tar_index.index(str(path))["fault"].tolist() == [tar_index.DAMAGED]


def test_a_name_without_end_makes_no_row_as_wide(tmp_path):
    path = tmp_path / "a.tar"
    bad_tars.pairs(path, 0, 2)
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as tar:
        bad_tars.add(tar, f"{'a' * 100_000}.jpg", b"x")
    rows = tar_index.index(str(path))
    assert len(rows) == 3 and rows.dtype["key"].itemsize < 100 and rows["fault"][2] == tar_index.DAMAGED


def test_keys_do_not_depend_on_the_locale(tmp_path, monkeypatch):
    bad_tars.shard(tmp_path / "a.tar", [("füchse", {"jpg": bad_tars.jpeg(0), "txt": b"a fox"})])
    monkeypatch.setattr(tarfile, "ENCODING", "iso8859-1")
    assert tar_index.index(str(tmp_path / "a.tar"))["key"][0] == "füchse".encode()
