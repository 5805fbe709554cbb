"""Tokenizers of weights: whose vocabulary it is, and that other projects read the tokenizer of an export."""

import json

import numpy as np
import open_clip
import pytest
import tokenizers
import transformers
from PIL import Image

import xclip_jax
from tests.helpers import bad_tars, tiny
from tests.helpers.foreign import (
    B32,
    TEXT,
    assert_same,
    images,
    make_hf,
    ours,
    save_open_clip,
    shaken,
    theirs_hf,
    theirs_open_clip,
)  # fmt: skip
from xclip_jax import interop
from xclip_jax.commands import export
from xclip_jax.core.errors import UserError
from xclip_jax.data import tokenizer
from xclip_jax.interop import vocabulary


def words(path, size, end):
    vocab = {f"w{i}": i for i in range(size)}
    del vocab[f"w{end}"]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab | {"<|endoftext|>": end}, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(path))


@pytest.mark.parametrize(("size", "end"), [(9, 5), (vocabulary.CLIP_SIZE, vocabulary.CLIP_SIZE - 1)])
def test_a_tokenizer_of_its_own_is_read_with_open_clips_weights(size, end, tmp_path, monkeypatch):
    """Also one of CLIP's size, and one whose end is not the largest id: open_clip pools at it by name, and cleans."""
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    text = TEXT | {"vocab_size": size} | ({"pool_type": "eos", "eos_id": end} if end < size - 1 else {})
    model = shaken(open_clip.model.CLIP(48, B32, text))
    options = {"vision_cfg": B32, "text_cfg": text | {"hf_tokenizer_name": "lab/x"}}
    save_open_clip(tmp_path, model.state_dict(), options)
    words(tmp_path / "tokenizer.json", size, end)
    config, variables = interop.read(str(tmp_path))
    known, length = tokenizer.load(config["data"]["tokenizer"]), TEXT["context_length"]
    tokens = known(["w7&amp;nbsp;w6", "", "w1 w1\u00a0w1", "w2"], length)
    assert tokens[0, :4].tolist() == [7, 6, end, 0]
    assert open_clip.tokenizer.get_clean_fn("whitespace")("w7&amp;nbsp;w6") == "w7 w6"
    whole = tokenizers.Tokenizer.from_str(vocabulary.complete(known, length))
    assert whole.encode(" w1\u00a0w1 w1").ids == tokens[2].tolist()
    pixels = images(28)
    assert_same(ours(config, variables, pixels, tokens), theirs_open_clip(model, pixels, tokens))


def test_a_tokenizer_of_its_own_is_read_with_transformers_weights(tmp_path):
    make_hf("gelu", 1e-5, 5, 4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"49408 token ids .*id 5, .*its folder has no tokenizer\.json; save"):
        interop.read(str(tmp_path))
    words(tmp_path / "tokenizer.json", 49408, 5)
    config, variables = interop.read(str(tmp_path))
    tokens = tokenizer.load(config["data"]["tokenizer"])(["w7 w9", "", "w1 w1 w1", "w2"], 12)
    assert tokens[0, :4].tolist() == [7, 9, 5, 0]
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert_same(ours(config, variables, images(28), tokens), theirs_hf(model, images(28), tokens))


def test_clips_own_files_are_clip(tmp_path):
    """As the Hub has them: vocab.json and merges.txt of transformers, or its tokenizer.json too."""
    make_hf("gelu", 1e-5, 49407, 4).save_pretrained(tmp_path)
    for name, content in vocabulary.clip_files(12).items():
        (tmp_path / name).write_text(content)
    assert interop.read(str(tmp_path))[0]["data"]["tokenizer"] == "clip"
    transformers.CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert interop.read(str(tmp_path))[0]["data"]["tokenizer"] == "clip"
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({f"w{i}": i for i in range(49408)}))
    with pytest.raises(UserError, match=r"49408 token ids .*its folder has no tokenizer\.json; save"):
        interop.read(str(tmp_path))
    words(tmp_path / "tokenizer.json", 300, 299)
    with pytest.raises(UserError, match=r"49408 token ids .*/tokenizer\.json has 300 "):
        interop.read(str(tmp_path))


