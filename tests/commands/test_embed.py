"""Embeddings of images and texts in a file: rows, parts, resume and faults."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import xclip_jax
from tests.helpers import bad_tars, tiny, web
from xclip_jax.commands import embed, inputs
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.core.run_folder import lock
from xclip_jax.data import embeddings
from xclip_jax.data.images import decode
from xclip_jax.data.readers.folder import FolderSource

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True, scope="module")
def small_parts_and_one_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "PART", 8)
        patch.setattr(embed.inference, "load", functools.cache(embed.inference.load))
        yield


KILL = """
import os, pathlib, signal, sys
from xclip_jax.commands import embed, inputs
embed.PART = 8
replace = pathlib.Path.replace
def kill(self, target):
    if self.name.startswith(".image-000000016.parquet."):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
pathlib.Path.replace = kill
embed.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, run):
    """A run, 40 good pictures and two bad ones, texts."""
    root = tmp_path_factory.mktemp("embed")
    (root / "run").symlink_to(run)
    tiny.folder(root / "pictures", 40)
    (root / "pictures" / "013.txt").unlink()
    (root / "pictures" / "002b.png").write_bytes(b"<html>")
    (root / "pictures" / "036b.jpg").write_bytes((root / "pictures" / "003.png").read_bytes()[:100])
    (root / "texts.txt").write_text("a fox\r\nein Füchslein\n\nthe last one", encoding="utf-8")
    return root


def read(path):
    """Columns, and what the file says about itself."""
    return embeddings.read(path), embeddings.about(path)


def flags(root, where, **changes):
    options = {"checkpoint": root / "run", "images": root / "pictures", "out": where, "batch": 8} | changes
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture(scope="module")
def straight(root):
    embed.main(flags(root, root / "straight.parquet"))
    return root / "straight.parquet"


def test_rows_are_the_images_and_the_bad_ones_are_listed(root, model, straight):
    columns, about = read(straight)
    good = [root / "pictures" / f"{i:03d}.png" for i in range(40)]
    assert list(columns["id"]) == list(map(str, good)) and set(columns["kind"]) == {"image"}
    assert list(columns["text"]) == ["" if i == 13 else f"picture {i}" for i in range(40)]
    np.testing.assert_allclose(columns["embedding"], model.encode_image(good), atol=1e-6)
    assert about["rows"] == 40 and about["bad"] == 2 and about["step"] == 0 and about["checkpoint"].endswith("run")
    assert {"commit", "versions", "command"} <= about["environment"].keys()
    listed = [json.loads(line) for line in (root / "straight.parquet.bad.jsonl").read_text().splitlines()]
    assert [pathlib.Path(entry["id"]).name for entry in listed] == ["002b.png", "036b.jpg"]
    assert listed[0]["reason"] == "not an image"
    assert not (root / "straight.parquet.parts").exists()


@pytest.mark.slow  # processes that are killed
def test_a_kill_loses_nothing_and_repeats_nothing(root, straight, capsys, monkeypatch):
    """Killed when two parts of six are whole and the third is written but has no name yet."""
    out = root / "killed.parquet"
    command = [sys.executable, "-c", KILL, *flags(root, out)]
    assert subprocess.run(command, capture_output=True).returncode == -9
    there = sorted(path.name for path in (root / "killed.parquet.parts").glob("*.parquet"))
    assert there == ["image-000000000.parquet", "image-000000008.parquet"] and not out.exists()
    decoded, original = [], inputs.Images.read
    monkeypatch.setattr(inputs.Images, "read", lambda self, i: decoded.append(i) or original(self, i))
    embed.main(flags(root, out))
    assert "resuming after part 2 of 6 of images" in capsys.readouterr().out
    assert sorted(decoded) == list(range(16, 42))
    (found, about), (wanted, other) = read(out), read(straight)
    for key in wanted:
        np.testing.assert_array_equal(found[key], wanted[key])
    assert about["plan"] == other["plan"] and about["bad"] == 2
    bad = (root / "straight.parquet.bad.jsonl").read_text()
    assert (root / "killed.parquet.bad.jsonl").read_text() == bad
    embed.main(flags(root, out))
    assert "is complete" in capsys.readouterr().out and len(decoded) == 26


