"""Class names, prompt templates, class subsets and profiles."""

import dataclasses
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.readers import test_wds as wds
from tests.evaluators.sets.test_known_sets import write
from tests.helpers import bad_tars
from tests.helpers.encoding import SIZE
from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import prompts, registry
from xclip_jax.evaluators.prompts import PROFILES, Profile


def test_clips_own_templates_follow_from_their_rules():
    ends = {
        "ucf101": (48, "a photo of a person {c}.", "a demonstration of the person practicing {c}."),
        "kinetics700": (28, "a photo of {c}.", "a demonstration of a person practicing {c}."),
        "clip_resisc45": (18, "satellite imagery of {c}.", "aerial view of the {c}."),
        "clip_pcam": (1, "this is a photo of {c}", "this is a photo of {c}"),
    }
    for name, (count, first, last) in ends.items():
        texts = prompts.templates(name)
        assert len(texts) == len(set(texts)) == count and (texts[0], texts[-1]) == (first, last)
    assert prompts.templates("ucf101")[4] == "a photo of the person {c}."
    chosen = {key: prompts.chosen("resisc45", profile) for key, profile in PROFILES.items()}
    assert chosen == {"openai": "clip_resisc45", "slip": "clip_resisc45", "open_clip": "resisc45"}


def test_synonyms_of_fer2013(tmp_path):
    for i, name in enumerate(["angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"]):
        write(tmp_path / name / "x.png", i)
    found = {key: registry.load(f"fer2013@{tmp_path}", SIZE, None, profile) for key, profile in PROFILES.items()}
    assert [len(texts) for texts in found["slip"].prompts] == [6, 6, 6, 12, 12, 12, 18]
    assert "they look spooked." in found["openai"].prompts[6] and found["slip"].names[6] == "surprised"
    assert {len(texts) for texts in found["open_clip"].prompts} == {6}
    assert found["slip"].card.templates == "fer2013 (6, synonyms)" != found["open_clip"].card.templates
    for name, kaggles in (("disgusted", "disgust"), ("fearful", "fear"), ("surprised", "surprise")):
        (tmp_path / name).rename(tmp_path / kaggles)
    data = registry.load(f"fer2013@{tmp_path}", SIZE)
    assert data.names == found["slip"].names and list(data.labels) == list(found["slip"].labels)


def test_templates_equal_open_clips():
    theirs = pytest.importorskip("open_clip").OPENAI_IMAGENET_TEMPLATES
    assert [f("cat") for f in theirs] == [t.replace("{c}", "cat") for t in prompts.templates("openai80")]
    seven = [f("cat") for f in pytest.importorskip("open_clip").SIMPLE_IMAGENET_TEMPLATES]
    assert seven == [t.replace("{c}", "cat") for t in prompts.templates("slip7")]


def test_class_names_equal_open_clips_and_two_are_twice_there():
    found = prompts.class_names("imagenet1k", [str(i) for i in range(1000)])
    assert found == list(pytest.importorskip("open_clip").IMAGENET_CLASSNAMES)
    assert {name for name in found if found.count(name) == 2} == {"missile", "sunglasses"}


def test_masks_equal_clip_benchmarks():
    builder = pytest.importorskip("clip_benchmark.datasets.builder", exc_type=ImportError)
    order = builder.all_imagenet_wordnet_ids
    source = pathlib.Path(builder.__file__).read_text()
    for letter, mine in zip("aro", (prompts.IMAGENET_A, prompts.IMAGENET_R, prompts.IMAGENET_O), strict=True):
        wnids = set(re.findall(r"n\d{8}", re.search(rf"imagenet_{letter}_wnids = (.*?)[\]}}]\n", source, re.S)[1]))
        assert [i for i, wnid in enumerate(order) if wnid in wnids] == list(mine)


def test_readable():
    names = {
        "/a/airplane_cabin": "airplane cabin", "001.Black_footed_Albatross": "Black footed Albatross",
        "ApplyEyeMakeup": "Apply Eye Makeup", "AM General Hummer SUV 2000": "AM General Hummer SUV 2000",
    }  # fmt: skip
    assert {label: prompts.readable(label) for label in names} == names


