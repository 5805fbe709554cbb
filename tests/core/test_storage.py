"""Files that a run keeps, names of files, and errors of disks and stores."""

import errno
import hashlib
import json
import os
import pathlib
import re
import socket
import sys
import time

import fsspec
import numpy as np
import pyarrow
import pytest
from etils import epath

from tests.helpers import web
from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError, redact
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import tokenizer
from xclip_jax.data.readers.table import ImageColumn
from xclip_jax.interop import hub
from xclip_jax.interop import tensor_files as weights


def read_named(path, table=""):
    """The image that a row of a table names."""
    return ImageColumn(pyarrow.chunked_array([[path]]), lambda _, path: (path, table)).read(0)


class HttpError(Exception):
    """As aiohttp's: a subclass of nothing but Exception, with the status of the answer."""

    def __init__(self, status):
        super().__init__(f"answer {status}")
        self.status = status


class Store(fsspec.AbstractFileSystem):
    """A server that answers each request with what `answers` holds for the path."""

    protocol = "answers"
    cachable = False
    answers, requests = {}, []

    def info(self, path, **_):
        self.requests.append(path)
        return {"name": path, "size": None, "type": "file"}

    def _answer(self, path):
        self.requests.append(path)
        answer = self.answers[path.rpartition("/")[2]]
        answer = answer.pop(0) if isinstance(answer, list) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cat_file(self, path, start=None, end=None, **_):
        return self._answer(path)[start:end]

    def glob(self, path, **_):
        return {name: {"type": "file"} for name in self._answer(path)}


@pytest.fixture
def store(monkeypatch):
    fsspec.register_implementation("answers", Store, clobber=True)
    monkeypatch.setattr(Store, "answers", {})
    monkeypatch.setattr(Store, "requests", [])
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0))
    return Store


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("a"), FileNotFoundError),
        (HttpError(403), PermissionError),
        (ValueError("not a URL"), OSError),
    ],
)
def test_what_will_not_pass_is_tried_once(store, error, kind):
    store.answers["a"] = error
    with pytest.raises(kind) as raised:
        storage.read("answers://host/a", 100)
    assert len(store.requests) == 1
    assert raised.value.filename == "answers://host/a"
    if isinstance(error, HttpError):
        assert f"status {error.status}" in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [HttpError(503), TimeoutError("slow"), OSError(errno.EIO, "disk"), OSError(errno.ECONNRESET, "reset")],
)
def test_what_may_pass_is_tried_again(store, error):
    store.answers["a"] = [error, error, b"content"]
    assert storage.read("answers://host/a", 100) == b"content"
    store.answers["a"] = [error] * 9
    with pytest.raises(OSError, match=r"503|slow|disk|reset"):
        storage.read("answers://host/a", 100)
    assert len(store.requests) == 6


def test_a_failed_listing_is_tried_again(store):
    store.answers["*.tar"] = [HttpError(503), TimeoutError("slow"), ["host/b.tar", "host/a.tar", "host/.a.tar"]]
    assert storage.expand("answers://host/*.tar") == ["answers://host/a.tar", "answers://host/b.tar"]


def test_an_unknown_length_is_read_in_one_request(store):
    store.answers["a"] = b"content"
    assert storage.read("answers://host/a", 100) == b"content" and len(store.requests) == 1
    for function, message in ((lambda: storage.read("answers://host/a", 6), "larger"),
                              (lambda: storage.stat("answers://host/a"), "does not report")):  # fmt: skip
        with pytest.raises(OSError, match=message):
            function()


