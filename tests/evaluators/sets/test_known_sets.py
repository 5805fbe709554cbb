import io
import json
import os
import shutil

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from tests.helpers.encoding import SIZE, make_encoder, small_model
from xclip_jax.core.errors import UserError
from xclip_jax.data.config import DataConfig
from xclip_jax.evaluators import prompts, registry
from xclip_jax.evaluators.prompts import PROFILES
from xclip_jax.evaluators.sets import known_sets

OPENAI = PROFILES["openai"]


# TFDS.


def evaluate(data):
    return registry.evaluator(make_encoder(), data).run(small_model()[1])


def records(builder, split, decoders):
    """What TFDS would give of any set: an encoded image, labels at both ends.

    TFDS's own random records need TensorFlow for encoded images.
    """
    png = io.BytesIO()
    PIL.Image.fromarray(np.full((9, 12, 3), 7, np.uint8)).save(png, "png")
    found = []
    for i in range(3):
        record = {"image": png.getvalue()}
        for key, feature in builder.info.features.items():
            if isinstance(feature, tfds.features.ClassLabel):
                ids = {"imagenet_a": prompts.IMAGENET_A, "imagenet_r": prompts.IMAGENET_R}.get(builder.name)
                record[key] = ids[i] if ids else (0, 1, feature.num_classes - 1)[i]
            elif key == "labels":
                record[key] = np.array([0, i, 19])
        found.append(record)
    return found


WAYS = {
    "imagenet": 1000, "imagenet_a": 200, "imagenet_r": 200, "food101": 101, "cifar100": 100, "cub200": 200,
    "sun397": 397, "cars": 196, "voc2007": 20, "dtd": 47, "pets": 37, "caltech101": 102, "flowers": 102,
    "eurosat": 10, "resisc45": 45,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, entry in known_sets.ENTRIES.items() if entry.tfds])
def test_every_tfds_set_opens_on_mock_data(name):
    with tfds.testing.mock_data(as_data_source_fn=records):
        data = registry.load(name, SIZE, None, OPENAI)
    entry = known_sets.ENTRIES[name]
    assert data.card.version and data.card.metric == entry.metric and data.card.data == entry.tfds.partition(":")[0]
    assert len(data.prompts) == WAYS.get(name, len(data.prompts)) and len(data.images) == 3
    if entry.metric != "top1":
        assert f"zeroshot/{name}/{entry.metric}" in evaluate(data)


class Info:
    version = "1.2.3"

    def __init__(self, **features):
        self.features = features


def fake(monkeypatch, labels, feature, key="label", picture=np.zeros((9, 12, 3), np.uint8)):  # noqa: B008
    source = [{"image": picture, key: label} for label in labels]
    monkeypatch.setattr(known_sets, "open_tfds", lambda *_: (source, Info(**{key: feature})))


@pytest.mark.parametrize(("name", "ids"), [("imagenet_a", prompts.IMAGENET_A), ("imagenet_r", prompts.IMAGENET_R)])
def test_labels_of_the_thousand_are_renumbered(name, ids, monkeypatch):
    fake(monkeypatch, [ids[0], ids[57], ids[199]], tfds.features.ClassLabel(num_classes=1000))
    data = registry.load(name, SIZE, None, OPENAI)
    whole = prompts.class_names("imagenet1k", [str(i) for i in range(1000)])
    assert data.labels.tolist() == [0, 57, 199] and data.names == [whole[i] for i in ids]
    assert len(data.prompts) == 200 and data.prompts[57][0] == f"a bad photo of a {whole[ids[57]]}."


def test_several_labels_an_image(monkeypatch):
    feature = tfds.features.Sequence(tfds.features.ClassLabel(names=["cat", "dog", "fox"]))
    fake(monkeypatch, [[0, 2], [1], [0, 1]], feature, "labels")
    data = registry.load("voc2007", SIZE, None, OPENAI)
    assert data.labels.tolist() == [[True, False, True], [False, True, False], [True, True, False]]
    metrics = evaluate(data)
    assert 0 < metrics["zeroshot/voc2007/map11"] <= 100 and 0 < metrics["zeroshot/voc2007/map"] <= 100


