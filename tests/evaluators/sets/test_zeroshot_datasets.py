"""Which class name each label of a set in files gets, and what a set's hash covers."""

import csv
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from tests.helpers.encoding import SIZE
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import prompts, registry
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.evaluators.sets import zeroshot_datasets

OPENAI = PROFILES["openai"]


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((9, 9, 3), value, np.uint8)).save(path)


def folder(path, classes):
    """A picture for each class, whose value is the class's place in `classes`."""
    for i, name in enumerate(classes):
        write(path / name / "x.png", i)
    return path


def table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *rows])
    return path


def load(spec, profile=OPENAI):
    return registry.load(spec, SIZE, None, profile)


def named(data):
    """{value of the picture: name of its class}."""
    return {int(image[0, 0, 0]): data.names[label] for image, label in zip(data.images, data.labels, strict=True)}


@pytest.mark.parametrize("digits", [1, 5])
def test_folders_named_by_numbers_get_the_name_of_their_number(digits, tmp_path):
    path = folder(tmp_path, [f"{i:0{digits}}" for i in range(43)])
    assert named(load(f"gtsrb@{path}")) == dict(enumerate(prompts.published("gtsrb")))


def test_numbers_in_a_csv_file_get_the_name_of_their_number(tmp_path):
    for i in (0, 2, 10):
        write(tmp_path / f"{i}.png", i)
    data = load(f"gtsrb@{table(tmp_path / 'a.csv', [[f'{i}.png', str(i)] for i in (10, 0, 2)])}")
    whole = prompts.published("gtsrb")
    assert named(data) == {i: whole[i] for i in (0, 2, 10)} and len(data.prompts) == 43


def test_folders_with_published_names_are_these_classes_and_all_are_answers(tmp_path):
    path = folder(tmp_path, ["american_bulldog", "Abyssinian"])
    data = load(f"pets@{path}")
    assert named(data) == {0: "American Bulldog", 1: "Abyssinian"} and len(data.prompts) == 37


def test_word_net_ids_are_those_of_imagenet(tmp_path):
    wnids = tfds.builder("imagenet2012:5.1.0").info.features["label"].names
    whole = prompts.published("imagenet1k")
    data = load(f"imagenet@{folder(tmp_path / 'all', [wnids[i] for i in (999, 1, 20)])}")
    assert named(data) == {0: whole[999], 1: whole[1], 2: whole[20]} and len(data.prompts) == 1000
    data = load(f"imagenet_r@{folder(tmp_path / 'r', [wnids[i] for i in prompts.IMAGENET_R[:3]])}")
    assert named(data) == {i: whole[prompts.IMAGENET_R[i]] for i in range(3)} and len(data.prompts) == 200


def test_a_folder_of_the_200_has_their_names(tmp_path):
    wnids = tfds.builder("imagenet_a").info.features["label"].names
    for i, number in enumerate(prompts.IMAGENET_A):
        write(tmp_path / wnids[number] / "x.png", i)
    data = zeroshot_datasets.load(f"imagenet_a@{tmp_path}", SIZE, None, OPENAI)
    whole = prompts.class_names("imagenet1k", [str(i) for i in range(1000)])
    assert data.names == [whole[i] for i in prompts.IMAGENET_A] and data.labels.tolist() == list(range(200))


def test_classes_of_imagenet_a_by_number_among_the_1000_or_the_200(tmp_path):
    whole = prompts.published("imagenet1k")
    data = load(f"imagenet_a@{folder(tmp_path / 'thousand', ['988', '6', '11'])}")
    assert named(data) == {0: whole[988], 1: whole[6], 2: whole[11]}
    data = load(f"imagenet_a@{folder(tmp_path / 'own', ['0', '10', '9'])}")
    assert named(data) == {i: whole[prompts.IMAGENET_A[n]] for i, n in enumerate((0, 10, 9))}


