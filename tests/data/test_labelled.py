import json
import operator
import os
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torchvision

from tests.helpers import tiny
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, labelled, loader, sources
from xclip_jax.data.readers import tfds
from xclip_jax.train import trainer


def picture(path, value=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)
    return path


def tree(root):
    """A folder of classes as people have them: nested, with numbers, other formats, hidden and foreign files."""
    for name in ("10", "9", "0", "Zebra", "ant", "new york", "ant/deeper/er"):
        picture(root / name / "b.png")
    for file in ("ant/B.PNG", "ant/a.jpeg", "ant/deeper/a.tif", "9/x.ppm", "9/y.webp", "Zebra/a.bmp"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture(root / file)
    (root / "ant" / "notes.txt").write_text("no image")
    (root / "README.md").write_text("no class")
    picture(root / "loose.png")
    return root


def as_torchvision(path):
    """Files and labels of `path` as torchvision's ImageFolder reads it, and its classes."""
    folder = torchvision.datasets.ImageFolder(path)
    return [(os.path.relpath(file, path), label) for file, label in folder.samples], folder.classes


def as_ours(path):
    paths, labels, names = labelled.read_files("set", path)
    return list(zip((str(p.relative_to(path)) for p in paths.paths), labels.tolist(), strict=True)), names


def test_a_folder_of_classes_is_torchvisions(tmp_path):
    root = tree(tmp_path / "set")
    expected = as_torchvision(root)
    assert expected[1] == ["0", "10", "9", "Zebra", "ant", "new york"] and len(expected[0]) == 13
    assert as_ours(root) == expected
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    os.symlink(tree(tmp_path / "other") / "ant", root / "linked")
    assert as_ours(tmp_path / "link") == as_torchvision(tmp_path / "link")
    assert len(as_ours(root)[1]) == 7


def test_links_that_lead_back_are_not_followed(tmp_path):
    root = tree(tmp_path / "set")
    expected = sorted(labelled.images_in(root))
    (root / "all").symlink_to(root)
    (root / "ant" / "above").symlink_to(tmp_path)
    assert sorted(labelled.images_in(root)) == expected
    (tmp_path / "other").mkdir()
    picture(tmp_path / "other" / "c.png")
    (tmp_path / "other" / "back").symlink_to(root / "ant")  # from ant to other and back
    (root / "ant" / "other").symlink_to(tmp_path / "other")
    assert sorted(labelled.images_in(root)) == sorted([*expected, root / "ant" / "other" / "c.png"])


def test_hidden_folders_and_files_are_not_of_the_set(tmp_path):
    root = tree(tmp_path / "set")
    expected = as_torchvision(root)
    for hidden in (".git/x.png", ".ipynb_checkpoints/a.png", "ant/._a.jpeg", "ant/.ipynb_checkpoints/a-checkpoint.png"):
        (root / hidden).parent.mkdir(exist_ok=True)
        picture(root / "0" / "b.png").rename(root / hidden)
        picture(root / "0" / "b.png")
    (root / ".empty").mkdir()
    assert as_ours(root) == expected


def test_a_class_without_images_is_named(tmp_path):
    root = tree(tmp_path / "set")
    (root / "empty one").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("a")
    with pytest.raises(FileNotFoundError):
        torchvision.datasets.ImageFolder(root)
    with pytest.raises(UserError, match=r"^set: 2 class folders of '.*' contain no images, 'empty one' first"):
        labelled.read_files("set", root)


def table(path, text, encoding="utf-8"):
    for i in range(3):
        picture(path.parent / f"{i}.png", i, size=8 + i)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (("cat", " ant ", "cat"), ["ant", "cat"], [1, 0, 1]),
        (("10", "9", "10"), ["9", "10"], [1, 0, 1]),
        (("2020", "2019", "2019"), ["2019", "2020"], [1, 0, 0]),
        (("1", "0", "2"), ["0", "1", "2"], [1, 0, 2]),
        (("01", "02", "01"), ["01", "02"], [0, 1, 0]),
        (("-1", "1", "-1"), ["-1", "1"], [0, 1, 0]),
        (("1000000000", "9", "²"), ["1000000000", "9", "²"], [0, 1, 2]),
        (("9" * 5000, "1", "1"), ["1", "9" * 5000], [1, 0, 0]),
        (("Ångström", "zoo", "a, b"), ["a, b", "zoo", "Ångström"], [2, 1, 0]),
    ],
)
def test_labels_of_a_table_are_names(tmp_path, labels, names, expected):
    rows = "".join(f'{i}.png,"{label}"\n' for i, label in enumerate(labels))
    paths, found, classes = labelled.read_files("set", table(tmp_path / "t.csv", f"path,label\n{rows}"))
    assert classes == names and found.tolist() == expected and len(paths) == 3