def test_a_disk_that_fails_is_no_set_of_bad_images(root, straight, tmp_path, monkeypatch):
    """Nothing is stored of a part that it refused, nor of one whose files vanished, and the same command goes on."""
    monkeypatch.setattr(embed, "_FEW", 3)
    original, out = FolderSource.__getitem__, tmp_path / "x.parquet"

    def failing(self, index):
        if pathlib.Path(self.images[index]).stem > "018":
            missing = ("no image file", "[Errno 2] No such file or directory")
            raise BadSample(*(missing if index % 2 else ("file cannot be read", "[Errno 5] I/O error")))
        return original(self, index)

    monkeypatch.setattr(FolderSource, "__getitem__", failing)
    with pytest.raises(SystemExit, match=r"4 of 8 items .*019\.png' .* resumes after 16 items"):
        embed.main(flags(root, out))
    assert not out.exists()
    monkeypatch.setattr(FolderSource, "__getitem__", original)
    embed.main(flags(root, out))
    np.testing.assert_array_equal(read(out)[0]["embedding"], read(straight)[0]["embedding"])


def test_files_missing_from_a_tables_folder_are_no_failing_disk(root, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_FEW", 3)
    shutil.copy(root / "pictures" / "000.png", tmp_path)
    (tmp_path / "x.csv").write_text("image\n000.png\n" + "gone.png\n" * 6)
    embed.main(flags(root, tmp_path / "x.parquet", images=tmp_path / "x.csv"))
    columns, about = read(tmp_path / "x.parquet")
    assert columns["id"] == [f"{tmp_path}/000.png"] and about["bad"] == 6
    (tmp_path / "y.csv").write_text("image\n000.png\n" + "disk/0.png\n" * 6)
    with pytest.raises(SystemExit, match=r"6 of 7 items .*disk/0\.png' \(file does not exist.*Restore them, or"):
        embed.main(flags(root, tmp_path / "y.parquet", images=tmp_path / "y.csv"))


def test_addresses_that_are_refused_are_left_out_on_demand(root, tmp_path, monkeypatch):
    """The same command resumes with the limit that the error names."""
    monkeypatch.setattr(embed, "_FEW", 3)
    with web.serve() as site:
        site.files["0.png"] = (root / "pictures" / "000.png").read_bytes()
        good, refused = site.url("0.png"), site.url("secret/0.png")
        (tmp_path / "x.csv").write_text("\n".join(["image", *[good] * 8, *[refused] * 5, good]))
        changes = {"images": tmp_path / "x.csv"}
        with pytest.raises(SystemExit, match=r"^error: 5 of 6 .* 403.*by --max_unreadable=0\.84: .* after 8 items"):
            embed.main(flags(root, tmp_path / "x.parquet", **changes))
        asked = len(site.requests)
        embed.main(flags(root, tmp_path / "x.parquet", max_unreadable=0.84, **changes))
        assert len(site.requests) - asked == 6
    columns, about = read(tmp_path / "x.parquet")
    assert columns["id"] == [good] * 9 and about["bad"] == 5


def test_samples_without_an_image_are_no_failing_disk(root, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_FEW", 3)
    samples = [(f"{i}", {"txt": b"x"} | ({"jpg": bad_tars.jpeg(0)} if i == 2 else {})) for i in range(7)]
    bad_tars.shard(tmp_path / "0.tar", samples)
    embed.main(flags(root, tmp_path / "x.parquet", images=tmp_path / "0.tar"))
    columns, about = read(tmp_path / "x.parquet")
    assert columns["id"] == [f"{tmp_path}/0.tar#2"] and about["bad"] == 6


def test_texts_beside_images(root, model, straight):
    out = root / "both.parquet"
    embed.main(flags(root, out, texts=root / "texts.txt"))
    columns, about = read(out)
    assert list(columns["kind"]) == ["image"] * 40 + ["text"] * 4 and about["rows"] == 44 and about["bad"] == 3
    texts = ["a fox", "ein Füchslein", "", "the last one"]
    assert list(columns["text"][40:]) == texts
    assert list(columns["id"][40:]) == [f"{root / 'texts.txt'}#{i + 1}" for i in range(4)]
    np.testing.assert_allclose(columns["embedding"][[40, 41, 43]], model.encode_text([*texts[:2], texts[3]]), atol=1e-6)
    assert not columns["embedding"][42].any()
    listed = [json.loads(line) for line in (root / "both.parquet.bad.jsonl").read_text().splitlines()]
    assert listed[2] == {
        "kind": "text", "id": f"{root / 'texts.txt'}#3", "index": 2, "reason": "line is empty", "detail": ""
    }  # fmt: skip
    np.testing.assert_array_equal(columns["embedding"][:40], read(straight)[0]["embedding"])


def test_different_captions_beside_images(root, model, straight, tmp_path):
    embed.main([*flags(root, tmp_path / "x.parquet"), "--captions"])
    columns, about = read(tmp_path / "x.parquet")
    texts = [text for i in range(40) if i != 13 for text in (f"picture {i}", *[f"number {i}"] * (i % 3 == 0))]
    assert columns["kind"][40:] == ["text"] * len(texts) and columns["text"][40:] == texts and about["bad"] == 2
    np.testing.assert_allclose(columns["embedding"][40:], model.encode_text(texts), atol=1e-6)
    np.testing.assert_array_equal(columns["embedding"][:40], read(straight)[0]["embedding"])
    bad_tars.shard(tmp_path / "0.tar", [(key, {"jpg": bad_tars.jpeg(0), "txt": b"a\nfox"}) for key in "ab"])
    captions = inputs.Captions(inputs.open_images(f"{tmp_path}/0.tar"))
    assert len(captions) == 1 and captions.read(0) == ("a\nfox", "a\nfox")
    with pytest.raises(UserError, match=r"has no caption; put each caption in a .txt file named like its image"):
        inputs.Captions(inputs.open_images(str(root / "pictures" / "013.png")))


def test_row_i_is_line_i(root, model, tmp_path):
    """In parts of 8 lines, one of them without any good line; spaces are no text, control characters neither."""
    lines = [b"", b" \t", b"a\x00b", *[b""] * 6, b"a fox", b"", b"a hen", *[b""] * 14]
    (tmp_path / "t.txt").write_bytes(b"\n".join(lines) + b"\n")
    out = tmp_path / "t.parquet"
    embed.main([f"--checkpoint={root}/run", f"--texts={tmp_path}/t.txt", f"--out={out}", "--batch=8"])
    columns, about = read(out)
    assert len(columns["text"]) == about["rows"] == len(lines) and about["bad"] == len(lines) - 2
    assert {i: text for i, text in enumerate(columns["text"]) if text} == {9: "a fox", 11: "a hen"}
    expected = np.zeros((len(lines), 16), np.float32)
    expected[[9, 11]] = model.encode_text(["a fox", "a hen"])
    np.testing.assert_allclose(columns["embedding"], expected, atol=1e-6)


def test_changed_pictures_are_another_job(root, model, tmp_path, capsys):
    """A picture or caption of another size; the same files, written again at a later time, are the same job."""
    pictures = shutil.copytree(root / "pictures", tmp_path / "pictures")
    changes = {"images": pictures}
    embed.main(flags(root, tmp_path / "x.parquet", **changes))
    os.utime(pictures / "003.png", (1, 1))
    embed.main(flags(root, tmp_path / "x.parquet", **changes))
    assert "is complete" in capsys.readouterr().out
    for name, content in (("003.png", (pictures / "004.png").read_bytes() + b"x"), ("003.txt", b"another caption")):
        before = (pictures / name).read_bytes()
        (pictures / name).write_bytes(content)
        with pytest.raises(SystemExit, match="has other embeddings: image differ; delete it"):
            embed.main(flags(root, tmp_path / "x.parquet", **changes))
        (pictures / name).write_bytes(before)


def test_a_command_that_embedded_nothing_is_in_the_way_of_none(root, tmp_path):
    """Its images may be readable at the next attempt, or a mistake."""
    (tmp_path / "a.png").write_bytes(b"<html>")
    with pytest.raises(SystemExit, match="nothing could be embedded"):
        embed.main(flags(root, tmp_path / "x.parquet", images=tmp_path / "a.png"))
    shutil.copy(root / "pictures" / "003.png", tmp_path / "a.png")
    embed.main(flags(root, tmp_path / "x.parquet", images=tmp_path / "a.png"))
    assert len(embeddings.read(tmp_path / "x.parquet")["id"]) == 1


def test_what_is_in_the_way_is_named(root, straight, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(model.card, "tokenizer", "the model's new folder/tokenizer.json")
    sources, out = {"image": inputs.open_images(str(root / "pictures"))}, tmp_path / "x.parquet"
    shutil.copy(straight, out)
    (tmp_path / "x.parquet.parts").mkdir()  # as after a kill at the end
    (tmp_path / "x.parquet.parts" / "image-000000008.parquet").write_bytes(b"the rest")
    (tmp_path / "x.parquet.parts" / "plan.json").write_text("{}")
    assert embed.embed(model, sources, str(out))["rows"] == 40 and "is complete" in capsys.readouterr().out
    assert not (tmp_path / "x.parquet.parts").exists()
    parts = tmp_path / "again.parquet.parts"
    parts.mkdir()
    (parts / "image-000000000.parquet").touch()  # another program's, since there is no plan
    with pytest.raises(UserError, match=r"again.parquet.parts' has other files, such as 'image-000000000.parquet'"):
        embed.embed(model, sources, str(tmp_path / "again.parquet"))
    plan = embeddings.about(out)["plan"]
    (parts / "plan.json").write_text(json.dumps(plan | {"weights": "other"}))
    with pytest.raises(UserError, match=r"again.parquet.parts has other embeddings: weights differ; delete it"):
        embed.embed(model, sources, str(tmp_path / "again.parquet"))
    with lock(out, blocking=False), pytest.raises(UserError, match=r"x\.parquet is in use by"):
        embed.embed(model, sources, str(out))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"share": "4/3"}, "--share is '4/3'"),
        ({"share": "0/3"}, "--share is '0/3'"),
        ({"share": "3"}, "--share is '3'"),
        ({"share": "-1/3"}, "--share is '-1/3'"),
        ({"share": "1/99"}, "fewer shares than items"),
        ({"share": "1/3", "out": "{}/straight.parquet"}, "straight.parquet' is not a folder"),
        ({"dims": 17}, "dims is 17"),
        ({"max_unreadable": 30}, "--max_unreadable is 30"),
        ({"dims": -1}, "dims is -1"),
        ({"images": "{}/run"}, "run' has 0 images"),
        ({"texts": "{}/none.txt"}, "none.txt'"),
        ({"out": "{}/x.csv"}, "--out is '.csv'"),
        ({"out": "{}/texts.txt/x.parquet"}, "--out"),
        ({"out": "gs://bucket/x.parquet"}, "--out 'gs://bucket/x.parquet'"),
        ({"images": "{}/texts.txt", "out": "{}/bad.parquet"}, "bad.parquet.bad.jsonl"),
    ],
)
def test_bad_input(root, straight, changes, named):
    changes = {key: str(value).format(root) for key, value in changes.items()}
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(named)}"):
        embed.main(flags(root, root / "y.parquet", **changes))


