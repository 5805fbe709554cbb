"""The preprocessing that a model brings: from the image file to features, against open_clip, torchvision and Pillow."""

import dataclasses
import json

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from torchvision import transforms as tv

import xclip_jax
from tests.helpers import bad_tars, tiny
from tests.helpers.foreign import TEXT, make_hf, shaken
from xclip_jax import interop
from xclip_jax.commands import evaluate
from xclip_jax.config.load import load_config
from xclip_jax.config.schema import resolve
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import transforms
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import registry
from xclip_jax.train import build, weights
from xclip_jax.train.run_writer import RunWriter

pytestmark = pytest.mark.long

SIZE = 28
MEAN, STD = (0.41, 0.52, 0.33), (0.21, 0.31, 0.26)
VISION = {"image_size": SIZE, "patch_size": 4, "width": 64, "head_width": 32, "layers": 1}
WAYS = [("shortest", "bicubic"), ("squash", "bilinear")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of photographs of several shapes, as JPEG and PNG, grey, with a palette, with an EXIF tag of rotation."""
    folder = tmp_path_factory.mktemp("pictures")
    encode, picture = bad_tars.encode, bad_tars.picture
    content = {
        "wide.jpg": encode(picture(0, w=331, h=200), quality=85),
        "tall.jpg": encode(picture(1, w=97, h=301), quality=92),
        "odd.png": encode(picture(2, w=61, h=45), "PNG"), "grey.jpg": encode(picture(3, w=90, h=90, mode="L")),
        "small.png": encode(picture(4, w=13, h=20), "PNG"), "line.png": encode(picture(6, w=150, h=12), "PNG"),
        "palette.png": encode(picture(5, w=120, h=80).quantize(32), "PNG"),
        "turned.jpg": encode(picture(7, w=120, h=80), quality=95, exif=bad_tars.exif(6)),
    }  # fmt: skip
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in content]


def open_clip_folder(folder, preprocess, **model):
    folder.mkdir()
    model = {"vision_cfg": VISION, "text_cfg": TEXT} | model
    weights_of = shaken(open_clip.model.CLIP(48, **model)).state_dict()
    safetensors.torch.save_file({key: x.contiguous() for key, x in weights_of.items()},
                                folder / "open_clip_model.safetensors")  # fmt: skip
    content = {"model_cfg": model | {"embed_dim": 48}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def open_clip_features(folder, paths):
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
        return model.eval().encode_image(pixels, normalize=True).numpy()


@pytest.mark.parametrize(("mode", "interpolation"), WAYS)
def test_features_of_files_are_open_clips(mode, interpolation, pictures, tmp_path):
    """In, with open_clip's own preprocessing; out again, and in once more."""
    cfg = {"size": 224, "mean": MEAN, "std": STD, "interpolation": interpolation, "resize_mode": mode}
    there = open_clip_folder(tmp_path / "there", cfg)
    expected = open_clip_features(there, pictures)
    model = xclip_jax.load(there)
    np.testing.assert_allclose(model.encode_image(pictures), expected, rtol=0, atol=1e-5)
    config, variables = interop.read(str(there))
    assert config["source"]["notes"] == ()
    for to in ("open_clip", "safetensors"):
        interop.write(variables, config, str(tmp_path / to), to)
        assert interop.read(str(tmp_path / to))[0]["eval"] == config["eval"]
        again = xclip_jax.load(tmp_path / to)
        assert again.preprocessing == model.preprocessing == Preprocessing(
            SIZE, MEAN, STD, resize_mode=mode, interpolation=interpolation)  # fmt: skip
        np.testing.assert_allclose(again.encode_image(pictures), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(open_clip_features(tmp_path / "open_clip", pictures), expected)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", transforms.INTERPOLATIONS)
def test_a_larger_size_before_the_crop_is_torchvisions(mode, interpolation, pictures):
    side = {"shortest": 33, "squash": (33, 33)}[mode]
    how = tv.InterpolationMode(interpolation)
    theirs = tv.Compose([tv.Resize(side, interpolation=how), tv.CenterCrop(SIZE)])
    ours = Preprocessing(SIZE, resize_mode=mode, resize_size=33, interpolation=interpolation)
    assert ours.resizing.endswith(", not rotated by EXIF")
    sides = {"shortest": "shorter side", "squash": "each side"}[mode]
    upright = dataclasses.replace(ours, exif_rotation=True)
    assert upright.resizing == f"{sides} to 33 {interpolation}, central crop"
    for path in pictures:
        np.testing.assert_array_equal(ours(path.read_bytes()), np.asarray(theirs(Image.open(path)).convert("RGB")))


# --- transformers


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    make_hf("gelu", 1e-5, 49407, 4).save_pretrained(folder)
    return folder


PROCESSORS = [
    ({"size": {"shortest_edge": 36}, "resample": 2}, {"resize_size": 36, "interpolation": "bilinear"}),
    ({"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False}, {"resize_mode": "squash"}),
    ({"size": {"height": 40, "width": 40}}, {"resize_mode": "squash", "resize_size": 40}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), PROCESSORS)
def test_a_processor_of_transformers_is_followed(changes, expected, hf_folder, tmp_path):
    base = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    (hf_folder / "preprocessor_config.json").write_text(json.dumps(base | changes))
    model = xclip_jax.load(hf_folder)
    found = dataclasses.asdict(model.preprocessing)
    wanted = {"mean": MEAN, "std": STD, "background": "white"} | expected
    for key, value in (dataclasses.asdict(Preprocessing(SIZE)) | wanted).items():
        assert found[key] == (pytest.approx(value) if key in ("mean", "std") else value), key
    # Sizes that leave an even margin: half a pixel it rounds down, torchvision and so open_clip to the even number.
    images = [bad_tars.picture(i, w=w, h=h) for i, (w, h) in enumerate([(320, 200), (100, 300), (61, 45)])]
    prepared = np.stack(list(map(model.prepare, images)))
    ours = np.asarray(transforms.normalize(prepared, model.preprocessing.mean, model.preprocessing.std))
    processor = transformers.CLIPImageProcessor.from_pretrained(hf_folder)
    theirs = np.stack(processor(images)["pixel_values"]).transpose(0, 2, 3, 1)
    # In steps of 8 bits: it resizes by torch, which rounds otherwise than Pillow.
    steps = 255 * np.abs(ours - theirs) * np.asarray(model.preprocessing.std)
    assert steps.max() < 1.01 and steps.mean() < 0.1
    # And out again.
    config, variables = interop.read(str(hf_folder))
    interop.write(variables, config, str(tmp_path / "back"), "hf")
    assert interop.read(str(tmp_path / "back"))[0] == config


def test_images_of_other_modes_are_prepared_as_by_transformers(hf_folder):
    """Transparent ones are laid on white, all are converted to RGB before they are resized."""
    (hf_folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": SIZE}, "crop_size": SIZE})
    )
    model = xclip_jax.load(hf_folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(hf_folder)
    rgb = bad_tars.picture(0, w=120, h=80)
    images = [Image.merge("RGBA", [*rgb.split(), bad_tars.picture(1, w=120, h=80, mode="L")]), rgb.convert("1")]
    for image in (*images, images[0].convert("LA"), rgb.quantize(8)):
        ours = transforms.normalize(model.prepare(image)[None], model.preprocessing.mean, model.preprocessing.std)
        theirs = np.asarray(processor([image])["pixel_values"][0]).transpose(1, 2, 0)
        steps = 255 * np.abs(np.asarray(ours)[0] - theirs) * np.asarray(model.preprocessing.std)
        assert steps.max() < 1.01 and steps.mean() < 0.1, image.mode


@pytest.mark.parametrize(
    "changes",
    [
        {"resample": 1}, {"do_center_crop": False}, {"do_resize": False}, {"do_normalize": False},
        {"rescale_factor": 1}, {"crop_size": {"height": 24, "width": 24}}, {"size": {"shortest_edge": 20}},
        {"size": {"height": 28, "width": 40}}, {"size": {"shortest_edge": 28, "longest_edge": 60}},
        {"image_processor_type": "ViTImageProcessor"}, {"image_std": [0.1, 0, 0.1]}, {"image_mean": "clip"},
    ],
)  # fmt: skip
def test_processors_that_cannot_be_followed_are_refused(changes, hf_folder):
    (hf_folder / "preprocessor_config.json").write_text(json.dumps(changes))
    (key,) = changes
    with pytest.raises(UserError, match=f"{key}|preprocessor_config.json: mean"):
        interop.read(str(hf_folder))


def test_open_clip_preprocessing_that_is_unknown_is_refused(tmp_path):
    there = open_clip_folder(tmp_path / "there", {})
    content = json.loads((there / "open_clip_config.json").read_text())
    for cfg in ({"resize_mode": "longest"}, {"interpolation": "lanczos"}, {"std": 0}):
        (there / "open_clip_config.json").write_text(json.dumps(content | {"preprocess_cfg": cfg}))
        with pytest.raises(UserError, match="|".join([*cfg, "standard deviation 0"])):
            interop.read(str(there))


# --- a run's


def test_evaluations_are_prepared_as_the_model_says(pictures, tmp_path, capsys):
    for label, keep in (("cat", pictures[:2]), ("dog", pictures[2:4])):
        (tmp_path / "set" / label).mkdir(parents=True)
        for path in keep:
            (tmp_path / "set" / label / path.name).write_bytes(path.read_bytes())
    there = open_clip_folder(tmp_path / "there", {"mean": MEAN, "std": STD, "resize_mode": "squash"})
    suite = f"folder:{tmp_path / 'set'}"
    slip = evaluate.evaluate(str(there), suite, profile="slip")["results"][0]["preprocessing"]
    assert slip == f"shorter side bilinear, central crop, not rotated by EXIF, {SIZE} px, mean {MEAN}, deviation {STD}"
    model = xclip_jax.load(there)
    own = f"each side bicubic, not rotated by EXIF, {SIZE} px, mean {MEAN}, deviation {STD}"
    assert model.card["preprocessing"] == own
    data = registry.load(suite, model.preprocessing)
    for image, path in zip(data.images, sorted((tmp_path / "set").glob("*/*")), strict=True):
        np.testing.assert_array_equal(image, model.prepare(path))
    capsys.readouterr()


def test_a_run_has_a_preprocessing_of_its_own(tmp_path):
    c = tiny.config("clip", run=tmp_path / "run", eval__resize="squash", eval__interpolation="bilinear")
    with c.ignore_type():
        c.data.normalization = (MEAN, STD)
    for _ in range(2):  # numbers survive config.json, and a resumed run takes them for the same
        with RunWriter(c.run).claimed(resolve(c), []):
            pass
    assert build.build(weights.run_config(RunReader(c.run))).preprocessing == Preprocessing(
        tiny.SIZE, MEAN, STD, resize_mode="squash", interpolation="bilinear", background="white", exif_rotation=True
    )


def test_runs_that_start_from_weights_with_another_preprocessing_say_so(tmp_path, capsys):
    there = open_clip_folder(tmp_path / "there", {"mean": MEAN, "std": STD, "resize_mode": "squash"})
    fine = load_config(f"finetune:weights={there},data=folder:{tmp_path},examples=8,classes=2")
    assert Preprocessing.from_config(resolve(fine)) == Preprocessing(SIZE, MEAN, STD, resize_mode="squash")
    model = {f"model__{key}": value for key, value in interop.read(str(there))[0]["model"].items()}
    c = tiny.config("clip", data__tokenizer="clip", init__weights=str(there), **model)
    made = build.build(c)
    weights.read_initial(made.config, made.abstract)
    out = capsys.readouterr().out
    assert f"data.normalization ({(MEAN, STD)}, 'imagenet' in this run)" in out
    assert "eval.resize ('squash', 'shortest' in this run)" in out and "data.decoding" in out
    # The values may be pasted behind --config.KEY=.
    c.data.normalization, c.eval.resize, c.data.decoding = str((MEAN, STD)), "squash", "open_clip"
    made = build.build(c)
    assert made.preprocessing == Preprocessing(SIZE, MEAN, STD, resize_mode="squash")
    weights.read_initial(made.config, made.abstract)
    assert "different settings" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"data__normalization": "clap"}, {"data__normalization": "((1, 2), (3, 4))"},
        {"data__normalization": "((1, 2, 3), (1, 0, 1))"}, {"data__normalization": "((1, 2, 3), (1, 'x', 1))"},
        {"eval__resize": "longest"}, {"eval__interpolation": "area"}, {"eval__resize_size": 3},
    ],
)  # fmt: skip
def test_bad_values_are_named_by_their_keys(changes):
    key = next(iter(changes)).replace("__", ".")
    with pytest.raises(UserError, match=f"{key} is "):
        resolve(tiny.config("clip", **changes))


def test_sixteen_bits_are_scaled_and_not_cut():
    data = bad_tars.encode(Image.new("I;16", (40, 30), 40_000), "PNG")
    assert (Preprocessing(SIZE, resize_mode="squash")(data) == 40_000 >> 8).all()