@pytest.mark.parametrize(("key", "values"), [
    ("ETag", ("6745a1b2-1406f40", "6746f332-1406f40", "CKDA84mH8okDEAE=", "CLDA84mH8okDEAE=", "")),  # nginx, Google
    ("Last-Modified", ("Wed, 21 Oct 2026 07:28:00 GMT", "Thu, 22 Oct 2026 07:28:00 GMT")),  # of a plain web server
])  # fmt: skip
def test_stat__changes_with_any_part_of_a_tag(key, values, monkeypatch):
    numbers = set()
    for value in values:
        storage._remote_stat.cache_clear()
        info = {"name": "0.tar", "size": 21_000_000, "type": "file", "lfs": None, key: value}
        system = type("System", (), {"info": lambda _, name, info=info: info})()
        monkeypatch.setattr(storage, "file_system", lambda path, system=system: (system, path))
        size, number = storage.stat("https://host/0.tar")
        assert size == 21_000_000 and 0 <= number < 1 << 64
        numbers.add(number)
    storage._remote_stat.cache_clear()
    assert len(numbers) == len(values)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path, pathlib.Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            storage.read(str(path), 100)
    (tmp_path / "a").write_bytes(b"x" * 101)
    assert storage.read(str(tmp_path / "a"), 101) == b"x" * 101
    with pytest.raises(OSError, match="larger than 100 bytes") as error:
        storage.read(str(tmp_path / "a"), 100)
    assert storage.unreadable(error.value).reason == "file too large"


def test_a_file_that_a_server_forgot_is_opened_again(tmp_path, monkeypatch):
    """A network file system answers ESTALE for a file that was replaced, and for all files after its restart."""
    (tmp_path / "a").write_bytes(b"0123456789")
    file, pread = storage.File(str(tmp_path / "a")), os.pread
    forgotten = {file._fd}

    def stale(descriptor, size, offset):
        if descriptor in forgotten:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(descriptor, size, offset)

    duplicate = os.dup2
    monkeypatch.setattr(
        os, "dup2", lambda new, old, **options: forgotten.discard(old) or duplicate(new, old, **options)
    )
    monkeypatch.setattr(os, "pread", stale)
    assert [file.read(2, 3), file.read(8, 5)] == [b"234", b"89"]
    forgotten.add(file._fd)
    (tmp_path / "a").write_bytes(b"another file")
    with pytest.raises(OSError, match="Stale"):
        file.read(2, 3)


def test_strict_json_has_null_for_numbers_that_json_lacks():
    content = {"a": [1.5, float("nan")], "b": {"c": (-float("inf"), 2)}, "d": "NaN", "e": np.float64("inf")}
    assert json.loads(storage.strict_json(content)) == {"a": [1.5, None], "b": {"c": [None, 2]}, "d": "NaN", "e": None}
    assert storage.strict_json({"b": 1, "a": 0.1}, sort_keys=True) == '{"a": 0.1, "b": 1}'