def test_class_names_follow_the_labels_order(monkeypatch):
    monkeypatch.setattr(prompts, "_read", lambda kind: {"x": ["Big Cat", "dog", "red fox"]})
    assert prompts.class_names("x", ["dog", "red_fox", "big_cat"]) == ["dog", "red fox", "Big Cat"]
    assert prompts.class_names("x", ["0", "1", "2"]) == ["Big Cat", "dog", "red fox"]
    with pytest.raises(UserError, match=r"^x has 3 class names"):
        prompts.class_names("x", ["dog", "cat"])


def test_synonyms_and_braces_in_prompts(monkeypatch):
    monkeypatch.setattr(prompts, "templates", lambda name: ["a {c}.", "the {c}."])
    assert prompts.prompts([["cat", "kitty"], "{x}"], "any") == [
        ["a cat.", "the cat.", "a kitty.", "the kitty."],
        ["a {x}.", "the {x}."],
    ]


def test_a_profiles_captions():
    captions = ["A Dog", "B", "C", "D", "E", "F"]
    assert Profile(prefix="a photo of ", lower=True, captions=5).texts(captions)[0] == "a photo of a dog"
    assert len(Profile(captions=5).texts(captions)) == 5 and Profile().texts(captions) == captions
    published = dataclasses.replace(PROFILES["openai"], captions=1)
    for prefix, expected in ((None, "a photo of A Dog"), ("", "A Dog"), ("this: ", "this: A Dog")):
        assert dataclasses.replace(published, prefix=prefix).texts(captions) == [expected]


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """A photograph with an EXIF tag of rotation in sets of many kinds: {set: whether it is data of one's own}."""
    root = tmp_path_factory.mktemp("turned")
    picture = bad_tars.picture(3, w=SIZE, h=SIZE)  # neither resized nor cropped
    data = bad_tars.encode(picture, quality=98, exif=bad_tars.exif(6))
    for name in ("test/angry", "test/happy", "train/angry", "train/happy", "pairs", "val2017", "images"):
        (root / name).mkdir(parents=True)
        (root / name / "0.jpg").write_bytes(data)
    (root / "pairs" / "0.txt").write_text("a fox")
    split = {"images": [{"filename": "0.jpg", "filepath": "pairs", "split": "test", "sentences": [{"raw": "a fox"}]}]}
    (root / "split.json").write_text(json.dumps(split))
    (root / "rows.csv").write_text("image,right,wrong\nval2017/0.jpg,a fox,a hen\n")
    box = {"bbox_x": 0, "bbox_y": 0, "bbox_w": SIZE, "bbox_h": SIZE, "image_path": "0.jpg", "relation_name": "on"}
    texts = {"true_caption": "a fox on a hen", "false_caption": "a hen on a fox"}
    (root / "visual_genome_relation.json").write_text(json.dumps([box | texts]))
    wds.write(root / "classes", [{"jpg": data, "cls": b"1"}])
    wds.write(root / "captions", [{"jpg": data, "txt": b"a fox"}], dataset_type=["retrieval"])
    names = ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")
    (root / "fer.csv").write_text("path,label\n" + "".join(f"images/0.jpg,{name}\n" for name in names))
    published = [f"fer2013@{root / 'fer.csv'}", f"coco_retrieval@{root / 'split.json'}", f"aro/vg_relation@{root}",
                 f"wds:{root / 'classes'}", f"wds:{root / 'captions'}"]  # fmt: skip
    own = [f"folder:{root / 'test'}", f"probe/folder:{root}", f"retrieval/{root / 'pairs'}",
           f"choice/{root / 'rows.csv'}?text=right&text=wrong"]  # fmt: skip
    return data, dict.fromkeys(published, False) | dict.fromkeys(own, True)


@pytest.mark.parametrize(("profile", "rotation"), [("openai", True), ("slip", True), ("open_clip", False)])
def test_only_images_of_ones_own_are_rotated_and_only_if_the_models_are(profile, rotation, turned):
    """The pixels are Pillow's, which open_clip, clip_benchmark and torchvision leave as they are stored."""
    data, sets = turned
    stored = Image.open(io.BytesIO(data))
    for spec, own in sets.items():
        found = registry.load(spec, Preprocessing(SIZE, exif_rotation=rotation), profile=PROFILES[profile])
        expected = np.asarray(ImageOps.exif_transpose(stored) if own and rotation else stored).astype(int)
        image = (found.test if spec.startswith("probe/") else found.images)[0]
        assert np.abs(image - expected).max() <= 2, spec
        assert found.card.preprocessing.endswith(", not rotated by EXIF") != (own and rotation), spec
