"""SigLIP's weights and tokenizer, of transformers and of open_clip: equal ids, features to 1e-5."""

import io
import json

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from etils import epath
from PIL import Image

import xclip_jax
from tests.helpers import tiny
from tests.helpers.foreign import shaken, theirs_hf
from xclip_jax import interop
from xclip_jax.core.errors import UserError
from xclip_jax.data import tokenizer
from xclip_jax.interop import vocabulary
from xclip_jax.train import build

CORPUS = ["a photo of a cat", "two dogs on the moon", "naïve über straße", "it never ends", "the cat sat on the mat",
          "a photo of two dogs and a house", "moon over the house, again and again"] * 20  # fmt: skip
TEXTS = ["a photo of a cat", "Two DOGS, on the moon!", "", "  leading and  double\tspaces\n", "snake_case-word", "...",
         "naïve ÜBER 猫 straße ΑΣ İ", "it never ends " * 9, "ﬁne ① ２", "the moon ▁ x", "a\u200bb \u00a0c",
         "a dog\u2019s house &amp;amp; moon", "na\u00c3\u00afve \u201ccat\u201d", "ΑΣ-Α_dog"]  # fmt: skip
LENGTH = 12


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))


def trained(**options):
    """Content of a file of SentencePiece with SigLIP's special tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, hard_vocab_limit=False, character_coverage=1.0, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, **{"vocab_size": 120, "model_type": "unigram"} | options,
    )  # fmt: skip
    return model.getvalue()


def save_hf(path, size, patch):
    """Writes transformers' model of images of `size` pixels, tokenizer and image processor into `path`."""
    path.mkdir()
    (path / "spiece.model").write_bytes(trained())
    tokens = transformers.SiglipTokenizer(str(path / "spiece.model"), model_max_length=LENGTH)
    tower = {"hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.SiglipConfig(
        text_config=tower | {"hidden_size": 48, "projection_size": 64, "max_position_embeddings": LENGTH,
                             "vocab_size": tokens.vocab_size},
        vision_config=tower | {"image_size": size, "patch_size": patch},
    )  # fmt: skip
    model = shaken(transformers.SiglipModel(config))
    with torch.no_grad():  # of the published weights: above the bound of training
        model.logit_scale.fill_(4.77)
        model.logit_bias.fill_(-12.9)
    processor = transformers.SiglipImageProcessor(size={"height": size, "width": size})
    for part in (model, tokens, processor):
        part.save_pretrained(path)
    return path, model, tokens, processor


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("siglip") / "there", 28, 7)


