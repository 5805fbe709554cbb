"""Tokenizers that travel with weights: exported folders are read by the other projects with their tokenizer."""

import functools
import json
import os

import jax
import numpy as np
import open_clip
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from PIL import Image

import xclip_jax
from tests.helpers import bad_tars, tiny
from tests.helpers.foreign import B32, TEXT, make_hf, our_model, shaken
from xclip_jax import interop
from xclip_jax.commands import export
from xclip_jax.core.errors import UserError
from xclip_jax.data import tokenizer
from xclip_jax.interop import vocabulary

# Ends and starts spelt out, capitals, other scripts, and one that is cut.
TEXTS = ["a photo of a cat", "Two DOGS on the moon", "", "naïve über 猫", "the </s> and [SEP] of a <s>",
         "it never ends " * 9]  # fmt: skip
CORPUS = [*TEXTS, "a photo of a dog", "the moon over the cat"] * 3


def byte_level(path, size, special):
    """Byte-pair encoding of bytes, with capitals and white space as they are; ends that are special tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(CORPUS, trainer)
    # What a file may hold and ours does not follow.
    model.enable_truncation(5)
    model.enable_padding(pad_id=1, length=7)
    model.save(str(path))


def word_piece(path):
    """BERT's kind, in lower case: its start and end are [CLS] and [SEP], and it adds them by itself."""
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.BertNormalizer()
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    model.train_from_iterator(CORPUS, tokenizers.trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    model.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    model.save(str(path))


def words(path):
    """Whole words, no start, the end in the middle of the vocabulary and no special token there, an unknown at 0."""
    known = dict.fromkeys(w for text in CORPUS for w in text.split())
    vocab = {w: i for i, w in enumerate(["?", *list(known)[:5], "<|endoftext|>", *list(known)[5:]])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(path))


KINDS = {
    "end first": functools.partial(byte_level, size=300, special=["</s>", "<s>", "<pad>"]),
    "no padding": functools.partial(byte_level, size=280, special=["<s>", "</s>"]),
    "word piece": word_piece,
    "words": words,
}


def model_with(tmp_path, kind):
    """A model whose tokenizer is the file tmp_path/own.json, loaded from our own form, and a folder for its exports."""
    file = tmp_path / "own.json"
    KINDS[kind](file)
    config, variables = our_model("clip", data__tokenizer=str(file))
    interop.write(variables, config, str(tmp_path / "ours"))
    os.remove(file)
    return xclip_jax.load(tmp_path / "ours"), tmp_path


def images():
    return [Image.fromarray(np.asarray(bad_tars.picture(i, w=30 + 4 * i, h=20))) for i in range(4)]


def expected_logits(model):
    scale = float(np.exp(model._variables["params"]["log_scale"]))
    return scale * model.encode_image(images()) @ model.encode_text(TEXTS).T


def up_to_end(ids, end):
    return [row[: list(row).index(end) + 1] for row in np.asarray(ids).tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_open_clip_reads_the_tokenizer_of_an_export(kind, tmp_path):
    model, folder = model_with(tmp_path, kind)
    export.export(str(folder / "ours"), str(folder / "out"), to="open_clip")
    there = f"local-dir:{folder / 'out'}"
    tokens = open_clip.get_tokenizer(there)(TEXTS)
    ours = model.tokenizer(TEXTS, tiny.LENGTH)
    assert tokens.shape == ours.shape and (ours[-1] == model.tokenizer.eot_id).any()
    assert up_to_end(tokens, model.tokenizer.eot_id) == up_to_end(ours, model.tokenizer.eot_id)
    if kind in ("end first", "word piece"):
        np.testing.assert_array_equal(tokens, ours)
    theirs, preprocess = open_clip.create_model_from_pretrained(there)
    with torch.no_grad():
        pixels = torch.stack(list(map(preprocess, images())))
        logits, _ = theirs.eval().get_logits(pixels, tokens)
    np.testing.assert_allclose(logits, expected_logits(model), rtol=0, atol=1e-4)
    # Back again, as the same model.
    again = xclip_jax.load(folder / "out")
    np.testing.assert_array_equal(again.tokenizer(TEXTS, tiny.LENGTH), ours)
    np.testing.assert_allclose(again.encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_tokenizer_of_an_export(kind, tmp_path):
    model, folder = model_with(tmp_path, kind)
    export.export(str(folder / "ours"), str(folder / "out"), to="hf")
    ours = model.tokenizer(TEXTS, tiny.LENGTH)
    theirs = transformers.CLIPModel.from_pretrained(folder / "out").eval()
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    fast = transformers.AutoTokenizer.from_pretrained(folder / "out")
    assert fast.model_max_length == tiny.LENGTH and fast.eos_token_id == model.tokenizer.eot_id
    for processor in (transformers.CLIPProcessor, transformers.AutoProcessor):
        inputs = processor.from_pretrained(folder / "out")(text=TEXTS, images=images(), **options)
        ids = inputs["input_ids"]
        assert torch.equal(ids, fast(TEXTS, **options)["input_ids"])
        assert up_to_end(ids, model.tokenizer.eot_id) == up_to_end(ours, model.tokenizer.eot_id)
        if kind in ("end first", "word piece"):
            np.testing.assert_array_equal(ids, ours)
    with torch.no_grad():
        pixels = np.stack([(model.prepare(i) / 255 - model.preprocessing.mean) / model.preprocessing.std
                           for i in images()]).transpose(0, 3, 1, 2)  # fmt: skip
        inputs["pixel_values"] = torch.tensor(pixels, dtype=torch.float32)  # their resizing rounds otherwise
        logits = theirs(**inputs).logits_per_image
    np.testing.assert_allclose(logits, expected_logits(model), rtol=0, atol=1e-4)
    again = xclip_jax.load(folder / "out")
    np.testing.assert_array_equal(again.tokenizer(TEXTS, tiny.LENGTH), ours)


def test_an_end_that_transformers_reads_otherwise_is_an_error(tmp_path):
    byte_level(tmp_path / "own.json", 280, ["<s>", "<pad>", "</s>"])
    config, variables = our_model("clip", data__tokenizer=str(tmp_path / "own.json"))
    with pytest.raises(UserError, match=r"reads the id 2, the end token of .*as the largest id; write to 'open_clip'"):
        interop.write(variables, config, str(tmp_path / "x"), "hf")
    assert not (tmp_path / "x").exists()


# --- whose vocabulary it is


def clip_size(path):
    """A vocabulary of CLIP's size that is not CLIP's: words by number, the end last."""
    vocab = {f"w{i}": i for i in range(vocabulary.CLIP_SIZE - 1)} | {"<|endoftext|>": vocabulary.CLIP_SIZE - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(path))


@pytest.mark.parametrize("to", ["hf", "open_clip"])
def test_a_vocabulary_of_clips_size_keeps_its_tokenizer(to, tmp_path):
    clip_size(tmp_path / "own.json")
    config, variables = our_model("clip", data__tokenizer=str(tmp_path / "own.json"))
    interop.write(variables, config, str(tmp_path / "out"), to)
    again, _ = interop.read(str(tmp_path / "out"))
    assert again["data"]["tokenizer"] == str(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.load(again["data"]["tokenizer"])(["w7 w9"], 4).tolist() == [[7, 9, 49407, 0]]


def test_clips_own_files_are_clip(tmp_path):
    """As the Hub has them: vocab.json and merges.txt of transformers, or its tokenizer.json too."""
    make_hf("gelu", 1e-5, 49407, 4).save_pretrained(tmp_path)
    for name, content in vocabulary.clip_files(12).items():
        (tmp_path / name).write_text(content)
    assert interop.read(str(tmp_path))[0]["data"]["tokenizer"] == "clip"
    transformers.CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert interop.read(str(tmp_path))[0]["data"]["tokenizer"] == "clip"


def test_open_clip_with_clips_tokenizer_of_transformers_is_clip(tmp_path):
    content = {"embed_dim": 48, "vision_cfg": B32, "text_cfg": TEXT | {"hf_tokenizer_name": "openai/clip"}}
    weights = shaken(open_clip.model.CLIP(48, B32, TEXT)).state_dict()
    safetensors.torch.save_file({key: x.contiguous() for key, x in weights.items()}, tmp_path / "x.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": content}))
    config, _ = interop.read(str(tmp_path / "x.safetensors"))
    assert config["data"]["tokenizer"] == "clip" and "is assumed to be CLIP's" in config["source"]["notes"][0]


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path):
    make_hf("gelu", 1e-5, 49407, 4).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({f"w{i}": i for i in range(49408)}))
    with pytest.raises(UserError, match=r"49408 token ids .*its folder has no tokenizer\.json; save"):
        interop.read(str(tmp_path))
    byte_level(tmp_path / "tokenizer.json", 300, ["<s>", "</s>"])
    with pytest.raises(UserError, match=r"49408 token ids .*/tokenizer\.json has 300 "):
        interop.read(str(tmp_path))


