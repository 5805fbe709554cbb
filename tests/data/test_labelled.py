import json
import operator
import os
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torchvision

from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, labelled, loader, sources
from xclip_jax.data.readers import tfds


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
    folder = torchvision.datasets.ImageFolder(path)
    return [(os.path.relpath(file, path), label) for file, label in folder.samples], folder.classes


def as_ours(path):
    paths, labels, names = labelled.read_files("set", path)
    return list(zip((str(p.relative_to(path)) for p in paths.paths), labels.tolist(), strict=True)), names


def test_a_folder_of_classes_is_torchvisions(tmp_path):
    root = tree(tmp_path / "set")
    expected = as_torchvision(root)
    assert expected[1] == ["0", "10", "9", "Zebra", "ant", "new york"] and len(expected[0]) == 13
    picture(root / ".git" / "x.png").rename(root / ".y.png")
    assert as_ours(root) == expected  # without what is hidden
    (root / ".git").rmdir()
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
    assert sorted(labelled.images_in(root)) == sorted([*expected, str(root / "ant" / "other" / "c.png")])


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
    source = sources.open_labelled(f"csv:{table(tmp_path / 't.csv', text)}")
    assert source.names == ["cat", "dog"] and source.multilabel and source.labels().dtype == bool
    assert source.labels().tolist() == [[True, True], [False, False], [True, False]]
    with pytest.raises(UserError, match="several labels"):
        labelled.check_one_class("t", source)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"path,label\n0.png,cat\n\n1.png, \n", r"1\.png"),
        (b"path,label\n0.png,cat\nnone.png,dog\n", r"none\.png"),
        (b"path,label\n0.png\x00,cat\n", r"t\.csv"),
        (b"path,label\n0.png,New York, NY\n", r"t\.csv.*Expected 2 columns, got 3"),
        (b"file,label\n0.png,cat\n", r"t\.csv.*path and label"),
        (b"path,label\n", r"t\.csv"),
        (b"", r"t\.csv"),
        (b"path,label\n0.png,caf\xe9\n", r"t\.csv.*can't decode byte 0xe9"),
        (None, "'empty one'"),
    ],
)
def test_read_files__names_the_fault(tmp_path, text, named):
    path = tree(tmp_path / "set") if text is None else table(tmp_path / "t.csv", "")
    (path / "empty one").mkdir() if text is None else path.write_bytes(text)
    with pytest.raises(UserError, match=rf"^set: .*{named}"):
        labelled.read_files("set", path)


def test_encodings_of_a_table(tmp_path, monkeypatch):
    text = "path,label\n0.png,café\n1.png,zoo\n2.png,zoo\n"
    marked = sources.open_labelled(f"csv:{table(tmp_path / 'bom.csv', text, 'utf-8-sig')}")
    assert marked.names == ["café", "zoo"] and marked.labels().tolist() == [0, 1, 1]
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
    root = root.rename(tmp_path / "moved")
    assert json.loads(json.dumps(sources.open_labelled(f"folder:{root}").fingerprint())) == card
    hashes = {card["hash"]}
    for change in (
        lambda: picture(root / "0" / "b.png", size=99),
        lambda: (root / "0" / "b.png").rename(root / "0" / "c.png"),
        lambda: picture(root / "9" / "c.png", size=99),
    ):
        change()
        hashes.add(sources.open_labelled(f"folder:{root}").fingerprint()["hash"])
    assert len(hashes) == 4
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
    assert base.display_name(fields[0], 0) == "record 0"


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


def test_open_sources__labels_fit_each_other_and_the_model(tmp_path):
    a, b, same, one = folders(tmp_path, a=("cat", "dog"), b=("cat", "fox"), c=("cat", "dog"), d=("cat",))
    texts = f"glue:cola@{glue_folder(tmp_path / 'cola', 'cola')}/train"
    assert len(sources.open_sources(config(a, same), 2, ("image", "label"))) == 2
    assert sources.open_sources(config(texts), 2, ("text", "label"))
    for specs, classes, field, named in (
        ((a, b), 2, "image", "'folder:.*b' has other classes than 'folder:.*a'"),
        ((a, same), 3, "image", r"objective\.classify\.classes is 3"),
        ((a,), 2, "text", r"'folder:.*a' has images.*objective\.classify\.tower"),
        ((texts,), 2, "image", r"'glue:cola.*' has texts.*objective\.classify\.tower"),
        ((one,), 1, "image", "has one class, 'cat'"),
    ):
        with pytest.raises(UserError, match=named):
            sources.open_sources(config(*specs), classes, (field, "label"))
