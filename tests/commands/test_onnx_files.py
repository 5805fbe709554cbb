"""ONNX files, run by onnxruntime and tokenizers alone: embeddings of this package and of transformers."""

import json
import pathlib
import re
import sys
import types

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
import torch
from PIL import Image

import xclip_jax
from tests.helpers import tiny
from tests.helpers.foreign import make_hf, theirs_hf
from tests.interop.test_siglip import LENGTH, save_hf
from xclip_jax.commands import export
from xclip_jax.core.errors import UserError

pytestmark = pytest.mark.long

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "formats.md"
TEXTS = ["a photo of a cat", "Two dogs, on the moon!", "", "ÜBER straße", "it never ends " * 9]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with cluster heads and scanned blocks that trains in bf16."""
    root = tmp_path_factory.mktemp("onnx") / "run"
    return tiny.untrained(root, noise=0.1, model__scan=True, model__dtype="bfloat16", data__decoding="xclip")


def exported(weights, out):
    """The folder's config, its tokenizer, and functions from images and from tokens to embeddings."""
    export.main(["--checkpoint", str(weights), "--to", "onnx", str(out)])
    towers = [onnxruntime.InferenceSession(out / name) for name in ("image.onnx", "text.onnx")]
    ends = [x for tower in towers for x in (*tower.get_inputs(), *tower.get_outputs())]
    assert {x.name: (x.type, x.shape[0]) for x in ends} == {
        "images": ("tensor(uint8)", "batch"), "tokens": ("tensor(int32)", "batch"),
        "embedding": ("tensor(float)", "batch"),
    }  # fmt: skip
    assert onnx.load(out / "text.onnx").opset_import[0].version == 18
    functions = [lambda x, tower=tower: tower.run(None, {tower.get_inputs()[0].name: x})[0] for tower in towers]
    library = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    return json.loads((out / "onnx_config.json").read_text()), library, *functions


def test_a_run(run, tmp_path, capsys, caplog):
    config, library, images, texts = exported(run, tmp_path / "onnx")
    assert "not exported: clusters_img\nnot exported: clusters_txt\n" in capsys.readouterr().out
    assert not [record for record in caplog.records if record.name.startswith(("jax2onnx", "onnx_ir"))]
    card = (tmp_path / "onnx" / "README.md").read_text()
    assert "not exported: clusters_img" in card and "uint8 RGB (b, 16, 16, 3)" in card and "int32 (b, 12)" in card
    model = xclip_jax.load(run, batch=8)
    scale = config.pop("scale")
    assert scale == pytest.approx(np.exp(model.nnx().log_scale.get_value()))
    assert config == {
        "size": 16, "resize_mode": "shortest", "resize_size": 0, "interpolation": "bicubic", "background": "white",
        "exif_rotation": True, "length": 12,
    }  # fmt: skip
    raw = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    ids = np.array([row.ids for row in library.encode_batch(TEXTS)], np.int32)
    np.testing.assert_array_equal(ids, model.tokenizer(TEXTS, model.length))
    for n in (1, 5):
        np.testing.assert_allclose(images(raw[:n]), model.encode_image(raw[:n]), atol=1e-5)
        np.testing.assert_allclose(texts(ids[:n]), model.encode_text(TEXTS[:n]), atol=1e-5)


def test_weights_of_transformers(tmp_path):
    """CLIP, which pools at the end of a text, and SigLIP, with attention pooling and a rest beside whole patches."""
    clip = make_hf("quick_gelu", 1e-5, 49407, 4)
    clip.save_pretrained(tmp_path / "clip")
    path, siglip, processed, _ = save_hf(tmp_path / "siglip", 30, 7)
    raw = np.random.default_rng(0).integers(0, 256, (5, 30, 30, 3), dtype=np.uint8)
    for folder, model in ((tmp_path / "clip", clip), (path, siglip)):
        config, library, images, texts = exported(folder, folder.with_suffix(".onnx"))
        ids = np.array([row.ids for row in library.encode_batch(TEXTS)], np.int32)
        mean, std = np.array(xclip_jax.data.transforms.STATISTICS["clip" if model is clip else "half"])
        given = raw[:, : config["size"], : config["size"]]
        expected = theirs_hf(model, ((given / 255 - mean) / std).astype(np.float32), ids)
        for n in (1, 5):
            np.testing.assert_allclose(images(given[:n]), expected["z_img"][:n], atol=1e-5)
            np.testing.assert_allclose(texts(ids[:n]), expected["z_txt"][:n], atol=1e-5)
        for key in ("scale", "bias"):
            assert config.get(key) == pytest.approx(expected.get(key))
    known = processed(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
    np.testing.assert_array_equal(ids, known["input_ids"])


def test_the_code_of_the_page(run, tmp_path, monkeypatch):
    exported(run, tmp_path / "OUT")
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (33, 21, 3), dtype=np.uint8)
    image = Image.fromarray(picture)
    image.getexif()[0x0112] = 6
    image.save("fox.jpg", exif=image.getexif())
    names = {}
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "onnxruntime" in block)
    exec(code, names)
    model = xclip_jax.load(run, batch=8)
    np.testing.assert_allclose(names["z_img"], model.encode_image(["fox.jpg"]), atol=1e-5)
    expected = model.zero_shot(["fox.jpg"], ["fox", "hen"], ["a {}"]).probabilities
    np.testing.assert_allclose(torch.tensor(names["logits"]).softmax(dim=-1), expected, atol=1e-5)


def test_faults(run, tmp_path, monkeypatch):
    for objective, changes in (("nclip", {}), ("classify", {"objective__classify__classes": 2})):
        other = tiny.untrained(tmp_path / objective, objective, **changes)
        with pytest.raises(UserError, match=f"'{objective}' trains no shared embedding space; use 'safetensors'"):
            export.export(str(other), str(tmp_path / "out"), to="onnx")

    def to_onnx(*_, **__):
        raise NotImplementedError("no plug-in for 'fft'")

    for module, message in (
        (types.SimpleNamespace(to_onnx=to_onnx), r"cannot convert the tower of images: .*no plug-in for 'fft'"),
        (None, r"export --to onnx needs jax2onnx: pip install 'xclip_jax\[onnx\]'"),
    ):
        monkeypatch.setitem(sys.modules, "jax2onnx", module)
        with pytest.raises(UserError, match=message):
            export.export(str(run), str(tmp_path / "out"), to="onnx")
    assert not (tmp_path / "out").exists()