def test_names_with_commas_brackets_and_braces(tmp_path):
    names = ["a, b.tar", "a[1].tar", "a{b.tar", "{0..1}.tar", "0.tar", "a1.tar"]
    for name in names:
        (tmp_path / name).touch()
        assert storage.expand(f"{tmp_path}/{name}") == [f"{tmp_path}/{name}"]
    assert storage.expand(f"{tmp_path}/a[[]1].tar") == [f"{tmp_path}/a[1].tar"]
    (tmp_path / "{0..1}.tar").unlink()
    (tmp_path / "1.tar").touch()
    assert storage.expand(f"{tmp_path}/{{0..1}}.tar") == [f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"]
    (tmp_path / "d,[1]").mkdir()
    (tmp_path / "d,[1]" / "x.tar").touch()
    assert storage.expand(f"{tmp_path}/d??1]/*.tar") == [f"{tmp_path}/d,[1]/x.tar"]
    assert storage.expand(f"{tmp_path}/d,[[]1]/*.tar") == [f"{tmp_path}/d,[1]/x.tar"]


@pytest.mark.parametrize("read", [RunReader, hub.locate, tokenizer.load, storage.as_path])
def test_addresses_that_are_no_paths(read):
    """Of weights, runs and tokenizers; of data they may be."""
    for address in ("https://user:secret@host/x.json", "abfs://box@account.host/run"):
        with pytest.raises(UserError, match=r"'(https|abfs)://.* is neither local nor in a bucket") as error:
            read(address)
        assert "secret" not in str(error.value)


def test_folders_among_names(tmp_path):
    (tmp_path / "sub.tar").mkdir()
    inside, beside = tmp_path / "sub.tar" / "x.tar", tmp_path / "y.tar"
    inside.touch()
    beside.touch()
    assert storage.expand(f"{tmp_path}/*.tar") == [str(beside)]
    assert storage.expand(f"{tmp_path}/**/*.tar") == [str(inside), str(beside)]
    assert storage.expand(f"{beside},{tmp_path}/**/*.tar") == [str(beside), str(inside)]  # each file once


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("gs://b/{09..10}y{a,b{1..2}}", [f"gs://b/{i}y{j}" for i in ("09", "10") for j in ("a", "b1", "b2")]),
        ("gs://b/{b,c{1,2}}d,gs://b/e", ["gs://b/bd", "gs://b/c1d", "gs://b/c2d", "gs://b/e"]),
        ("gs://b/{9..10}", ["gs://b/9", "gs://b/10"]),
        ("gs://b/{10..09},gs://b/x", ["gs://b/10", "gs://b/09", "gs://b/x"]),
        ("https://h/a?x=1,b=2,,c", ["https://h/a?x=1,b=2,,c"]),
        (
            "https://h/{a,b}?x=1,2, HTTP://h/c?y=1,gs://b/d",
            ["https://h/a?x=1,2", "https://h/b?x=1,2", "HTTP://h/c?y=1", "gs://b/d"],
        ),
        ("https://h/a?x=1,/usr/bin/env", ["https://h/a?x=1", "/usr/bin/env"]),
    ],
)
def test_expand__braces(pattern, expected):
    assert storage.expand(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("/nowhere/{0..1}.tar,/", "'/nowhere/0.tar'"),
        ("a{b,c", "'a{b'"),
        ("/nowhere/*.tar", "'/nowhere/*.tar'"),
        ("/usr", "'/usr' is a folder; write folder:/usr"),
        ("", "''"),
    ],
)
def test_expand__names_the_missing_file(pattern, named):
    with pytest.raises(UserError, match=re.escape(named)):
        storage.expand(pattern)


def test_fingerprint_is_of_content_and_not_of_places_and_times(tmp_path):
    content = np.random.default_rng(0).bytes(5 << 20)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.bin").write_bytes(content)
        os.utime(tmp_path / folder / "x.bin", (len(folder), ord(folder)))
    first = storage.fingerprint([f"{tmp_path}/a/x.bin"])
    assert storage.fingerprint([f"{tmp_path}/b/x.bin"]) == first
    for offset, whole, differs in ((0, 0, True), (-1, 0, True), (2 << 20, 0, False), (2 << 20, 6 << 20, True)):
        changed = bytearray(content)
        changed[offset] ^= 1
        (tmp_path / "b" / "x.bin").write_bytes(changed)
        pair = [storage.fingerprint([f"{tmp_path}/{folder}/x.bin"], whole=whole) for folder in "ab"]
        assert (pair[0] != pair[1]) is differs
    (tmp_path / "b" / "x.bin").write_bytes(content[:-1])
    assert storage.fingerprint([f"{tmp_path}/b/x.bin"]) != first
    (tmp_path / "b" / "x.bin").rename(tmp_path / "b" / "y.bin")
    (tmp_path / "b" / "y.bin").write_bytes(content)
    assert storage.fingerprint([f"{tmp_path}/b/y.bin"]) != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no 'weight_map'"),
        ('{"weight_map": {"x": "model.safetensors.index.json"}}', "has no 'weight_map'"),
        ('{"weight_map": {"x": "../a.safetensors"}}', "has no 'weight_map'"),
        ('{"weight_map": ' + "[" * 100_000, "cannot be read as a JSON object"),
    ],
)
def test_index_of_weights(content, message, tmp_path):
    path = epath.Path(tmp_path) / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        weights.tensors(path)