def test_profiles_set_templates_and_resizing(monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    fake(monkeypatch, [3], tfds.features.ClassLabel(num_classes=1000), picture=picture)
    found = {name: registry.load("imagenet", SIZE, None, profile) for name, profile in PROFILES.items()}
    assert {name: len(data.prompts[0]) for name, data in found.items()} == {"openai": 80, "slip": 7, "open_clip": 80}
    assert (found["openai"].images[0] != found["slip"].images[0]).any()
    expected = PIL.Image.fromarray(picture).resize((SIZE * 50 // 40, SIZE), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found["slip"].images[0], np.asarray(expected)[:, 1 : SIZE + 1])
    assert found["slip"].card.templates == "slip7 (7)" and "bilinear" in found["slip"].card.preprocessing


# Folders and CSV files.


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(path)


def test_top1_top5_is_their_mean(tmp_path):
    for i in range(12):
        write(tmp_path / f"act {i:02d}" / "x.png", 20 * i)
    metrics = {key.rpartition("/")[2]: x for key, x in evaluate(load(f"kinetics700@{tmp_path}")).items() if "@" in key}
    assert metrics["top1_top5"] == pytest.approx((metrics["top1"] + metrics["top5"]) / 2)


# --- class names of labels in files


def folder(path, classes):
    """A picture for each class, whose value is the class's place in `classes`."""
    for i, name in enumerate(classes):
        write(path / name / "x.png", i)
    return path


def labelled_table(path, rows):
    path.write_text("".join(f"{','.join(row)}\n" for row in (["path", "label"], *rows)))
    return path


def load(spec, profile=OPENAI):
    return registry.load(spec, SIZE, None, profile)


def named(data):
    """{value of the picture: name of its class}."""
    return {int(image[0, 0, 0]): data.names[label] for image, label in zip(data.images, data.labels, strict=True)}


def test_classes_named_by_numbers_get_the_name_of_their_number(tmp_path):
    whole = prompts.published("gtsrb")
    path = folder(tmp_path / "folder", [f"{i:05}" for i in range(43)])
    assert named(load(f"gtsrb@{path}")) == dict(enumerate(whole))
    for i in (0, 2, 10):
        write(tmp_path / f"{i}.png", i)
    data = load(f"gtsrb@{labelled_table(tmp_path / 'a.csv', [[f'{i}.png', str(i)] for i in (10, 0, 2)])}")
    assert named(data) == {i: whole[i] for i in (0, 2, 10)} and len(data.prompts) == 43


def test_countries_are_named_by_their_codes(tmp_path):
    countries = dict(zip(known_sets._COUNTRIES.split(), prompts.published("country211"), strict=True))
    assert [countries[x] for x in ("AD", "CW", "MF", "SX", "XK", "ZW")] == [
        "Andorra", "Curacao", "Saint-Martin", "Sint Maarten", "Kosovo", "Zimbabwe"]  # fmt: skip
    assert named(load(f"country211@{folder(tmp_path, list(countries))}")) == dict(enumerate(countries.values()))


def test_labels_of_tfds_are_those_of_files(tmp_path):
    wnids = tfds.builder("imagenet2012:5.1.0").info.features["label"].names
    whole = prompts.published("imagenet1k")
    data = load(f"imagenet_r@{folder(tmp_path / 'r', [wnids[i] for i in prompts.IMAGENET_R[:3]])}")
    assert named(data) == {i: whole[prompts.IMAGENET_R[i]] for i in range(3)} and len(data.prompts) == 200
    data = load(f"eurosat@{folder(tmp_path / 'land', ['SeaLake', 'AnnualCrop'])}")
    assert named(data) == {0: "lake or sea", 1: "annual crop land"}


def test_imagenet_o_equals_clip_benchmarks(tmp_path):
    builder = pytest.importorskip("clip_benchmark.datasets.builder", exc_type=ImportError)
    wnids = builder.all_imagenet_wordnet_ids
    path = folder(tmp_path / "imagenet-o", [wnids[i] for i in prompts.IMAGENET_O])
    theirs = builder.build_dataset("imagenet-o", root=str(path))
    data = load(f"imagenet_o@{path}", PROFILES["open_clip"])
    assert data.names == theirs.classes and data.labels.tolist() == [label for _, label in theirs.samples]
    assert data.prompts == [[text.format(c=name) for text in theirs.templates] for name in theirs.classes]
    with pytest.raises(UserError, match=r"^imagenet_o is not in TFDS; write imagenet_o@PATH, a CSV file"):
        load("imagenet_o")


@pytest.fixture
def objectnet(tmp_path):
    """Two folders of ImageNet's classes and one of none, with red borders; a class may have no images."""
    root = tmp_path / "objectnet-1.0"
    names = {
        "air_freshener": "Air freshener",
        "full_sized_towel": "Bath towel",
        "bench": "Bench",
        "alarm_clock": "Alarm clock",
    }
    in_imagenet = {"Alarm clock": "analog clock; digital clock", "Bath towel": "bath towel", "Bench": "park bench"}
    imagenet = ["bath towel", "analog clock", "digital clock", "park bench"]
    files = {
        "folder_to_objectnet_label.json": json.dumps(names),
        "objectnet_to_imagenet_1k.json": json.dumps(in_imagenet),
        "pytorch_to_imagenet_2012_id.json": json.dumps({i: i for i in range(len(imagenet))}),
        "imagenet_to_label_2012_v2": "".join(f"{name}\n" for name in imagenet),
    }
    (root / "mappings").mkdir(parents=True)
    for name, text in files.items():
        (root / "mappings" / name).write_text(text)
    rng = np.random.default_rng(0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotated, for who looks
    for i, place in enumerate(("air_freshener", "full_sized_towel", "full_sized_towel", "alarm_clock")):
        pixels = np.full((24, 34, 3), (255, 0, 0), np.uint8)
        pixels[2:-2, 2:-2] = rng.integers(0, 250, (20, 30, 3), np.uint8)
        (root / "images" / place).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).convert("RGBA").save(root / "images" / place / f"{i}.png", exif=exif)
    return root


def test_objectnet_equals_clip_benchmarks_without_borders(objectnet, tmp_path):
    module = pytest.importorskip("clip_benchmark.datasets.objectnet", exc_type=ImportError)
    their_root = tmp_path / "theirs"  # where its code copies the mappings
    shutil.copytree(objectnet / "mappings", their_root)
    (their_root / "objectnet-1.0").symlink_to(objectnet)
    (objectnet / "images" / "bench").mkdir()
    write(objectnet / "images" / "bench" / "9.png", 9)
    theirs = module.ObjectNetDataset(str(their_root), transform=None)
    spec = f"objectnet@{objectnet}"
    data = load(spec)
    pairs = [theirs[i] for i in range(len(theirs))]
    assert data.names == theirs.classes == ["alarm clock", "bench", "bath towel"]
    assert data.labels.tolist() == [label for _, label in pairs] == [0, 1, 2, 2]
    for ours, (image, _) in zip(known_sets.read_objectnet(str(objectnet)).images, pairs, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(image)[2:-2, 2:-2])  # like the loader of ObjectNet's authors
    assert data.prompts[2][0] == "a bad photo of a bath towel." and data.card.role == "shifted"
    assert evaluate(data)[f"zeroshot/{spec}/ways"] == 3
    shutil.rmtree(objectnet / "images" / "bench")
    fewer = load(spec)
    assert fewer.names == data.names and fewer.labels.tolist() == [0, 2, 2]
    (objectnet / "images/alarm_clock/3.png").rename(objectnet / "images/alarm_clock/4.png")
    assert load(spec).card.split_hash != fewer.card.split_hash


def test_faults_of_objectnet(objectnet):
    for place in ("full_sized_towel", "alarm_clock"):
        shutil.rmtree(objectnet / "images" / place)
    with pytest.raises(UserError, match=r"^objectnet: '.*' is not in the published layout .*none of 1 folders"):
        load(f"objectnet@{objectnet}")
    (objectnet / "mappings/objectnet_to_imagenet_1k.json").unlink()
    with pytest.raises(UserError, match=r"^objectnet: .*mappings/objectnet_to_imagenet_1k\.json"):
        load(f"objectnet@{objectnet}")
    with pytest.raises(UserError, match=r"its folder objectnet-1\.0"):
        load("objectnet")


def test_labels_that_tfds_knows_once_it_has_prepared_the_set(tmp_path):
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    builder = tfds.builder("cifar10:3.0.2", data_dir=tmp_path / "tfds")
    builder.info.features["label"].names = names
    builder.data_path.mkdir(parents=True)
    builder.info.write_to_directory(builder.data_path)
    for classes in (["0", "3"], ["plane", "cat"]):
        path = folder(tmp_path / classes[0], classes)
        data = registry.load(f"cifar10@{path}", SIZE, str(tmp_path / "tfds"))
        assert named(data) == {0: "plane", 1: "cat"} and data.names == names


@pytest.mark.parametrize(
    ("name", "classes"),
    [("cifar10", list("0123456789")), ("cifar100", list("abcdefghij")), ("ucf101", ["Archery", "7"])],
)
def test_numbers_and_missing_classes_are_refused_if_names_are_not_known(name, classes, tmp_path):
    with pytest.raises(UserError, match=rf"^{name}: '{tmp_path}' .*folder:PATH"):
        registry.load(f"{name}@{folder(tmp_path, classes)}", SIZE, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "classes", "strange"),
    [
        ("gtsrb", [str(i + 1) for i in range(43)], "'1'"),  # from 1, not from 0
        ("gtsrb", ["0", "00"], "'00'"),
        ("fer2013", ["angry", "disgusted", "joy"], "'joy'"),
        ("fer2013", list("0123456"), "'0'"),  # its own 4 is sad, position 4 of the names is neutral
        ("imagenet", ["missile", "tench"], "'missile'"),  # two classes have this name
        ("dtd", ["banded", "cat"], "'cat'"),
    ],
)
def test_classes_that_would_have_to_be_guessed_are_refused(name, classes, strange, tmp_path):
    with pytest.raises(UserError, match=rf"^{name}: {strange} "):
        load(f"{name}@{folder(tmp_path, classes)}")


def test_own_labels_are_names_as_they_are(tmp_path):
    own = ["2.0", "3.5 inch", "1.jpg", "iPhone", "YouTube", "red_fox"]
    data = load(f"folder:{folder(tmp_path / 'folder', own)}")
    assert named(data) == dict(enumerate(own)) and "a photo of a iPhone" in data.prompts[data.names.index("iPhone")]
    name = "McLaren MP4-12C Coupe 2012"
    assert named(load(f"cars@{folder(tmp_path / 'cars', [name])}")) == {0: name}


def test_labels_of_three_sets_are_made_readable(tmp_path):
    path = folder(tmp_path / "birds", [f"{i + 1:03}.Black_footed_Bird{i}" for i in range(200)])
    assert registry.load(f"cub200@{path}", SIZE, str(tmp_path)).names[0] == "Black footed Bird0"
    data = load(f"sun397@{folder(tmp_path / 'sun', ['airplane_cabin', 'bakery shop'])}")
    assert named(data) == {0: "airplane cabin", 1: "bakery shop"} and len(data.prompts) == 397
    assert load(f"ucf101@{folder(tmp_path / 'acts', ['ApplyEyeMakeup'])}").names == ["Apply Eye Makeup"]


def test_a_probe_of_own_folders(tmp_path):
    for part, classes in (("train", ["a", "b", "c"]), ("test", ["c", "b"]), ("validation", ["b"])):
        folder(tmp_path / part, classes)
    data = load(f"probe/folder:{tmp_path}")
    train, held, test = data.tasks[""]
    assert (train.tolist(), held.tolist(), test.tolist()) == ([0, 1, 2], [1], [1, 2])
    assert data.name == f"probe/folder:{tmp_path}" and data.card.data == str(tmp_path)


@pytest.mark.parametrize("spec", ["imagenett", "imagenet@", "gtsr@/x", "folder:", "probe/cifar1", "dense/pet"])
def test_an_unknown_set(spec):
    with pytest.raises(UserError, match=f"unknown evaluation set {spec!r}"):
        registry.check(spec)


def test_a_finetuned_set_has_its_images_in_the_column_of_the_config(tmp_path):
    for i in range(2):
        write(tmp_path / f"{i}.png", i)
    columns = {"photo": [(tmp_path / f"{i}.png").read_bytes() for i in range(2)], "kind": ["cat", "dog"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    spec = f"finetuned/parquet:{tmp_path}/x.parquet?label=kind"
    data = registry.load(spec, SIZE, data=DataConfig(image_column="photo"))
    assert data.names == ("cat", "dog") and [int(item[0, 0, 0]) for item in data.items] == [0, 1]
    with pytest.raises(UserError, match=r"SOURCE\?image=COLUMN&label=COLUMN"):
        registry.load(spec, SIZE)


# What the hash of a set covers.


def test_other_images_with_the_same_labels_have_another_hash(tmp_path):
    for i, name in enumerate(("a", "b", "c")):
        write(tmp_path / f"{name}.png", i)
    one, other = (
        load(f"csv:{labelled_table(tmp_path / f'{x}.csv', [['a.png', '0'], [f'{x}.png', '1']])}").card for x in "bc"
    )
    assert one.split_hash != other.split_hash
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "b.png")  # of another size
    assert load(f"csv:{tmp_path / 'b.csv'}").card.split_hash != one.split_hash


@pytest.mark.parametrize("spec", ["folder:{}", "ucf101@{}", "finetuned/folder:{}"])
def test_the_place_of_a_set_and_its_times_are_not_in_the_hash(spec, tmp_path):
    path = folder(tmp_path / "one", ["cat", "dog"])
    copy = shutil.copytree(path, tmp_path / "far" / "away" / "two")
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
