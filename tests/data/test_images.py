"""Transparent and rotated images: they are read alike wherever a model is used, and exports say how."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

import xclip_jax
from tests.helpers import bad_tars, tiny
from tests.helpers.foreign import make_hf, our_model
from xclip_jax import interop
from xclip_jax.commands import embed, inputs
from xclip_jax.commands.export import export
from xclip_jax.config import recipes
from xclip_jax.config.schema import resolve
from xclip_jax.data import images, loader, sources, tokenizer
from xclip_jax.data.embeddings import read as read_embeddings
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.train import weights

SIDE = 2 * tiny.SIZE


def cut_out():
    """A red square in the middle, fully opaque, and transparent green around it; with alpha from 0 to 255 below."""
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[..., 1] = 200
    pixels[8:24, 8:24] = (220, 10, 10, 255)
    pixels[24:, :, 3] = np.linspace(0, 255, SIDE)
    return Image.fromarray(pixels)


def sixteen_bits():
    pixels = np.asarray(cut_out()).astype(np.uint16)[..., [2, 1, 0, 3]] * 257
    return cv2.imencode(".png", pixels)[1].tobytes()


def grey_value():
    """16 bits of grey, one value of which is transparent."""
    pixels = np.full((SIDE, SIDE), 30_000, np.uint16)
    pixels[:9] = 1_000
    return bad_tars.encode(Image.fromarray(pixels), "PNG", transparency=1_000)


def files():
    image = cut_out()
    palette = image.convert("RGB").quantize(8)
    return {
        "alpha": bad_tars.encode(image, "PNG"),
        "palette": bad_tars.encode(palette, "PNG", transparency=0),
        "grey": bad_tars.encode(image.convert("LA"), "PNG"),
        "sixteen": sixteen_bits(),
        "grey of 16 bits": grey_value(),
        "colour": bad_tars.encode(image.convert("RGB"), "PNG", transparency=(0, 200, 0)),
        "gif": bad_tars.encode(image, "GIF"),
        "webp": bad_tars.encode(image, "WEBP", lossless=True),
        "tiff": bad_tars.encode(image, "TIFF"),
    }


def on_white(data):
    """The image on white by the definition, as float (h, w, 3)."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(float)
        values = np.where(values == image.info["transparency"], 255, values // 256)
        return values[..., None].repeat(3, axis=2)
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return alpha * pixels[..., :3] + (1 - alpha) * 255


@pytest.mark.parametrize("name", files())
def test_every_kind_of_transparency_is_laid_on_white(name):
    data = files()[name]
    expected = on_white(data)
    assert (expected == 255).all(axis=2).any()
    assert np.abs(images.decode(data) - expected).max() <= 1
    there = Preprocessing(tiny.SIZE)(images.decode(data))
    assert np.array_equal(Preprocessing(tiny.SIZE, background=images.WHITE)(data), there)
    # What lies under it is read only where that is asked for.
    assert not np.array_equal(images.decode(data, background=images.DROPPED), images.decode(data))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    picture = bad_tars.picture(5, w=tiny.SIZE, h=tiny.SIZE)  # neither resized nor cropped
    (folder / "9.jpg").write_bytes(bad_tars.encode(picture, quality=98, exif=bad_tars.exif(6)))
    for i, data in enumerate(files().values()):
        (folder / f"{i}.png").write_bytes(data)
    for image in list(folder.iterdir()):
        image.with_suffix(".txt").write_text(f"picture {image.stem}")
    return folder


@pytest.mark.parametrize(("decoding", "cache"), [("xclip", False), ("open_clip", True), ("transformers", True)])
def test_a_file_has_the_same_features_everywhere(decoding, cache, pairs, tmp_path, capsys):
    """In training, from a path, bytes and Pillow, and in the file that embed writes."""
    model = xclip_jax.load(tiny.untrained(tmp_path / "run", "clip", data__decoding=decoding))
    paths = sorted([*pairs.glob("*.png"), *pairs.glob("*.jpg")])
    features = model.encode_image(paths)
    np.testing.assert_array_equal(model.encode_image([path.read_bytes() for path in paths]), features)
    np.testing.assert_allclose(
        model.encode_image([Image.open(io.BytesIO(path.read_bytes())) for path in paths]), features, atol=1e-2
    )
    embed.embed(model, {"image": inputs.open_images(str(pairs))}, str(tmp_path / "x.parquet"))
    np.testing.assert_allclose(read_embeddings(tmp_path / "x.parquet")["embedding"], features, atol=1e-6)
    # A training crop of the whole image, bicubic, is what evaluation sees.
    c = tiny.config("clip", data__decoding=decoding, data__cache=cache, data__sources=(f"folder:{pairs}",),
                    data__crop_scale=(1.0, 1.0), data__resample="bicubic", data__batch=10)  # fmt: skip
    data = resolve(c).data
    order = loader.sample_order(sources.open_sources(data), data, 0)
    transform = loader.Transform(data, tiny.SIZE, tokenizer.load("bytes"), tiny.LENGTH)
    rows = next(iter(loader.batches(order, transform, batch=10, start=0, stop=1, seed=0)))["image"]
    numbers = [order.locate(position)[1] for position in range(10)]
    expected = np.stack([model.prepare(paths[number]) for number in numbers]).astype(int)
    # open_clip resizes an evaluated image before it drops alpha.
    assert np.array_equal(rows, expected) == (decoding != "open_clip")
    stored = Image.open(pairs / "9.jpg")
    photograph = np.asarray(ImageOps.exif_transpose(stored) if decoding == "xclip" else stored).astype(int)
    for pixels in (rows[numbers.index(9)], model.prepare(pairs / "9.jpg"), model.prepare(stored)):
        assert np.abs(pixels - photograph).max() <= 2
    capsys.readouterr()


def test_weights_of_others_keep_their_own_way(tmp_path):
    make_hf("gelu", 1e-5, 49407, 4).save_pretrained(tmp_path / "hf")
    there = xclip_jax.load(tmp_path / "hf").preprocessing
    assert (there.background, there.exif_rotation) == (images.WHITE, False)
    config = recipes.base("clip", "Ti/12")
    assert config.data.decoding == "xclip"
    weights.adopt(config, str(tmp_path / "hf"))
    assert config.data.decoding == "transformers"


def test_exports_keep_it_or_say_that_they_cannot(tmp_path):
    config, variables = our_model("clip")
    assert config["data"]["decoding"] == "xclip"
    for to in ("safetensors", "hf", "open_clip"):
        interop.write(variables, config, str(tmp_path / "from"))
        export(str(tmp_path / "from"), str(tmp_path / to), to=to)
        card = (tmp_path / to / "README.md").read_text()
        assert "Transparent images are laid on white before they are resized" in card
        assert ("does not do: do so before." in card) == (to == "open_clip")
        assert ("which transformers does from 5.21 on: do so before with an older version" in card) == (to == "hf")
        assert "Images are rotated by their EXIF tag" in card
        assert ("do so before, as PIL.ImageOps.exif_transpose does" in card) == (to != "safetensors")
        again = interop.read(str(tmp_path / to))[0]["data"]
        assert again["decoding"] == {"safetensors": "xclip", "hf": "transformers", "open_clip": "open_clip"}[to]
    config["data"]["decoding"] = "open_clip"
    interop.write(variables, config, str(tmp_path / "from"))
    export(str(tmp_path / "from"), str(tmp_path / "dropped"), to="hf")
    assert (
        "is dropped, which transformers does not do from 5.21 on: do so" in (tmp_path / "dropped/README.md").read_text()
    )


def test_an_exif_block_that_cannot_be_read_costs_no_image():
    """As a program leaves it that overwrites what it should remove; the image is shown unrotated by browsers."""
    whole = bad_tars.encode(bad_tars.picture(0, w=24, h=16), quality=100, exif=bad_tars.exif(6))
    assert images.decode(whole).shape == (24, 16, 3)
    start = whole.index(b"II*\0" if b"II*\0" in whole else b"MM\0*")
    damaged = whole[:start] + bytes(4) + whole[start + 4 :]
    assert images.decode(damaged).shape == (16, 24, 3)
    assert images.open_image(damaged).size == (24, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_damaged_tag_beside_the_orientation_costs_no_image(orientation):
    """The resolution is a text, which Pillow reads and cannot write again."""
    photograph = bad_tars.encode(bad_tars.picture(0, w=24, h=16), quality=100, exif=bad_tars.exif(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(photograph))))
    start = photograph.index(b"Exif\0\0") + 6
    entries = [(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), (0x011A, 2, 4, b"abc\0")]
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + rows + bytes(4)
    end = start - 8 + int.from_bytes(photograph[start - 8 : start - 6], "big")
    damaged = photograph[: start - 8] + struct.pack(">H", len(block) + 2) + block + photograph[end:]
    assert np.abs(images.decode(damaged).astype(int) - expected).max() <= 2
