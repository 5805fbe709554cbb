"""Charts, and the images and texts that a report shows."""

import dataclasses
import json
import math
import re

import numpy as np
import PIL.Image
import pytest

from tests.helpers import tiny
from tests.helpers.encoding import make_encoder, small_model
from tests.helpers.pages import HOSTILE, Page, check, written
from xclip_jax.core.errors import UserError
from xclip_jax.data import holdout, sources
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.zeroshot import ZeroShotSet
from xclip_jax.report import __main__ as command
from xclip_jax.report import charts, examples, html, model_sections, selection
from xclip_jax.report.markup import Images


def test_numbers_and_ticks():
    values = (0, 12, 0.5, 7.5, 103.25, 1234.5, 1e-5, 0.00075, 0.001, -0.0312, math.nan)
    assert list(map(charts.number, values)) == [
        "0",
        "12",
        "0.5",
        "7.5",
        "103.2",
        "1,234",
        "1e-5",
        "7.5e-4",
        "0.001",
        "-0.0312",
        "not a number",
    ]
    assert charts.ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(-0.3, 0.35, 5) == pytest.approx([-0.2, 0, 0.2])
    for low, high in ((1, 2), (0.001, 0.0013), (-7, 1e6)):
        ticks = charts.ticks(low, high, 5)
        assert 2 <= len(ticks) <= 6 and low <= min(ticks) and max(ticks) <= high * (1 + 1e-9)


def test_a_chart_keeps_to_what_is_finite_and_short():
    steps = range(5000)
    line = charts.Line("a<b", steps, [math.nan if s % 7 == 0 else s for s in steps], 0)
    text = charts.chart("T", [line], [charts.Level("alarm", -100.0, below=True)], unit="nats")
    Page(text)
    data = json.loads(re.search(r'data-chart="([^"]+)"', text)[1].replace("&quot;", '"').replace("&lt;", "<"))
    (drawn,) = data["lines"]
    assert drawn["name"] == "a<b" and len(drawn["x"]) == charts.POINTS
    assert drawn["y"] == pytest.approx(drawn["x"], abs=1) and "a&lt;b" in text
    points = np.array([p.split(",") for p in re.search(r'points="([^"]+)"', text)[1].split()], float)
    assert points[0, 0] == 0 and points[-1, 0] == 1000 and (np.diff(points[:, 1]) < 0).all()
    assert charts.chart("T", [charts.Line("none", [1], [math.nan], 0)]) == ""


def test_the_confusion_matrix_counts_and_the_seed_decides_among_equals():
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(6)]
    data = ZeroShotSet("x", images, np.array([0, 0, 1, 2, 2, 2]), [["a"], ["b"], ["c"]], coarse=["p", "p", "q"])
    answers = np.array([1, 1, 0, 2, 0, 0])
    confusion = examples._confusion("x", data, data, np.eye(3)[answers], np.random.default_rng(0))
    assert confusion.classes == ["p", "q"] and confusion.counts.tolist() == [[3, 0], [2, 1]]
    assert [(m.name, m.taken_for, m.count) for m in confusion.mistakes[:2]] in (
        [("a", "b", 2), ("c", "a", 2)],
        [("c", "a", 2), ("a", "b", 2)],
    )
    assert confusion.mistakes[2].taken_for == "a" and confusion.mistakes[2].images[0][0, 0, 0] == 2
    fine = examples._confusion(
        "x", dataclasses.replace(data, coarse=()), data, np.eye(3)[answers], np.random.default_rng(0)
    )
    assert fine.classes == ["a", "b", "c"] and fine.counts[2].tolist() == [2, 0, 1]


def test_selected_sets(monkeypatch):
    loaded = []

    def load(spec, size, data_dir, profile=None, data=None):
        loaded.append(spec)
        if spec == "imagenet":
            raise UserError("imagenet is not prepared.")
        images = [np.zeros((4, 4, 3), np.uint8)] * 3
        if "retrieval" in spec:
            return selection.RetrievalSet(spec, images, [["a"]] * 3)
        return ZeroShotSet(spec, images, np.arange(3), [[f"{c} {i}" for i in range(4000)] for c in "abc"])

    monkeypatch.setattr(selection.registry, "load", load)
    specs = ["imagenet", "probe/cifar10", "folder:x", "sts12@y", "coco_retrieval"]
    selected = selection.select(specs, Preprocessing(4), None, None, 0)
    assert set(loaded) == {"imagenet", "folder:x", "coco_retrieval"} and selected.missing == [
        "imagenet is not prepared."
    ]
    assert [panel.title for panel, *_ in selected.zeroshot] == ["folder:x"] and selected.retrieval[
        0
    ].name == "coco_retrieval"
    assert sum(map(len, selected.zeroshot[0][1].prompts)) == selection.PROMPTS and not selected.credits
    loaded.clear()
    selected = selection.select(
        ["emoji/test_line", "emoji/test_probe", "emoji/test_concepts", "emoji/test_rendering_rest"],
        Preprocessing(4),
        None,
        None,
        0,
    )
    assert [panel.spec for panel, *_ in selected.zeroshot] == [
        "emoji/test_concepts",
        "emoji/test_line",
    ] and selected.credits
    assert "emoji/test_rendering_rest" not in loaded


