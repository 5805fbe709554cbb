"""Splits in clip_benchmark's layout: where they are, labels and captions; tests/evaluators/sets has the faults."""

import io
import tarfile

import numpy as np
import pytest

from tests.helpers import bad_tars
from xclip_jax.core.errors import UserError
from xclip_jax.data.readers import wds

IMAGE = bad_tars.jpeg(0)


def write(root, samples, split="test", shard=20, **texts):
    """A data set in tars of `shard` samples, each {suffix: content}, with files of lines beside them."""
    (root / split).mkdir(parents=True)
    for name, lines in ({"classnames": ["fox", "hen"]} | texts).items():
        (root / f"{name}.txt").write_text("\n".join(lines))
    keys = [(f"s{i:03d}", sample) for i, sample in enumerate(samples)]
    tars = [keys[i : i + shard] for i in range(0, len(keys), shard)]
    (root / split / "nshards.txt").write_text(f"{len(tars)}\n")
    for number, inside in enumerate(tars):
        bad_tars.shard(root / split / f"{number}.tar", inside)
    return root


def array(values):
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


def test_a_path_names_a_data_set_or_a_split(tmp_path):
    root = write(tmp_path / "set", [{"jpg": IMAGE, "cls": b"1"}], split="train")
    assert wds.locate(f"{root}/train") == wds.Split(f"wds:{root}/train", root, "train")
    assert wds.locate(str(root)).name == "test"
    with pytest.raises(UserError, match=r"^wds:.*set/test/nshards\.txt'.* clip_benchmark's layout"):
        wds.locate(str(root)).tars()
    with pytest.raises(UserError, match="'wds:hf:nothing'"):
        wds.locate("hf:nothing")


def test_one_class_several_classes_and_captions(tmp_path):
    one = wds.open_labelled(wds.locate(str(write(tmp_path / "one", [{"jpg": IMAGE, "cls": b"1"}]))))
    assert one.labels().tolist() == [1] and one.names == ["fox", "hen"] and one.items[0] == IMAGE
    samples = [{"jpg": IMAGE, "npy": array([1, 0])}, {"jpg": IMAGE, "npy": array([0, 0])}]
    several = wds.open_labelled(wds.locate(str(write(tmp_path / "several", samples, dataset_type=["multilabel"]))))
    assert several.labels().tolist() == [[True, False], [False, False]]
    samples = [{"webp": IMAGE, "jpg": b"", "txt": b"a fox\na hen"}]
    split = wds.locate(str(write(tmp_path / "captions", samples, dataset_type=["retrieval"])))
    images, captions = wds.open_captions(split)
    assert captions == [["a fox", "a hen"]] and images[0] == IMAGE


@pytest.mark.parametrize(
    ("sample", "named"),
    [
        ({"jpg": IMAGE, "cls": b"2"}, "b'2'; expected a number below 2"),
        ({"jpg": IMAGE}, "'s000' .* needs .cls"),
        ({"cls": b"1"}, "'s000' .*.webp"),
    ],
)
def test_faulty_samples_are_named(tmp_path, sample, named):
    with pytest.raises(UserError, match=f"^wds:.*{named}"):
        wds.open_labelled(wds.locate(str(write(tmp_path, [sample]))))


def test_damaged_files_are_named(tmp_path):
    root = write(tmp_path / "set", [{"jpg": IMAGE, "cls": b"1"}])
    with tarfile.open(root / "test" / "0.tar", "a") as tar:
        bad_tars.add(tar, "s000.jpg", IMAGE)
    with pytest.raises(UserError, match=r"0\.tar' .* has 's000\.jpg' twice"):
        wds.open_labelled(wds.locate(str(root)))
    (root / "classnames.txt").write_bytes("caf\xe9\nfox".encode("latin-1"))
    with pytest.raises(UserError, match=r"classnames\.txt' is not UTF-8"):
        wds.open_labelled(wds.locate(str(root)))
