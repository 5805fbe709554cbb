import io
import subprocess
import warnings

import numpy as np
import open_clip
import pytest
from PIL import Image

from tests.helpers import bad_tars
from xclip_jax.core.errors import BadSample
from xclip_jax.data import images, transforms
from xclip_jax.data.preprocessing import Preprocessing

# Pillow cuts 16 bits to 8.
ODD = {name: data for name, (_, data) in bad_tars.odd_images().items() if name != "sixteen"}


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_evaluation_pixels_are_open_clips(resample):
    theirs = open_clip.image_transform(24, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), interpolation=resample)
    ours = Preprocessing(24, interpolation=resample)
    for name, data in ODD.items():
        there = theirs(Image.open(io.BytesIO(data))).numpy().transpose(1, 2, 0)
        here = ours(data) / 255
        assert np.abs(here - there).max() < 2 / 255, name
        if data[:2] == b"\xff\xd8" or name == "webp":
            pixels = images.decode(data, rotate=False)
            np.testing.assert_array_equal(ours(pixels), here * 255)


def test_very_long_pictures_take_little_memory():
    line = np.zeros((1, 1_000_000, 3), np.uint8)
    assert Preprocessing(224)(line).shape == (224, 224, 3)
    for resample in transforms.RESAMPLE:
        crop = transforms.random_resized_crop(line, 224, np.random.default_rng(0), resample=resample)
        assert crop.shape == (224, 224, 3)


def test_scaled_jpegs():
    data = bad_tars.encode(bad_tars.picture(0, w=1000, h=750), quality=90)
    assert images.decode(data, scaled_to=300).shape == (375, 500, 3)
    assert images.decode(data, scaled_to=180).shape == (188, 250, 3)
    small = bad_tars.jpeg(0)
    assert images.decode(small, scaled_to=300).shape == (30, 40, 3)
    half = np.asarray(bad_tars.picture(0, w=1000, h=750).resize((500, 375), Image.Resampling.BOX)).astype(int)
    assert np.abs(images.decode(data, scaled_to=300) - half).mean() < 3


def test_sixteen_bits_become_eight():
    gray = images.decode(bad_tars.sixteen_bit())
    np.testing.assert_array_equal(gray[..., 0].ravel(), np.linspace(0, 65535, 1200).astype(np.uint16) >> 8)


def test_exif_turns_and_others_take_the_fast_way(monkeypatch):
    upright = bad_tars.picture(13)
    turned = bad_tars.encode(upright.transpose(Image.Transpose.ROTATE_90), quality=95, exif=bad_tars.exif(6))
    assert np.abs(images.decode(turned).astype(int) - np.asarray(upright)).mean() < 8
    monkeypatch.setattr(images, "open_image", lambda *_, **__: pytest.fail("Pillow decoded it"))
    images.decode(bad_tars.encode(upright, quality=95, exif=bad_tars.exif(1)))
    images.decode(bad_tars.jpeg(0))


def test_a_pillow_image_without_pixels_is_a_bad_sample():
    with pytest.raises(BadSample, match="image is empty: 0 x 3 pixels"):
        Preprocessing(8)(bad_tars.picture(0).crop((5, 5, 5, 8)))


def test_bounds_hold_before_anything_is_decoded():
    for side in (8_200, 60_000):  # Pillow would warn at 9,500 and refuse above 13,400
        with warnings.catch_warnings(), pytest.raises(BadSample, match="image too large"):
            warnings.simplefilter("ignore")
            images.decode(bad_tars.bomb(side))


def test_formats_that_start_a_program_are_no_images(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("started a program"))
    postscript, icon = (bad_tars.encode(bad_tars.picture(0), kind) for kind in ("EPS", "ICO"))
    assert postscript.startswith(b"%!PS")
    for decode in (images.decode, Preprocessing(8)):
        for data in (postscript, icon):
            with pytest.raises(BadSample, match="not an image"):
                decode(data)
    for kind in ("BMP", "GIF", "PNG", "PPM", "TIFF", "WEBP"):
        assert images.decode(bad_tars.encode(bad_tars.picture(0), kind)).shape == (30, 40, 3)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_any_cut_is_a_bad_sample(kind):
    data = bad_tars.encode(bad_tars.picture(0), kind)
    for n in (0, 1, 2, 3, 11, 20, 100, len(data) // 2):
        with pytest.raises(BadSample):
            images.decode(data[:n])


@pytest.mark.parametrize("resample", transforms.RESAMPLE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 40)])
def test_crops_of_less_than_a_pixel(resample, shape):
    """Tracking pixels of the web: a crop of less than half a pixel may round to one behind the border."""
    image = np.full((*shape, 3), 77, np.uint8)
    for scale in ((0.08, 1.0), (1e-9, 1e-6)):
        for seed in range(20):
            crop = transforms.random_resized_crop(image, 8, np.random.default_rng(seed), scale, resample=resample)
            np.testing.assert_array_equal(crop, np.full((8, 8, 3), 77))


@pytest.mark.parametrize("resample", ["area", "bicubic"])
def test_arrays_are_rgb_or_grey(resample):
    """Any other is a bad sample, and leaves no pixels of an earlier one in its row."""
    rng, grey = np.random.default_rng(0), np.full((28, 20, 1), 200, np.uint8)
    row = np.zeros((8, 8, 3), np.uint8)
    transforms.random_resized_crop(images.decode(grey), 8, rng, (0.5, 1.0), resample=resample, out=row)
    assert (row == 200).all()
    u8, u16 = np.uint8, np.uint16
    for shape, dtype in (((28, 20), u8), ((28, 20, 4), u8), ((28, 20, 3), u16), ((0, 2, 3), u8)):
        with pytest.raises(BadSample, match=r"image is not uint8 \(h, w, 3\)"):
            images.decode(np.zeros(shape, dtype))


def test_area_is_the_mean_over_pixels():
    image = np.asarray(bad_tars.picture(2, w=64, h=64))
    rng = np.random.default_rng(0)
    whole = transforms.random_resized_crop(image, 16, rng, (1.0, 1.0), (1.0, 1.0), resample="area")
    np.testing.assert_allclose(whole, image.reshape(16, 4, 16, 4, 3).mean((1, 3)), atol=0.51)
    image = np.asarray(bad_tars.picture(0).resize((400, 300)))  # smooth: "area" moves borders by half a pixel
    for i in range(20):
        smooth, area = (
            transforms.random_resized_crop(image, 64, np.random.default_rng(i), (0.3, 1.0), resample=resample)
            for resample in ("bicubic", "area")
        )
        assert np.abs(smooth.astype(int) - area).mean() < 1.5  # the same part