def test_shares_of_several_machines_are_one_table(root, tmp_path, monkeypatch, capsys):
    """The folder never has other files; the second share is interrupted after its parts, and repeats none."""
    out, whole, texts = tmp_path / "x.parquet", tmp_path / "whole.parquet", {"texts": root / "texts.txt"}
    embed.main(flags(root, whole, **texts))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(embed, "_join", lambda *_: 1 / 0)
        embed.main(flags(root, out, share="2/3", **texts))
    assert list(out.iterdir()) == []
    for i, missing in ((3, "1/3, 2/3"), (1, "2/3")):
        embed.main(flags(root, out, share=f"{i}/3", **texts))
        with pytest.raises(UserError, match=rf"x\.parquet lacks --share {missing} for .*of-00003\.parquet,"):
            embeddings.read(out)
    capsys.readouterr()
    embed.main(flags(root, out, share="2/3", **texts))
    assert "resuming after part 2 of 2 of images" in capsys.readouterr().out
    assert [path.name for path in sorted(out.iterdir())] == [f"0000{i}-of-00003.parquet" for i in (1, 2, 3)]
    columns, wanted = embeddings.read(out), embeddings.read(whole)
    assert pyarrow.parquet.read_table(out)["id"].to_pylist() == columns["id"]
    by_modality = np.argsort(columns["kind"], kind="stable")
    for key, values in wanted.items():
        np.testing.assert_array_equal(np.asarray(columns[key])[by_modality], values)
    listed = [line for path in sorted(tmp_path.glob("x.*.bad.jsonl")) for line in path.read_text().splitlines()]
    assert sorted(listed) == sorted(pathlib.Path(f"{whole}.bad.jsonl").read_text().splitlines())
    assert not list(tmp_path.glob("*.parts"))