def test_training_pairs_are_those_that_the_run_learned_from(tmp_path, monkeypatch):
    """With a share of the pairs, and captions exchanged by the run's seed; the report's seed only draws."""
    spec = f"folder:{tiny.folder(tmp_path / 'pairs')}"
    changes = {"data__subset": 0.5, "data__caption_noise": 0.5, "seed": 3}
    run = tiny.untrained(tmp_path / "run", "clip", data__sources=(spec,), **changes)
    selected = []
    monkeypatch.setattr(examples, "select", lambda *args: selected.append(selection.select(*args)) or selected[0])
    command.main([str(run), "--seed", "5"])
    data = DataConfig(sources=(spec,), subset=0.5, caption_noise=0.5, batch=8)
    (trained,) = holdout.apply_controls(sources.open_sources(data), data, 3)
    view = Preprocessing(selection.SHOWN)
    expected = {view(record["image"]).tobytes(): record["text"] for record in map(trained.__getitem__, range(20))}
    _, shown = selected[0].retrieval
    assert {image.tobytes(): texts for image, texts in zip(shown.images, shown.captions, strict=True)} == expected


def test_what_bars_mean_is_escaped():
    """A similarity of another package says it."""
    image = np.zeros((4, 4, 3), np.uint8)
    guess = examples.Prediction(image, "a", 1, [examples.ScoredLabel("a", 0.5, "0.50", True)])
    gallery = examples.Gallery([image], [image], ["a"])
    retrieved = examples.RetrievalExamples("x", 1, HOSTILE, gallery, [], [guess])
    text = model_sections.search(examples.Examples(retrieved=retrieved), Images(), "").body
    assert HOSTILE in " ".join(Page(text).text) and "<script>" not in text


def test_green_is_for_right_names_alone():
    image = np.zeros((4, 4, 3), np.uint8)
    ranks = [model_sections.place(examples.Prediction(image, "a", rank, []), 9) for rank in (1, 2, 5)]
    assert ranks == ['<small class="ok">right</small>', "<small>rank 2 of 9</small>", "<small>rank 5 of 9</small>"]


# --- runs of labelled items


def labelled(path):
    """A folder of labelled images, each with a .txt file beside it."""
    for name in ("fox", "hen", "owl"):
        tiny.folder(path / name, 6)
    return path


def fine_tuned(run, images, **changes):
    """An untrained run of a classifier of `images`, with the set that such a run is evaluated on."""
    changes = {"data__sources": (f"folder:{images}",), "objective__classify__classes": 3} | changes
    return tiny.untrained(run, "classify", eval__sets=(f"finetuned/folder:{images}",), **changes)


@pytest.mark.parametrize("captions", [False, True])
def test_labelled_images_are_not_shown_as_pairs(captions, tmp_path):
    """Of a fine-tuned run, which compares no images with texts, with a .txt file beside each image or none."""
    images = labelled(tmp_path / "images")
    for path in [] if captions else images.rglob("*.txt"):
        path.unlink()
    run = fine_tuned(tmp_path / "run", images)
    command.main([str(run)])
    text = (run / "report.html").read_text()
    words = " ".join(check(text).text)
    assert "so no examples of its predictions are shown" in words and "no term of its objective has a" in words
    assert ".txt" not in words and "evaluate probe/SET" not in words and "--sets" not in words


def test_a_model_of_pairs_beside_a_fine_tuned_one_is_not_shown_labelled_images_as_pairs(tmp_path):
    images = labelled(tmp_path / "images")
    fine_tuned(tmp_path / "a", images)
    tiny.untrained(tmp_path / "b", "clip", data__sources=(f"folder:{images}",))
    for first, second, sentence in (("a", "b", "learned from labelled items, not from pairs"), ("b", "a", "no term")):
        command.main([str(tmp_path / first), str(tmp_path / second), "--output", str(tmp_path / "x.html")])
        text = (tmp_path / "x.html").read_text()
        words = " ".join(check(text, ("results", "differences", "names", "search", "curves", "settings")).text)
        assert sentence in words and "training pairs, on which" not in words


# --- images that cannot be read


def folder_of(path, n=8):
    """A folder of images in two classes, the third of each class unreadable."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
        for i in range(n):
            PIL.Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path / name / f"{i}.png")
        (path / name / "2.png").write_bytes(b"<html>")
    return path


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    spec = f"folder:{folder_of(tmp_path / 'set')}"
    shown = examples.collect_examples(make_encoder(), small_model()[1], [spec])
    (named,) = shown.named
    assert [prediction.name for prediction in named.guesses] == ["dog"]  # the cat that the seed draws is unreadable
    assert len(shown.gallery.images) == 14 and shown.confusion.images == 14
    (note,) = shown.missing
    assert note.startswith(f"2 of 16 images drawn from {spec} cannot be read and are left out; the first: ")
    assert str(tmp_path / "set" / "cat" / "2.png") in note
    run = written(tmp_path / "run", tiny.config("xclip"), [])
    assert "2 of 16 images drawn from" in " ".join(check(html.render(run, shown)).text)


def test_unreadable_images_of_a_retrieval_set(tmp_path):
    folder_of(tmp_path)
    records = [
        {"filename": f"{i}.png", "filepath": "cat", "split": "test", "sentences": [{"raw": f"text {i}"}]}
        for i in range(8)
    ]
    (tmp_path / "x.json").write_text(json.dumps({"images": records}))
    shown = examples.collect_examples(make_encoder(), small_model()[1], [f"coco_retrieval@{tmp_path / 'x.json'}"])
    assert len(shown.retrieved.gallery.images) == 7 and "text 2" not in shown.retrieved.gallery.names
    assert shown.missing[0].startswith("1 of 8 images drawn from coco_retrieval@")


def test_a_set_without_a_readable_image_is_one_sentence(tmp_path):
    for path in folder_of(tmp_path).rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 16 images of folder:.* can be read; the first: "):
        examples.collect_examples(make_encoder(), small_model()[1], [f"folder:{tmp_path}"])
