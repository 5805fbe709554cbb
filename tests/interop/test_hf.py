"""Models of transformers in both directions: features to 1e-5, and their processor."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.helpers.foreign import TEXTS, assert_same, clip_tokens, images, make_hf, ours, theirs_hf
from xclip_jax import interop
from xclip_jax.data import transforms


@pytest.mark.parametrize(
    ("act", "eps", "eos", "patch"),
    [("quick_gelu", 1e-5, 2, 4), ("gelu", 1e-5, 49407, 2), ("gelu_pytorch_tanh", 1e-5, 49407, 4)],
)
def test_transformers_there_and_back(act, eps, eos, patch, tmp_path):
    model, there = make_hf(act, eps, eos, patch), tmp_path / "there"
    model.save_pretrained(there, max_shard_size="4MB" if act == "gelu" else "1GB")
    if act == "gelu":
        assert (there / "model.safetensors.index.json").exists()
    if act == "quick_gelu":  # as configs of 2022 have it
        content = json.loads((there / "config.json").read_text())
        old = {"text_config": {"hidden_size": 9}, "text_config_dict": content["text_config"]}
        (there / "config.json").write_text(json.dumps(content | old))
    if act == "gelu_pytorch_tanh":
        (there / "model.safetensors").unlink()
        torch.save(model.state_dict(), there / "pytorch_model.bin")
    config, variables = interop.read(str(there))
    assert config["source"]["format"] == "hf"
    pixels, tokens = images(28), clip_tokens(12)
    expected = theirs_hf(model, pixels, tokens)
    assert_same(ours(config, variables, pixels, tokens), expected)
    assert interop.write(variables, config, str(tmp_path / "back"), "hf") == []
    loaded, report = transformers.CLIPModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(theirs_hf(loaded.eval(), pixels, tokens), expected)
    jax.tree.map(np.testing.assert_array_equal, interop.read(str(tmp_path / "back")), (config, variables))


@pytest.mark.parametrize("processor", [{"image_processor": {"image_mean": [0.5] * 3}}, {"image_processor": None}, {}])
def test_the_image_processor_is_transformers_choice(processor, tmp_path):
    """Also after an export over a folder with both files."""
    make_hf("gelu", 1e-5, 49407, 4).save_pretrained(tmp_path)
    for name, content in (("preprocessor", {"image_mean": [0.25] * 3}), ("processor", processor)):
        content = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}} | content
        (tmp_path / f"{name}_config.json").write_text(json.dumps(content))

    def mean():
        return tuple(transformers.CLIPImageProcessor.from_pretrained(tmp_path).image_mean)

    config, variables = interop.read(str(tmp_path))
    assert config["data"]["normalization"][0] == mean() == (0.5 if processor.get("image_processor") else 0.25,) * 3
    config["data"]["normalization"] = "imagenet"
    interop.write(variables, config, str(tmp_path), "hf")
    assert mean() == transforms.STATISTICS["imagenet"][0]


def test_transformers_processor_reads_as_ours(tmp_path):
    """The folder that we write tokenizes and prepares images there as the model was trained."""
    model = make_hf("gelu", 1e-5, 49407, 4)
    model.save_pretrained(tmp_path / "there")
    config, variables = interop.read(str(tmp_path / "there"))
    config["data"]["normalization"] = "imagenet"
    interop.write(variables, config, str(tmp_path / "back"), "hf")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "back")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 3), dtype=np.uint8)
    found = processor(text=TEXTS, images=[pixels], padding="max_length", truncation=True, return_tensors="np")
    expected = clip_tokens(12)
    ends = np.argmax(expected == 49407, axis=1)
    for row, there, end in zip(expected, found["input_ids"], ends, strict=True):
        np.testing.assert_array_equal(there[: end + 1], row[: end + 1])
    prepared = transforms.normalize(transforms.evaluation_image(pixels, 28)[None], *transforms.STATISTICS["imagenet"])
    np.testing.assert_allclose(found["pixel_values"].transpose(0, 2, 3, 1), prepared, atol=0.02)
    assert interop.read(str(tmp_path / "back"))[0]["data"]["normalization"] == "imagenet"
