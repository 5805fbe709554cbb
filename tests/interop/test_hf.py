"""Models of transformers in both directions: features to 1e-5, and their processor."""

import json
import shutil

import jax
import numpy as np
import pytest
import transformers

from tests.helpers.foreign import assert_same, clip_tokens, images, make_hf, ours, theirs_hf
from xclip_jax import interop
from xclip_jax.data import transforms


@pytest.mark.parametrize(
    ("act", "eos", "patch"), [("quick_gelu", 2, 4), ("gelu_pytorch_tanh", 49407, 2)], ids=["old", "new"]
)
def test_transformers_there_and_back(act, eos, patch, tmp_path):
    model, there = make_hf(act, 1e-5, eos, patch), tmp_path / "there"
    model.save_pretrained(there, max_shard_size="1GB" if eos == 2 else "4MB")
    assert (there / "model.safetensors.index.json").exists() == (eos != 2)
    if eos == 2:  # as configs of 2022 have it
        content = json.loads((there / "config.json").read_text())
        old = {"text_config": {"hidden_size": 9}, "text_config_dict": content["text_config"]}
        (there / "config.json").write_text(json.dumps(content | old))
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


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "there"
    make_hf("gelu", 1e-5, 49407, 4).save_pretrained(folder)
    return folder


def test_the_image_processor_is_transformers_choice(there, tmp_path):

    def mean():
        return tuple(transformers.CLIPImageProcessor.from_pretrained(folder).image_mean)

    folder = shutil.copytree(there, tmp_path / "copy")
    for processor in ({}, {"image_processor": None}, {"image_processor": {"image_mean": [0.5] * 3}}):
        for name, content in (("preprocessor", {"image_mean": [0.25] * 3}), ("processor", processor)):
            content = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}} | content
            (folder / f"{name}_config.json").write_text(json.dumps(content))
        config, variables = interop.read(str(folder))
        assert config["data"]["normalization"][0] == mean() == (0.5 if processor.get("image_processor") else 0.25,) * 3
    config["data"]["normalization"] = "imagenet"
    folder = tmp_path / "exported"
    interop.write(variables, config, str(folder), "hf")
    assert mean() == transforms.STATISTICS["imagenet"][0]