def test_shares_of_other_jobs_are_refused(root, tmp_path):
    """The 42 images make 42 shares, the fourth of which is damaged: its file has no row."""
    out, other, cut = (tmp_path / f"{name}.parquet" for name in ("x", "other", "cut"))
    embed.main(flags(root, other, share="4/42"))
    (damaged,) = other.iterdir()
    assert embeddings.about(damaged)["rows"] == 0 and embeddings.read(damaged)["embedding"].shape == (0, 16)
    for i in (1, 2):
        embed.main(flags(root, out, share=f"{i}/2"))
    assert len(embeddings.files(out)) == 2
    with pytest.raises(SystemExit, match=r"x\.parquet' is a folder, perhaps of shares; give --share"):
        embed.main(flags(root, out))
    embed.main(flags(root, cut, share="2/2", dims=3))
    for file, missing in ((damaged, "none"), (next(cut.iterdir()), "2/2")):
        mixed = shutil.copytree(out, tmp_path / file.stem / "x.parquet")
        shutil.copy(file, mixed)
        with pytest.raises(UserError, match=rf"lacks --share {missing} for .*00001-of-00002\.parquet"):
            embeddings.read(mixed)


def test_first_dimensions_have_unit_length(root, straight, tmp_path):
    out = tmp_path / "x.parquet"
    embed.main(flags(root, out, texts=root / "texts.txt", dims=5))
    columns, about = read(out)
    cut = embeddings.read(straight)["embedding"][:, :5]
    np.testing.assert_allclose(columns["embedding"][:40], cut / np.linalg.norm(cut, axis=1)[:, None], atol=1e-6)
    model = xclip_jax.load(root / "run", batch=8, dims=5)
    np.testing.assert_allclose(columns["embedding"][40:42], model.encode_text(columns["text"][40:42]), atol=1e-6)
    assert not columns["embedding"][42].any() and about["dims"] == 5
    with pytest.raises(SystemExit, match=r"x\.parquet has other embeddings: dims differ"):
        embed.main(flags(root, out, texts=root / "texts.txt"))