# --- the card


@pytest.fixture
def run(tmp_path):
    """An untrained run with a tokenizer file."""
    byte_level(tmp_path / "own.json", 300, ["</s>", "<s>", "<pad>"])
    return tiny.untrained(tmp_path / "run", "clip", data__tokenizer=str(tmp_path / "own.json"))


@pytest.mark.parametrize("to", interop.FORMATS)
def test_the_code_of_the_card_runs(to, run, tmp_path, monkeypatch, capsys):
    export.export(str(run), str(tmp_path / "out"), to=to)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "* Images: shorter side bicubic, central crop, 16 x 16 pixels;" in card
    assert "minus the mean (0.485, 0.456, 0.406), divided by the standard deviation (0.229, 0.224, 0.225)" in card
    assert "`tokenizer.json` of this folder" in card and "At most 12 tokens" in card
    assert ("open_clip also cleans the text first" in card) == (to == "open_clip")
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    images()[0].save("picture.jpg")
    capsys.readouterr()
    names = {}
    exec(code, names)
    assert capsys.readouterr().out
    model = xclip_jax.load(run)
    expected = model.zero_shot(["picture.jpg"], ["cat", "dog"], ["a photo of a {}"]).probabilities
    if to == "safetensors":
        expected = model.zero_shot(["picture.jpg"], ["cat", "dog"]).probabilities
        np.testing.assert_allclose(names["result"].probabilities, expected, atol=1e-6)
    else:
        np.testing.assert_allclose(names["logits"].softmax(dim=-1).numpy(), expected, atol=1e-3)