@pytest.mark.parametrize("name", ["clip", "bytes", "words.json"])
def test_a_whole_tokenizer_needs_no_other_code(name, tmp_path):
    """Cleaning, start, end, truncation and padding are in the file; CLIP's ids are open_clip's."""
    words(tmp_path / "words.json", 300, 299)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "words.json"))
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(tmp_path / "words.json"))
    texts = ["", "A  photo of  a CAT", "the dog\u2019s \u201cbone\u201d", "cafe\u0301 d\u02bcor", "w7 w9", "123 " * 30]
    texts += ["w1 <|endoftext|> w2"] if name == "words.json" else []
    known = tokenizer.load(str(tmp_path / name) if name.endswith("json") else name)
    found = [row.ids for row in tokenizers.Tokenizer.from_str(vocabulary.complete(known, 12)).encode_batch(texts)]
    expected = open_clip.SimpleTokenizer(context_length=12)(texts) if name == "clip" else known(texts, 12)
    np.testing.assert_array_equal(found, expected)


def test_open_clip_with_clips_tokenizer_of_transformers_is_clip(tmp_path):
    options = {"vision_cfg": B32, "text_cfg": TEXT | {"hf_tokenizer_name": "openai/clip"}}
    save_open_clip(tmp_path, open_clip.model.CLIP(48, B32, TEXT).state_dict(), options)
    config, _ = interop.read(str(tmp_path))
    assert config["data"]["tokenizer"] == "clip" and "is assumed to be CLIP's" in config["source"]["notes"][0]


# --- the card


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with CLIP's tokenizer that is not trained, and folders of its exports by format."""
    folder = tmp_path_factory.mktemp("exports")
    run = tiny.untrained(folder / "run", "clip", data__tokenizer="clip")
    for to in interop.FORMATS:
        export.export(str(run), str(folder / to), to=to)
    return run, folder


def test_the_code_of_the_card_runs(exported, tmp_path, monkeypatch, capsys):
    run, folder = exported
    model = xclip_jax.load(run)
    monkeypatch.chdir(folder)
    Image.fromarray(np.asarray(bad_tars.picture(0, w=30, h=20))).save("picture.jpg")
    for to in interop.FORMATS:
        card = (folder / to / "README.md").read_text()
        assert "* Images: shorter side bicubic, central crop, 16 x 16 pixels;" in card
        assert "minus the mean (0.485, 0.456, 0.406), divided by the standard deviation (0.229, 0.224, 0.225)" in card
        assert "lower case, CLIP's byte-pair encoding" in card and "At most 12 tokens" in card
        assert ("which transformers does not" in card) == (to == "hf")
        capsys.readouterr()
        names = {}
        exec(card.split("```python\n")[1].split("```")[0], names)
        assert capsys.readouterr().out
        if to == "safetensors":
            expected = model.zero_shot(["picture.jpg"], ["cat", "dog"]).probabilities
            np.testing.assert_allclose(names["result"].probabilities, expected, atol=1e-6)
        else:
            expected = model.zero_shot(["picture.jpg"], ["cat", "dog"], ["a photo of a {}"]).probabilities
            np.testing.assert_allclose(names["logits"].softmax(dim=-1).numpy(), expected, atol=1e-3)


def test_a_run_that_reads_bytes_is_refused_with_the_remedy(run, tmp_path):
    with pytest.raises(SystemExit, match=r"tokenizer is 'bytes', .*; write to 'safetensors'"):
        export.main(["--checkpoint", str(run), "--to", "open_clip", str(tmp_path / "out")])
    export.main(["--checkpoint", str(run), "--to", "safetensors", str(tmp_path / "out")])
    assert "the bytes of UTF-8 plus 3" in (tmp_path / "out" / "README.md").read_text()
    assert interop.read(str(tmp_path / "out"))[0]["data"]["tokenizer"] == "bytes"