def test_images_in_a_table(root, tmp_path):
    """Rows keep their order, a row without an image is left out, and the column of captions is optional."""
    jpegs = [bad_tars.jpeg(0), None, bad_tars.jpeg(2)]
    columns = {"photo": [{"bytes": x, "path": None} for x in jpegs], "title": ["one", "two", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "shop.parquet")
    table, out = f"parquet:{tmp_path}/shop.parquet", str(tmp_path / "x.parquet")
    flags = ["--checkpoint", str(root / "run"), "--out", out, "--images"]
    embed.main([*flags, f"{table}?image=photo&text=title"])
    made = embeddings.read(out)
    assert (made["id"], made["text"]) == ([f"{table}#0", f"{table}#2"], ["one", ""])
    expected = xclip_jax.load(str(root / "run")).encode_image([decode(jpegs[0]), decode(jpegs[2])])
    np.testing.assert_allclose(made["embedding"], expected, atol=1e-6)
    ledger = pathlib.Path(f"{out}.bad.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in ledger] == [f"{table}#1"]
    with pytest.raises(SystemExit, match=r"x\.parquet has other embeddings: image differ"):
        embed.main([*flags, f"{table}?image=photo"])
    pathlib.Path(out).unlink()
    embed.main([*flags, f"{tmp_path}/shop.parquet?image=photo"])
    assert embeddings.read(out)["text"] == ["", ""]
    with pytest.raises(UserError, match="no column 'image'"):
        inputs.open_images(table)