def test_labels_of_an_archive_and_codes_of_countries(tmp_path):
    data = load(f"fer2013@{folder(tmp_path / 'faces', ['fear', 'disgust', 'angry'])}", Profile(clips=False))
    assert named(data) == {0: "fearful", 1: "disgusted", 2: "angry"}
    data = load(f"eurosat@{folder(tmp_path / 'land', ['SeaLake', 'AnnualCrop'])}")
    assert named(data) == {0: "lake or sea", 1: "annual crop land"}
    codes = [a + b for a in "ABCDEFGHI" for b in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"][:211]
    data = load(f"country211@{folder(tmp_path / 'codes', codes)}")
    assert named(data) == dict(enumerate(prompts.published("country211")))


@pytest.mark.parametrize(
    ("name", "classes", "strange"),
    [
        ("gtsrb", [str(i + 1) for i in range(43)], "'1'"),  # from 1, not from 0
        ("gtsrb", ["3", "7"], "'3'"),  # from 0 or from 1
        ("gtsrb", ["0", "00"], "'00'"),
        ("fer2013", ["angry", "disgusted", "joy"], "'joy'"),
        ("pets", [f"class {i}" for i in range(37)], "'class 0'"),
        ("imagenet", ["missile", "tench"], "'missile'"),  # two classes have this name
        ("country211", ["AD", "AE"], "'AD'"),
    ],
)
def test_classes_that_would_have_to_be_guessed_are_refused(name, classes, strange, tmp_path):
    with pytest.raises(UserError, match=f"{name}: {strange} is not a class of {name}.*or by number.*folder:PATH") as e:
        load(f"{name}@{folder(tmp_path, classes)}")
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_own_labels_are_names_as_they_are(tmp_path):
    own = ["2.0", "3.5 inch", "1.jpg", "iPhone", "YouTube", "red_fox"]
    data = load(f"folder:{folder(tmp_path / 'folder', own)}")
    assert named(data) == dict(enumerate(own)) and "a photo of a iPhone" in data.prompts[data.names.index("iPhone")]
    assert data.prompts[data.names.index("red_fox")] == ["a photo of a red fox"]
    rows = [[f"folder/{name}/x.png", name] for name in own]
    assert named(load(f"csv:{table(tmp_path / 'a.csv', rows)}")) == dict(enumerate(own))
    cars = load(f"cars@{folder(tmp_path / 'cars', ['McLaren MP4-12C Coupe 2012'])}")
    assert cars.names == ["McLaren MP4-12C Coupe 2012"]


def test_labels_of_three_sets_are_made_readable(tmp_path):
    data = load(f"cub200@{folder(tmp_path / 'birds', ['001.Black_footed_Albatross'])}")
    assert data.names == ["Black footed Albatross"] and zeroshot_datasets.ENTRIES["sun397"].readable
    assert load(f"ucf101@{folder(tmp_path / 'acts', ['ApplyEyeMakeup'])}").names == ["Apply Eye Makeup"]


def test_a_probe_of_own_folders(tmp_path):
    for part, classes in (("train", ["a", "b", "c"]), ("test", ["c", "b"]), ("validation", ["b"])):
        folder(tmp_path / part, classes)
    data = load(f"probe/folder:{tmp_path}")
    train, held, test = data.tasks[""]
    assert (train.tolist(), held.tolist(), test.tolist()) == ([0, 1, 2], [1], [1, 2])
    assert data.name == f"probe/folder:{tmp_path}" and data.card.data == str(tmp_path)


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("imagenett", "did you mean 'imagenet' or 'imagenet_"),
        ("imagenet@", "did you mean 'imagenet'"),
        ("gtsr@/x", "did you mean 'gtsrb@PATH'"),
        ("folder:", ""),
        ("nothing@/tmp", ""),
        ("probe/csv:labels/a.csv", "probe/folder:PATH"),
        ("probe/cifar1", "did you mean 'probe/cifar10'"),
    ],
)
def test_an_unknown_set_has_the_nearest_names(spec, meant):
    with pytest.raises(UserError, match=r"unknown evaluation set .* --help lists the names") as error:
        registry.check(spec)
    assert repr(spec) in str(error.value) and meant in str(error.value) and len(str(error.value)) < 300


# What the hash of a set covers.


def test_other_images_with_the_same_labels_have_another_hash(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcd":
        PIL.Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "small.png")
    one, other = (
        load(f"csv:{table(tmp_path / f'{i}.csv', [[f'{x}.png', x in 'ac'] for x in part])}").card
        for i, part in enumerate(("ab", "cd"))
    )
    assert one.split_hash != other.split_hash
    shutil.copy(tmp_path / "small.png", tmp_path / "b.png")  # of another size
    assert load(f"csv:{tmp_path / '0.csv'}").card.split_hash != one.split_hash


@pytest.mark.parametrize("spec", ["folder:{}", "cub200@{}", "finetuned/folder:{}"])
def test_the_place_of_a_set_and_its_times_are_not_in_the_hash(spec, tmp_path):
    path = folder(tmp_path / "one", ["cat", "dog"])
    copy = tmp_path / "far" / "away" / "two"
    shutil.copytree(path, copy)
    os.utime(copy / "cat" / "x.png", (0, 0))
    first, second = (load(spec.format(p)).card.split_hash for p in (path, copy))
    assert first == second
    (copy / "cat" / "x.png").rename(copy / "cat" / "y.png")
    assert load(spec.format(copy)).card.split_hash != first
    (copy / "cat" / "y.png").rename(copy / "cat" / "x.png")
    (copy / "cat").rename(copy / "cow")
    assert load(spec.format(copy)).card.split_hash != first


def test_the_hash_of_a_probe_covers_each_split(tmp_path):
    for part in ("train", "test"):
        folder(tmp_path / part, ["a", "b"])
    first = load(f"probe/folder:{tmp_path}").card.split_hash
    (tmp_path / "train" / "a" / "x.png").rename(tmp_path / "train" / "a" / "y.png")
    assert load(f"probe/folder:{tmp_path}").card.split_hash != first


def test_the_hash_of_a_tfds_set_covers_version_and_split(monkeypatch):
    class Info:
        def __init__(self, version):
            self.version, self.features = version, {"label": tfds.features.ClassLabel(num_classes=10)}

    source, hashes = [{"image": np.zeros((9, 9, 3), np.uint8), "label": 3}] * 2, set()
    for version, data in (("1", source), ("2", source), ("2", source[:1])):
        opened = data, Info(version)
        monkeypatch.setattr(zeroshot_datasets, "open_tfds", lambda *_, opened=opened: opened)
        hashes |= {load(f"{probe}mnist").card.split_hash for probe in ("", "probe/")}
    assert len(hashes) == 6