def test_several_labels_and_none(tmp_path):
    text = "path,label\n0.png,cat | dog\n1.png,\n2.png,cat|\n"
    _, labels, classes = labelled.read_files("set", table(tmp_path / "t.csv", text))
    assert classes == ["cat", "dog"] and labels.dtype == bool
    assert labels.tolist() == [[True, True], [False, False], [True, False]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n0.png,cat\n\n1.png, \n", r"'1\.png' has no label"),
        ("path,label\n0.png,cat\n,dog\n", r"1 images do not exist"),
        ("path,label\n0.png,New York, NY\n", r"t\.csv' is not .*Expected 2 columns, got 3: 0\.png,New York, NY"),
        ("path,label\n0.png\x00,cat\n", r"1 images do not exist"),
        ("file,label\n0.png,cat\n", r"'.*t\.csv' is not a CSV file with the columns path and label"),
        ("path,label\n", r"no row has a label"),
        ("", r"Empty CSV file"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"^set: .*{message}"):
        labelled.read_files("set", table(tmp_path / "t.csv", text))


def test_encodings_of_a_table(tmp_path, monkeypatch):
    text = "path,label\n0.png,café\n1.png,zoo\n2.png,zoo\n"
    marked = sources.open_labelled(f"csv:{table(tmp_path / 'bom.csv', text, 'utf-8-sig')}")
    assert marked.names == ["café", "zoo"] and marked.labels().tolist() == [0, 1, 1]
    with pytest.raises(UserError, match=r"'.*latin\.csv' is not .*can't decode byte 0xe9"):
        sources.open_labelled(f"csv:{table(tmp_path / 'latin.csv', text, 'latin-1')}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.open_labelled("csv:~/bom.csv").names == marked.names
    tree(tmp_path / "set")
    assert len(sources.open_labelled("folder:~/set")) == 13
    table(tmp_path / "home.csv", "path,label\n~/0.png,a\n")
    assert len(sources.open_labelled("csv:~/home.csv")) == 1


def test_a_pipe_and_a_giant_file_are_bad_samples(tmp_path):
    source = sources.open_labelled(f"folder:{tree(tmp_path / 'set')}")
    source.items.paths[3].unlink()
    os.mkfifo(source.items.paths[3])
    with pytest.raises(BadSample, match=r"file cannot be read: .*not a regular file"):
        source[3]
    os.truncate(source.items.paths[2], 1 << 40)  # takes no room on the disk
    with pytest.raises(BadSample, match=r"file too large: .*larger than 268,435,456 bytes"):
        source[2]


def test_a_card_says_what_was_read(tmp_path):
    root = tree(tmp_path / "set")
    card = sources.open_labelled(f"folder:{root}").fingerprint()
    assert card["samples"] == 13 and card["classes"][-2:] == ["ant", "new york"]
    assert card == json.loads(json.dumps(sources.open_labelled(f"folder:{root}").fingerprint()))
    root.rename(tmp_path / "moved")
    assert sources.open_labelled(f"folder:{tmp_path / 'moved'}").fingerprint() == card
    root = tmp_path / "moved"
    digests = {card["hash"]}

    def changed():
        digests.add(sources.open_labelled(f"folder:{root}").fingerprint()["hash"])
        return len(digests)

    picture(root / "0" / "b.png", size=99)
    assert changed() == 2  # a size
    (root / "0" / "b.png").rename(root / "0" / "c.png")
    assert changed() == 3  # a name
    (root / "0" / "c.png").rename(root / "9" / "c.png")
    picture(root / "0" / "c.png", size=99)
    assert changed() == 4  # a file more
    text = "path,label\n0.png,a\n1.png,b\n2.png,b\n"
    source = sources.open_labelled(f"csv:{table(tmp_path / 't.csv', text)}")
    assert source.fingerprint()["classes"] == ["a", "b"]
    other = sources.open_labelled(f"csv:{table(tmp_path / 't.csv', text.replace('1.png,b', '1.png,a'))}")
    assert other.fingerprint()["hash"] != source.fingerprint()["hash"]  # a label


def glue_folder(path, task):
    path.mkdir()
    text = "gj04\t1\t\tA sentence.\ngj04\t0\t*\tB sentence\n"
    if task == "stsb":
        text = "sentence1\tsentence2\tscore\na\tb\t1.5\nc\td\t2.5\n"
    (path / "train.tsv").write_text(text)
    return path


def test_cards_of_texts(tmp_path):
    cola = sources.open_labelled(f"glue:cola@{glue_folder(tmp_path / 'c', 'cola')}/train").fingerprint()
    assert cola["samples"] == 2 and cola["classes"] == ["0", "1"]
    stsb = sources.open_labelled(f"glue:stsb@{glue_folder(tmp_path / 's', 'stsb')}/train").fingerprint()
    assert stsb["samples"] == 2 and "classes" not in stsb and stsb["hash"] != cola["hash"]


def test_a_record_is_read_once_for_its_item_and_label():
    class Records(list):
        reads = 0

        def __getitem__(self, index):
            Records.reads += 1
            return super().__getitem__(index)

    records = Records([{"image": b"x", "label": 1}, {"image": b"y", "label": 0}])
    fields = base.field(records, "image"), base.field(records, "label")
    both = operator.itemgetter("image", "label")
    source = labelled.Labelled("image", *fields, ["a", "b"], identity=("set",), read=lambda i: both(records[i]))
    assert [(source[i]["image"], source[i]["label"]) for i in (0, 1)] == [(b"x", 1), (b"y", 0)] and Records.reads == 4


def test_a_card_of_tfds(monkeypatch):
    records = [{"image": b"", "label": 0}, {"image": b"", "label": 1}]
    features = {"image": None, "label": SimpleNamespace(names=["a", "b"])}
    versions = iter(["1.0.0", "1.0.0", "1.0.0", "2.0.0"])
    monkeypatch.setattr(
        tfds, "open_tfds", lambda *_: (records, SimpleNamespace(features=features, version=next(versions)))
    )
    first, same, split, version = (
        sources.open_labelled(f"tfds:set/{split}").fingerprint() for split in ("train", "train", "test", "train")
    )
    assert first == same and first["samples"] == 2 and first["classes"] == ["a", "b"]
    assert len({card["hash"] for card in (first, split, version)}) == 3


def config(*specs, **changes):
    return loader.DataConfig(sources=specs, **changes)


def folders(root, **classes):
    for name, labels in classes.items():
        for label in labels:
            picture(root / name / label / "a.png")
    return [f"folder:{root / name}" for name in classes]


def test_mixed_sources_have_the_same_classes(tmp_path):
    a, b, same = folders(tmp_path, a=("cat", "dog"), b=("cat", "fox"), c=("cat", "dog"))
    assert len(sources.open_sources(config(a, same), 2)) == 2
    message = r"sources '.*/a' and '.*/b' have different classes; they must be the same, in"
    with pytest.raises(UserError, match=message):
        sources.open_sources(config(a, b), 2)
    with pytest.raises(UserError, match=r"has 2 classes, expected 3; "):
        sources.open_sources(config(a, same), 3)


def test_the_tower_reads_what_the_source_has(tmp_path):
    (images,) = folders(tmp_path, a=("cat", "dog"))
    texts = f"glue:cola@{glue_folder(tmp_path / 'c', 'cola')}/train"
    assert sources.open_sources(config(images), 2, ("image", "label"))
    assert sources.open_sources(config(texts), 2, ("text", "label"))
    with pytest.raises(UserError, match=r"source 'folder:.*a' has images and the model learns from texts; "):
        sources.open_sources(config(images), 2, ("text", "label"))
    with pytest.raises(UserError, match=r"source 'glue:cola.*' has texts and the model learns from images; "):
        sources.open_sources(config(texts), 2, ("image", "label"))


def test_items_of_any_records_have_names():
    assert base.display_name(base.field([{"image": b""}], "image"), 0) == "record 0"


def test_a_run_names_the_key_of_the_objective(tmp_path):
    (images,) = folders(tmp_path, a=("cat", "dog"))
    texts = f"glue:cola@{glue_folder(tmp_path / 'c', 'cola')}/train"
    for spec, classes, message in (
        (images, 3, r"has 2 classes, expected 3; use another source, or change objective\.classify\.classes"),
        (texts, 2, r"has texts and the model learns from images; use another source, or change .* or \.tower"),
    ):
        c = tiny.config("classify", run=tmp_path / "run", data__sources=(spec,), objective__classify__classes=classes)
        with pytest.raises(UserError, match=message):
            trainer.run(c)


def test_decoded_images_keep_their_fingerprint(tmp_path):
    (spec,) = folders(tmp_path, a=("cat", "dog"))
    c = config(spec, cache=True)
    (source,) = loader.sample_order(sources.open_sources(c, 2), c, 0).sources
    assert isinstance(source, sources.Decoded)
    assert source.fingerprint() == sources.open_labelled(spec).fingerprint()
