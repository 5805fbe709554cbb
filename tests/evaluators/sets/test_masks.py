"""Sets of images with masks, in files and in TFDS."""

import io

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from tests.helpers.encoding import PREPARE, SIZE, by_name, make_encoder, small_model
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import registry


def write(path, palette=False):
    """A folder of masks; images are larger than the model's, and not square."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 6)):
        for kind in ("images", "masks"):
            (path / part / kind).mkdir(parents=True)
        for i in range(n):
            mask = (rng.random((14, 20)) < 0.5).astype(np.uint8)
            image = PIL.Image.fromarray((200 * mask[..., None]).repeat(3, axis=-1))
            image.save(path / part / "images" / f"{i:02}.jpg")
            picture = PIL.Image.fromarray(mask)
            if palette:
                picture.putpalette([9, 9, 9, 250, 0, 0])
            picture.save(path / part / "masks" / f"{i:02}.png")
    (path / "classes.txt").write_text("ground\nthing\n")
    return f"dense/folder:{path}"


@pytest.mark.parametrize("palette", [False, True])
def test_a_folder_of_masks(tmp_path, palette):
    spec = write(tmp_path, palette)
    (tmp_path / "test" / "masks" / ".hidden").write_text("")
    [evaluator] = registry.open_all([spec], make_encoder())
    data = evaluator.data
    assert [len(part.images) for part in data.parts] == [12, 0, 6] and data.classes == ["ground", "thing"]
    assert data.card.metric == "miou" and data.card.split_hash and data.card.preprocessing == PREPARE.resizing
    image, mask = data.test.images[0], data.test.masks[0]
    assert image.shape == (SIZE, SIZE, 3) and mask.shape == (14, 20) and set(np.unique(mask)) == {0, 1}
    if not palette:
        metrics = by_name(registry.measure(evaluator, small_model()[1]))[0]
        assert metrics[f"dense/{spec}/n"] == 6 and f"dense/{spec}/iou/thing" in metrics


def save(path, array):
    PIL.Image.fromarray(array).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "classes.txt").unlink(), "classes.txt' cannot be read .*write the names of the classes"),
        (lambda p: (p / "classes.txt").write_text("thing\nthing\n"), "has 2 names; expected 2 to 255 different ones"),
        (lambda p: (p / "test/masks").rename(p / "test/mask"), "test/masks' does not exist; a part has"),
        (lambda p: (p / "test/masks/03.png").unlink(), "images/03.jpg' has no mask of its name"),
        (lambda p: (p / "train/images/03.jpg").unlink(), "masks/03.png' has no image of its name"),
        (lambda p: (p / "train/images/03.png").write_bytes(b""), "03.jpg' and '03.png' have one name"),
        (lambda p: save(p / "test/masks/03.png", np.zeros((20, 14), np.uint8)), "14 x 20 pixels and its image 20 x 14"),
        (lambda p: save(p / "test/masks/03.png", np.zeros((14, 20, 3), np.uint8)), "pixels of mode RGB; save class"),
        (lambda p: save(p / "test/masks/00.png", np.full((14, 20), 2, np.uint8)), "masks/00.png' has the value 2"),
        (lambda p: (p / "test/masks/00.png").write_bytes(b"<html>"), "masks/00.png' cannot be read .*save it again"),
    ],
)
def test_a_wrong_folder(tmp_path, spoil, message):
    spec = write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        registry.open_all([spec], make_encoder())
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_names():
    assert registry.check("dense/folder:/data/voc").__name__ == "DenseSets"
    with pytest.raises(UserError, match="dense/pets"):
        registry.check("dense/pet")
    with pytest.raises(UserError, match="'/nowhere' does not exist"):
        registry.load("dense/folder:/nowhere", SIZE)


def test_a_turned_image_has_its_masks_size(tmp_path):
    spec = write(tmp_path)
    image = PIL.Image.new("RGB", (14, 20))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "test/images/03.jpg", exif=exif)
    assert registry.load(spec, PREPARE).test.images[3].shape == (SIZE, SIZE, 3)


def test_pets_outlines_have_no_class():
    def records(builder, split, decoders):
        assert "image" in decoders
        png, trimap = io.BytesIO(), np.ones((9, 12, 1), np.uint8)
        trimap[:, 6:], trimap[:, 5] = 2, 3
        PIL.Image.new("RGB", (12, 9)).save(png, "png")
        return [{"image": png.getvalue(), "segmentation_mask": trimap}] * 3

    with tfds.testing.mock_data(as_data_source_fn=records):
        data = registry.load("dense/pets", PREPARE)
    assert [len(part.images) for part in data.parts] == [3, 0, 3] and data.classes == ["pet", "background"]
    assert data.train.masks[0][0].tolist() == [0] * 5 + [255] + [1] * 6
    assert data.card.data == "oxford_iiit_pet" and data.card.version and data.card.split_hash
