"""The check of pairs: counts, verdicts, sources by their paths, and captions that a model finds unlikely."""

import collections
import io
import json
import os
import pathlib
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

import xclip_jax
from tests.helpers import bad_tars, tiny
from xclip_jax.commands import check
from xclip_jax.data import inspect
from xclip_jax.data.readers import folder
from xclip_jax.model import ZeroShotResult
from xclip_jax.objectives.similarity import CosineSimilarity


def run(capsys, *arguments):
    """Exit code, output and the sentence of an error."""
    error = ""
    try:
        code = check.main([*map(str, arguments), "--tokenizer", "bytes"])
    except SystemExit as end:
        code, error = 1, end.code
    return code, capsys.readouterr().out, error


def test_tars(tmp_path, capsys):
    bad_tars.pairs(tmp_path / "0.tar", 0, 20)
    bad_tars.pairs(tmp_path / "1.tar", 15, 20, w=60, h=50)
    code, out, _ = run(capsys, tmp_path / "*.tar", "--samples", 30)
    assert code == 0 and "images/s to 224 px" in out
    assert "read: 30 at random; more repeats show with --samples 0, which reads all\n" in out
    out = run(capsys, tmp_path / "*.tar", "--samples", 0)[1]
    lines = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert lines["samples"].startswith("40, index ")
    assert lines["width, 5/50/95 %"] == "40 / 50 / 60"
    assert lines["repeated images"] == "0"
    assert re.match(r"5; .* data\.spread_duplicate_captions=True", lines["repeated captions"])
    assert lines["tokens, 5/50/95 %"] == "11 / 12 / 12, 0.0% of the captions fill all 77"
    assert lines["bad"] == "0.00%, allowed 5.00%: training would run"


def test_torture_set_would_stop_a_run(tmp_path, capsys):
    _, bad = bad_tars.make(tmp_path)
    code, out, _ = run(capsys, f"{tmp_path}/*.tar")
    assert code == 1 and "training would stop" in out
    counted = {reason: int(number) for reason, number in re.findall(r"^bad, ([\w -]+): (\d+) ", out, re.M)}
    assert counted == collections.Counter(bad.values())
    shown = [json.loads(line) for line in out.splitlines() if line.startswith("    {")]
    assert {(e["tar"].rpartition("/")[2], e["key"]) for e in shown} <= bad.keys()
    assert {e["reason"] for e in shown} == set(bad.values())
    assert run(capsys, f"{tmp_path}/*.tar", "--max_bad_fraction", "0.9")[0] == 0


def test_no_speed_where_no_image_could_be_read(tmp_path, capsys):
    for image in tiny.folder(tmp_path, n=3).glob("*.png"):
        image.write_bytes(b"<html>")
    (tmp_path / "a\udcff.jpg").touch()  # no UTF-8
    code, out, _ = run(capsys, tmp_path)
    assert code == 1 and "bad: 100.00%" in out and "images/s" not in out and "/a?.jpg" in out


def test_one_caption_for_all_images_is_nothing_to_learn_from(tmp_path, capsys):
    for text in tiny.folder(tmp_path, n=6).glob("*.txt"):
        text.write_text("an image")
    code, out, _ = run(capsys, tmp_path)
    assert code == 1 and "repeated captions: 5; in one batch" in out
    assert out.endswith(": training would learn nothing; give each image a caption of its own\n")


def test_paths_without_a_prefix(tmp_path, capsys):
    tiny.folder(tmp_path / "pairs", n=3)
    (tmp_path / "table.csv").write_text("image,text\npairs/000.png,one\npairs/001.png,two\n")
    (tmp_path / "tars").mkdir()
    bad_tars.pairs(tmp_path / "tars" / "0.tar", 0, 4)
    for path, samples in (("pairs", 3), ("table.csv", 2), ("tars", 4), ("tars/*.tar", 4)):
        code, out, _ = run(capsys, tmp_path / path)
        assert code == 0 and f"samples: {samples}, " in out, path
        assert out.endswith(": training would run\n")
    assert "'/nowhere/x'" in run(capsys, "/nowhere/x")[2]