def test_the_card_has_the_preprocessing_of_another_model(tmp_path):
    config, variables = our_model("clip", eval__resize="squash", eval__interpolation="bilinear")
    interop.write(variables, config, str(tmp_path / "ours"))
    for to, of_tokens in (("hf", "which transformers does not"), ("open_clip", "after broken encodings are repaired")):
        export.export(str(tmp_path / "ours"), str(tmp_path / to), to=to)
        card = (tmp_path / to / "README.md").read_text()
        assert "each side bilinear, 16 x 16 pixels" in card
        assert "lower case, CLIP's byte-pair encoding" in card and of_tokens in card


def test_a_run_that_reads_bytes_is_refused_with_the_remedy(tmp_path):
    run = tiny.untrained(tmp_path / "run", "clip")
    for to in ("hf", "open_clip"):
        with pytest.raises(SystemExit, match=r"tokenizer is 'bytes', .*; write to 'safetensors'"):
            export.main(["--checkpoint", str(run), "--to", to, str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    export.main(["--checkpoint", str(run), "--to", "safetensors", str(tmp_path / "out")])
    assert "the bytes of UTF-8 plus 3" in (tmp_path / "out" / "README.md").read_text()
    jax.tree.map(np.testing.assert_array_equal, xclip_jax.load(tmp_path / "out").encode_text(TEXTS),
                 xclip_jax.load(run).encode_text(TEXTS))  # fmt: skip