def test_transformers_tokenizer_gives_the_same_ids(hf_folder):
    path, _, tokens, _ = hf_folder
    name = vocabulary.siglip(epath.Path(path), tokens.vocab_size)
    mine = tokenizer.load(name)
    expected = tokens(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
    np.testing.assert_array_equal(mine(TEXTS, LENGTH), expected["input_ids"])
    whole = tokenizers.Tokenizer.from_str(vocabulary.complete(mine, LENGTH))
    np.testing.assert_array_equal([row.ids for row in whole.encode_batch(TEXTS)], expected["input_ids"])
    assert (mine.sot_id, mine.eot_id, mine.pad_id) == (None, 1, 1)
    # The same file once more, and an end that a caption spells out.
    assert vocabulary.siglip(epath.Path(path), tokens.vocab_size) == name
    assert np.count_nonzero(mine(["a </s> cat"], LENGTH) != 1) > 1


def test_transformers_model(hf_folder, tmp_path):
    path, model, tokens, processor = hf_folder
    config, variables = interop.read(str(path))
    assert config["objective"] == {"name": "siglip"} and config["model"]["img"]["style"] == "siglip"
    assert config["data"]["normalization"] == "half" and config["eval"]["resize"] == "squash"
    for key, value in (("log_scale", model.logit_scale), ("bias", model.logit_bias)):
        assert variables["params"][key] == np.float32(value.item())
    interop.write(variables, config, str(tmp_path / "own"))
    again, params = interop.read(str(tmp_path / "own"))
    jax.tree.map(np.testing.assert_array_equal, params, variables)
    assert again["model"] == config["model"]
    loaded = xclip_jax.load(tmp_path / "own", batch=8)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    given = processor(images=[Image.fromarray(x) for x in pixels], return_tensors="pt")
    texts = tokens(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model(input_ids=texts, **given)
    np.testing.assert_allclose(loaded.encode_image(pixels), out.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_text(TEXTS), out.text_embeds.numpy(), atol=1e-5)


def test_a_repository_of_the_hub_is_its_folder(hf_folder, server):
    path, *_ = hf_folder
    server.add("lab/siglip", path)
    jax.tree.map(np.testing.assert_array_equal, interop.read("hf:lab/siglip"), interop.read(str(path)))
    fetched = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"}
    assert fetched < set(server.fetched()) and {"spiece.model", "tokenizer.json"} & set(server.fetched())


def test_a_rest_beside_whole_patches_is_left_out(tmp_path):
    """As SigLIP's weights for 384 pixels in patches of 14 leave it; images keep their size on the way."""
    path, model, _, processor = save_hf(tmp_path / "there", 30, 14)
    config, variables = interop.read(str(path))
    assert config["model"]["img"]["image_size"] == 30 and variables["params"]["img"]["positions"].shape == (4, 64)
    raw = np.random.default_rng(0).integers(0, 256, (2, 30, 30, 3), dtype=np.uint8)
    given = processor(images=[Image.fromarray(x) for x in raw], return_tensors="pt")["pixel_values"]
    ids = tokenizer.load(config["data"]["tokenizer"])(TEXTS[:2], LENGTH)
    features = theirs_hf(model, given.permute(0, 2, 3, 1).numpy(), ids)["z_img"]
    loaded = xclip_jax.load(path, batch=8)
    np.testing.assert_allclose(loaded.encode_image(raw), features, atol=1e-5)
    raw[:, 28:] = raw[:, :, 28:] = 9
    np.testing.assert_allclose(loaded.encode_image(raw), features, atol=1e-5)


def test_a_tokenizer_of_another_kind_is_named(hf_folder, tmp_path):
    path, _, tokens, _ = hf_folder
    (tmp_path / "spiece.model").write_bytes((path / "spiece.model").read_bytes())
    for options, size, message in (
        ({"do_lower_case": False}, tokens.vocab_size, "sets do_lower_case to false"),
        ({"pad_token": "<x>"}, tokens.vocab_size, "pads them with '<x>', of ids 1 and None"),
        ({}, 1, "pads them with '</s>', of ids 1 and 1"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
        with pytest.raises(UserError, match=message):
            vocabulary.siglip(epath.Path(tmp_path), size)


def test_the_second_siglip_has_texts_in_lower_case(tmp_path):
    """Its tokenizer is Gemma's: byte-pair encoding with other names for the end and the padding."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False, unk_token="<unk>", fuse_unk=True))
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=150, special_tokens=special)
    library.train_from_iterator(CORPUS, trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer_config\.json, which names the padding of SigLIP 2, is missing"):
        vocabulary.siglip(epath.Path(tmp_path), 200)
    for kind in ("GemmaTokenizer", "TokenizersBackend"):  # the second one is saved by transformers 5.0
        options = {"tokenizer_class": kind, "eos_token": "<eos>", "pad_token": {"content": "<pad>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
        mine = tokenizer.load(vocabulary.siglip(epath.Path(tmp_path), 200))
        assert (mine.vocab_size, mine.eot_id, mine.pad_id) == (200, 1, 0)
        (row,) = mine(["Two dogs, on"], 20)
        expected = library.encode("two dogs, on").ids
        assert row.tolist() == expected + [0] * (20 - len(expected))
        whole = tokenizers.Tokenizer.from_str(vocabulary.complete(mine, 20))
        assert whole.encode("Two dogs, on").ids == row.tolist()


def test_a_recipe_may_have_its_parts():
    parts = {"model__img__pool": "map", "model__img__style": "siglip", "model__txt__style": "siglip",
             "model__txt__causal": False, "model__txt__pool": "last"}  # fmt: skip
    params = build.build(tiny.config("siglip", model__embed=32, **parts), jax.devices()[:1]).abstract.params
    assert params["img"]["patches"].keys() == {"kernel", "bias"} and "proj_img" not in params
    assert params["proj_txt"]["linear"]["bias"].shape == (32,)
    with pytest.raises(UserError, match=r"embed 16 must be the image tower's width 32: its style does not project"):
        build.build(tiny.config("siglip", **parts))


def test_files_that_are_not_of_sentencepiece():
    data = trained()
    endless = b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    bpe = trained(model_type="bpe", vocab_size=60)
    for content in (b"", b"{}", data[:100], data[: len(data) // 2], endless, bpe):
        with pytest.raises(UserError, match=r"x is damaged, or not a unigram model of SentencePiece; .*tokenizer"):
            vocabulary.read_sentencepiece(content, "x")