def test_five_rows_of_one_image_as_flickr8k_has_them(tmp_path, capsys):
    """Its lines are "NAME.jpg#0", a tab and a caption."""
    images = tiny.folder(tmp_path / "Flicker8k_Dataset", n=4).glob("*.png")
    page = pathlib.Path(__file__).parents[2] / "docs" / "data.md"
    command = next(line for line in page.read_text().splitlines() if "Flickr8k.token.txt" in line)
    lines = [f"{x.name}#{i}\ta dog , view {i} .\n" for x in images for i in range(5)]
    (tmp_path / "Flickr8k.token.txt").write_text("".join(lines))
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    code, out, _ = run(capsys, tmp_path / "Flicker8k_Dataset" / "pairs.tsv")
    assert code == 0 and "samples: 20, " in out
    assert re.search(r"repeated images: 16; .* objective\.clip\.positives=image", out)


def test_columns_are_named_after_the_source(tmp_path, capsys):
    """Captions of all columns count: the first alone would have 4 repeats, and nothing to learn."""
    tiny.folder(tmp_path / "pairs", n=5)
    rows = [f"pairs/{i:03d}.png,a,{'a' if i == 4 else f'number {i}'}" for i in range(5)]
    path = tmp_path / "b,text.csv"
    path.write_text("\n".join(["path,caption,alt", *rows]))
    assert "name its columns, by data.image_column and data.text_columns" in run(capsys, path)[2]
    code, out, _ = run(capsys, f"{path},image=path,text=caption,alt")
    assert code == 0 and "read: 5 at random\n" in out
    assert re.search(r"repeated captions: 4; .* objective\.clip\.positives=caption", out)
    assert "repeated captions: 0\n" in run(capsys, f"{path},image=path,text=alt")[1]
    assert "has text= twice; leave one out" in run(capsys, f"{path},image=path,text=caption,text=alt")[2]
    assert run(capsys, f"{path},image=path,text=caption:0.8,alt:0.2")[1].splitlines()[:-2] == out.splitlines()[:-2]


def test_options_are_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    tiny.folder(tmp_path, n=3)
    monkeypatch.setattr(inspect, "read", None)
    for flags, named in (
        (["--tokenizer", "clap"], "clap"),
        (["--samples", "-1"], "--samples is -1"),
        (["--max_bad_fraction", "nan"], "--max_bad_fraction is nan; expected a fraction from 0 to 1"),
        (["--max_bad_fraction", "5"], "--max_bad_fraction is 5; expected"),
        (["--suspects", "x"], "--by RUN"),
        (["--by", "a/run", "--suspects", str(tmp_path)], "--suspects"),
    ):
        with pytest.raises(SystemExit, match=named):
            check.main([str(tmp_path), *flags])
    assert not capsys.readouterr().out


class Greys:
    """A model that knows the caption of a grey picture, "grey 7" for the value 7."""

    similarities = (CosineSimilarity(),)

    def zero_shot(self, images, names, templates, by):
        assert templates == ["{}"] and not by and len(set(names)) == len(names)
        values = [Image.open(io.BytesIO(image)).convert("L").getpixel((0, 0)) for image in images]
        p = np.array([[0.9 if name == f"grey {value}" else 0.1 / len(names) for name in names] for value in values])
        return ZeroShotResult([names[i] for i in p.argmax(axis=1)], p, p)