def test_third_party_files_have_not_changed():
    known = {
        "bpe_simple_vocab_16e6.txt.gz": "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        "en_classnames.json": "73d279021a4bc88059884d01fae66c35ec33793ede8bc9ae54c46632625c4993",
        "en_zeroshot_classification_templates.json": "b78cc883ce1d6aefd304f180046ee25e778d627e099222fbcc57f01657c53c31",
    }
    assert {name: hashlib.sha256(storage.third_party(name)).hexdigest() for name in known} == known
    assert b"Copyright (c) 2021 OpenAI" in storage.third_party("LICENSE.clip")
    readme = storage.third_party("README.md").decode()
    assert all(f"`{name}`" in readme for name in [*known, "LICENSE.clip", "LICENSE.clip_benchmark"])


@pytest.fixture
def site():
    with web.serve() as site:
        yield site


def test_an_answer_that_is_slow_without_end_ends(site, monkeypatch):
    def slow(handler):
        handler.send_response(200)
        handler.end_headers()
        while not handler.server.site.closed:
            handler.wfile.write(b".")
            time.sleep(0.02)

    monkeypatch.setattr(storage, "WEB_SECONDS", 0.3)
    site.files["slow.jpg"] = slow
    with pytest.raises(BadSample, match=r"^file cannot be read: .*TimeoutError"):
        read_named(site.url("slow.jpg"))
    assert site.requests == ["slow.jpg"]


def test_a_part_of_a_file_is_read_and_a_server_of_whole_files_is_a_sentence(site):
    site.files["a"] = b"0123456789"
    file = storage.File(site.url("a"))
    assert (file.read(2, 3), file.read(8, 5)) == (b"234", b"89")
    assert storage.read(site.url("a").replace("http", "HTTP"), 10) == b"0123456789"

    def whole(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(b"0123456789")

    site.files["whole"] = whole
    assert storage.read(site.url("whole"), 10) == b"0123456789"
    with pytest.raises(OSError, match="the server gives whole files only; download the file"):
        storage.File(site.url("whole")).read(2, 3)


def test_secrets_open_a_file_and_are_not_in_the_error(site):
    site.files["a"] = b"content"
    assert storage.read(site.url("a", secret=True), 100) == b"content"
    for path, status in (("none", "FileNotFound"), ("a", "403")):
        url = site.url(path, secret=True).replace(
            web.SIGNATURE, f"{web.SIGNATURE}-old" * (path == "a") or "5ecre7-signature"
        )
        with pytest.raises(OSError, match=status) as error:
            storage.read(url, 100)
        assert redact(error.value.filename) == site.url(f"secret/{path}")
        printed = redact(str(error.value))
        assert web.SIGNATURE not in printed and web.PASSWORD not in printed


def test_a_server_that_is_away_is_not_a_missing_file():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        storage.stat(f"http://127.0.0.1:{port}/pairs.tar")


def test_http_without_its_package_names_the_package(monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "http", raising=False)
    monkeypatch.setitem(sys.modules, "fsspec.implementations.http", None)
    with pytest.raises(UserError, match=r"'http://host/a.jpg' .*'aiohttp>=3\.12'"):
        storage.read("http://host/a.jpg", 100)


TABLE = "https://elsewhere.example/pairs/table.parquet"
NAMES = ("/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "sftp://10.0.0.1/a", "hf://a::file:///etc/passwd")


@pytest.mark.parametrize("name", NAMES)
def test_a_table_from_elsewhere_names_no_files_of_this_machine(name):
    with pytest.raises(BadSample, match=r"^file cannot be read: .*may not name it"):
        read_named(name, TABLE)


def test_local_tables_name_any_file_and_remote_tables_those_of_their_server(site, tmp_path):
    site.files["a.jpg"] = b"content"
    (tmp_path / "a.jpg").write_bytes(b"content")
    for name in (site.url("a.jpg"), str(tmp_path / "a.jpg"), f"file://{tmp_path}/a.jpg"):
        assert read_named(name)[0] == b"content"
    assert read_named(site.url("a.jpg"), site.url("table.parquet"))[0] == b"content"
