"""The images and texts that a report shows."""

import json
import re

import jax
import numpy as np

from tests.helpers import tiny
from tests.helpers.encoding import make_encoder, small_model
from tests.helpers.pages import HOSTILE, check, page_of, written
from xclip_jax.commands import report as command
from xclip_jax.report import examples


def test_what_bars_mean_is_escaped(tmp_path):
    """A similarity of another package says it."""
    image = np.zeros((4, 4, 3), np.uint8)
    guess = examples.Prediction(image, "a", 1, [examples.ScoredLabel("a", 0.5, "0.50", True)])
    gallery = examples.Gallery([image], [image], ["a"])
    retrieved = examples.RetrievalExamples("x", ["a"], HOSTILE, gallery, [], [guess])
    run = written(tmp_path / "run", tiny.config("clip"), [])
    text = page_of(run, examples.Examples(retrieved=retrieved))
    assert HOSTILE in " ".join(check(text).text) and "<script>alert" not in text


def test_green_is_for_right_names_alone(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    guesses = [examples.Prediction(image, "a", rank, []) for rank in (1, 2, 5)]
    shown = examples.Examples(named=[examples.ZeroShotExamples("x", "", 9, guesses)])
    text = page_of(written(tmp_path / "run", tiny.config("clip"), []), shown)
    assert re.findall(r"</b>(<small.*?</small>)", text.partition('id="names"')[2].partition("</section>")[0]) == [
        '<small class="ok">right</small>', "<small>rank 2 of 9</small>", "<small>rank 5 of 9</small>",
    ]  # fmt: skip


def test_labelled_images_are_not_shown_as_pairs(tmp_path):
    """A fine-tuned run does not compare images with texts, even if each image has a .txt file."""
    for name in ("fox", "hen", "owl"):
        tiny.folder(tmp_path / "images" / name, 6)
    spec = f"folder:{tmp_path / 'images'}"
    changes = {"data__sources": (spec,), "objective__classify__classes": 3, "eval__sets": (f"finetuned/{spec}",)}
    run = tiny.untrained(tmp_path / "run", "classify", **changes)
    command.main([str(run)])
    text = (run / "report.html").read_text()
    words = " ".join(check(text).text)
    assert "so no examples of its predictions are shown" in words and "no term of its objective has a" in words
    assert ".txt" not in words and "evaluate probe/SET" not in words and "--sets" not in words


def folder_of(path, n=8):
    """A folder of images in two classes, the third of each class unreadable."""
    for image in tiny.classes(path, n).glob("*/2.png"):
        image.write_bytes(b"<html>")
    return path


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    spec = f"folder:{folder_of(tmp_path / 'set')}"
    records = [
        {"filename": f"{i}.png", "filepath": "set/cat", "split": "test", "sentences": [{"raw": f"text {i}"}]}
        for i in range(8)
    ]
    (tmp_path / "x.json").write_text(json.dumps({"images": records}))
    for path in folder_of(tmp_path / "none").rglob("*.png"):
        path.write_bytes(b"")
    others = [f"coco_retrieval@{tmp_path / 'x.json'}", "retrieval/moved", f"folder:{tmp_path / 'none'}"]
    shown = examples.collect_examples(make_encoder(), small_model()[1], [spec, *others])
    (named,) = shown.named
    # The seed draws the unreadable cat first, and then another one.
    assert sorted(prediction.name for prediction in named.guesses) == ["cat", "dog"]
    assert len(shown.gallery.images) == 14
    assert len(shown.retrieved.gallery.images) == 7 and "text 2" not in shown.retrieved.gallery.names
    notes = (f"2 of 16 images drawn from {spec} cannot be read", "1 of 8 images drawn from coco_", "moved", "16 of 16")
    assert len(shown.missing) == 4 and all(note in text for note, text in zip(notes, shown.missing, strict=True))
    assert str(tmp_path / "set" / "cat" / "2.png") in shown.missing[0]
    run = written(tmp_path / "run", tiny.config("xclip"), [])
    assert "2 of 16 images drawn from" in " ".join(check(page_of(run, shown)).text)


def test_similarities_that_are_not_finite_show_nothing(tmp_path):
    variables = jax.tree.map(lambda x: x * np.nan, small_model()[1])
    specs = [f"folder:{folder_of(tmp_path / 'set')}", f"retrieval/folder:{tiny.folder(tmp_path / 'pairs', 8)}"]
    shown = examples.collect_examples(make_encoder(), variables, specs)
    assert not shown.named and not shown.retrieved
    assert ["not finite" in text for text in shown.missing] == [False, True, True]  # the first: two cannot be read


def test_the_first_sets_are_shown(tmp_path):
    specs = [f"folder:{folder_of(tmp_path / name, 3)}" for name in "abcd"]
    shown = examples.collect_examples(make_encoder(), small_model()[1], ["sts12@y", "probe/cifar10", *specs])
    assert [named.title for named in shown.named] == specs[:3] and not shown.credits