def test_wrong_captions_are_the_least_likely(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check.inference, "load", lambda path, trust: Greys())
    monkeypatch.setattr(check, "_BLOCK", 16)
    (tmp_path / "pairs").mkdir()
    for i in range(40):
        grey = 6 * (i // 2)  # of each caption two images
        Image.new("L", (20, 20), grey).save(tmp_path / "pairs" / f"{i:03d}.png")
        (tmp_path / "pairs" / f"{i:03d}.txt").write_text("grey 250" if i in (5, 30) else f"grey {grey}")
    written = tmp_path / "new" / "wrong.jsonl"
    code, out, _ = run(capsys, tmp_path / "pairs", "--samples", 0, "--by", "a/run", "--suspects", written)
    judged = "by a/run, by probability: 95.0% of images have their own caption as the likeliest of about 13"
    assert code == 0 and judged in out
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(lines) == 40 and {line["file"][-7:] for line in lines[:2]} == {"005.png", "030.png"}
    assert [line["caption"] for line in lines[:2]] == ["grey 250"] * 2 and lines[2]["probability"] == 0.9
    assert [json.loads(line) for line in out.splitlines() if line.startswith("    {")] == lines[:10]
    monkeypatch.setattr(Greys, "similarities", ())
    code, out, error = run(capsys, tmp_path / "pairs", "--by", "a/run")
    assert code == 1 and out == "" and "does not compare images with texts" in error


def test_every_caption_of_an_image_is_judged(tmp_path, capsys, monkeypatch):
    """Captions of one image do not compete; addresses keep no signature."""
    monkeypatch.setattr(check.inference, "load", lambda path, trust: Greys())
    signed = {"url": "https://host/a.tar?X-Amz-Signature=secret"}
    monkeypatch.setattr(folder.FolderSource, "describe", lambda self, index: signed)
    (tmp_path / "pairs").mkdir()
    for i in range(9):
        Image.new("L", (20, 20), i).save(tmp_path / "pairs" / f"{i}.png")
        (tmp_path / "pairs" / f"{i}.txt").write_text(f"grey {i}\nsecond {i}\n")
    assert run(capsys, tmp_path / "pairs", "--by", "a/run", "--suspects", tmp_path / "all.jsonl")[0] == 0
    text = (tmp_path / "all.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert "secret" not in text and len(lines) == 18
    # Each of 18 names has 0.1 / 18 but the right one, which has 0.9: a second caption against 16 of other images.
    small = 0.1 / 18
    expected = {"grey": 0.9 / (0.9 + 1 - 0.9 - small), "second": small / (small + 1 - 0.9 - small)}
    for line in lines:
        assert line["probability"] == pytest.approx(expected[line["caption"].split()[0]], abs=1e-6)
        assert line["likeliest"] == f"grey {line['caption'].split()[1]}"


def test_a_model_with_clusters_judges_by_their_cross_entropy(tmp_path, capsys):
    """Of the pair alone, as in the duel; `clusters` gives the distributions."""
    checkpoint = tiny.untrained(tmp_path / "run", "xclip", noise=0.3)
    tiny.folder(tmp_path / "pairs", n=9)
    written = tmp_path / "all.jsonl"
    code, out, _ = run(capsys, tmp_path / "pairs", "--by", checkpoint, "--suspects", written)
    assert code == 0 and f"by {checkpoint}, by cross-entropy of clusters: " in out
    model, lines = xclip_jax.load(checkpoint), [json.loads(line) for line in written.read_text().splitlines()]
    files = sorted((tmp_path / "pairs").glob("*.png"))
    captions = sorted({line["caption"] for line in lines})

    def distributions(**items):
        found = model.clusters(**items, top=24)
        return np.take_along_axis(found.probabilities.astype(float), np.argsort(found.ids, axis=1), axis=1)

    p, q = distributions(images=files), distributions(texts=captions)
    between = -0.5 * (p @ np.log(q).T + np.log(p) @ q.T)
    expected = {
        (file.name, caption): between[i, captions.index(caption)]
        for i, file in enumerate(files)
        for caption in file.with_suffix(".txt").read_text().splitlines()
    }
    found = {(os.path.basename(line["file"]), line["caption"]): line["cross_entropy"] for line in lines}
    assert found == pytest.approx(expected, rel=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True) and len(set(found.values())) > 5
