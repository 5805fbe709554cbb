import concurrent.futures
import random
import time
import unicodedata

import numpy as np
import pytest
import tokenizers

from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import tokenizer

AWKWARD = [
    "", " ", "\n\t\r\n", "a photo of a cat.", "A  photo&amp;amp; of’s   a CAT", "½ ① ² Ⅷ ٣ ३", "🦊🦊 fox",
    "DON'T we'll I'd they've you're it's I'm", "’quoted‘ “double” ´acute´ ''''s y'all'd've", "12 1234567890 3.14 1e-5",
    "e-mail: a.b+c@d-e.org https://x.org/?q=1&r=%20#top", "👨‍👩‍👧‍👦 family 👩🏽‍🚀 🇩🇪 #️⃣", "日本語 ไทย हिन्दी العربية",
    "Ελληνικά ΣΊΣΥΦΟΣ ς", "İstanbul ISPARTA ı", "Straße STRASSE ẞ", "café café ÅÅ Å z̷̡a̶", "K Å Ω ａｂｃ１２３！",
    "e\u0345 \u0345 !\u0345! \u1fb3 α\u0345", "ﬁ ﬂ ﬆ 'ﬆ it'ſ 'ſ ſ", "schÃ¶n â€œmojibakeâ€\x9d", "&amp;amp;amp; &notit;",
    "&lt;b&gt; &copy; &#8217; &#x1f98a; &ampamp", "<|startoftext|> a <|endoftext|>", "a<start_of_text>b<end_of_text>",
    "<START_OF_TEXT> <ſtart_of_text> <end_of_text", "&lt;end_of_text&gt;", "\x00nul \x1b[31mred \x7fdel \ufffd \ue000",
    "\u00a0non\u2003em\u3000ideographic\u200bzero\ufeffbom line\u2028separator\x0bvt\x85nel\x1cfs", "word " * 200,
    "🦊" * 100, "a" * 1000, "ab" * 500 + " end", "_under__ --dash-- ...dots... `tick` !!!??? ((())) \\\\ // **",
    "a,b;c:d.e!f?g a1b2c3", "</w> a</w> Ġ Ċ ĠĠ ™ → ∑ √",
]  # fmt: skip


@pytest.fixture(scope="module")
def clip():
    return tokenizer.load("clip")


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()


def random_text(rng):
    ranges = [(0x20, 0x7F), (0, 0x250), (0x250, 0x3000), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0x1F300, 0x1FB00)]
    pieces = "'’ſsStrevmlldᴷ<>&;_|#019éİßﬆΣςͅ \u200d\ufe0f\u00a0\u2003\t\n"
    words = ("<start_of_text>", "<end_of_text>", "&amp;", "&lt;", "'S", "cat", "don't", "  ")
    text = ""
    for _ in range(rng.randrange(40)):
        kind = rng.randrange(8)
        text += (
            rng.choice(words) if kind == 7 else rng.choice(pieces) if kind == 6 else chr(rng.randrange(*ranges[kind]))
        )
    # Characters that only a newer Unicode assigns are letters to one regular expression engine and not to another.
    return "".join(char for char in text if unicodedata.category(char) != "Cn")


def first_plane():
    """All assigned characters of the first plane, eight in a text."""
    assigned = [c for c in map(chr, range(0x10000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co", "Lo")]
    return ["".join(f"a{c}1" for c in assigned[i : i + 8]) for i in range(0, len(assigned), 8)]


def random_texts():
    rng = random.Random(0)
    return [random_text(rng) for _ in range(600)]


@pytest.mark.parametrize(
    ("texts", "length"), [(lambda: AWKWARD, 8), (lambda: AWKWARD, 77), (random_texts, 77), (first_plane, 77)]
)
def test_clip_equals_open_clip(clip, reference, texts, length):
    ours, theirs = clip(texts(), length), reference(texts(), length).numpy()
    assert [text for text, a, b in zip(texts(), ours, theirs, strict=True) if (a != b).any()] == []


@pytest.mark.parametrize("name", ["clip", "bytes"])
def test_shape_dtype_and_threads(name):
    tok = tokenizer.load(name)
    rows = tok(AWKWARD, 24)
    assert rows.shape == (len(AWKWARD), 24) and rows.dtype == np.int32
    assert tok([], 24).shape == (0, 24)
    assert ((rows >= 0) & (rows < tok.vocab_size)).all() and (rows == tok.eot_id).any(axis=1).all()
    assert tokenizer.load(name) is tok
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(got, rows) for got in pool.map(lambda _: tok(AWKWARD, 24), range(16)))


def test_ids_of_clip(clip):
    assert clip(["a photo&amp;amp; CAT"], 7)[0].tolist() == [49406, 320, 1125, 261, 2368, 49407, 0]
    assert (clip.name, clip.vocab_size, clip.sot_id, clip.eot_id, clip.pad_id) == ("clip", 49408, 49406, 49407, 0)


def test_bytes_are_reversible():
    tok = tokenizer.load("bytes")
    row = tok(["Füchse 🦊"], 32)[0]
    end = row.tolist().index(tok.eot_id)
    assert row[0] == tok.sot_id and (row[end + 1 :] == tok.pad_id).all()
    assert bytes((row[1:end] - 3).tolist()).decode() == "Füchse 🦊"
    assert len({tok.sot_id, tok.eot_id, tok.pad_id}) == 3 and tok.vocab_size == 259


def save_words(path, words):
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens([word for word in words if word in ("</s>", "<s>", "[SEP]", "<|endoftext|>")])
    model.enable_padding(length=50)
    model.enable_truncation(2)
    model.save(str(path))
    return str(path)


def test_file(tmp_path):
    path = save_words(tmp_path / "tokenizer.json", ["?", "<pad>", "<s>", "</s>", "a", "red", "fox"])
    tok = tokenizer.load(path)
    assert (tok.name, tok.vocab_size, tok.sot_id, tok.eot_id, tok.pad_id) == (path, 7, 2, 3, 1)
    assert tok(["a red fox", "a red red red fox", "a </s> fox"], 7).tolist() == [
        [2, 4, 5, 6, 3, 1, 1],
        [2, 4, 5, 5, 5, 6, 3],
        # Spelt out in a caption the end token is three unknown words, no end.
        [2, 4, 0, 0, 0, 6, 3],
    ]
    tok = tokenizer.load(save_words(tmp_path / "t.json", ["?", "<|endoftext|>", "fox"]))
    assert tok.sot_id is None and tok(["fox fox", "fox"], 3).tolist() == [[2, 2, 1], [2, 1, 0]]


def test_file_and_half_a_surrogate_pair(tmp_path):
    tok = tokenizer.load(save_words(tmp_path / "tokenizer.json", ["?", "<s>", "</s>", "a", "😀", "\ufffd"]))
    assert tok(["a \ud83d", "a \ud83d\ude00"], 5).tolist() == [[1, 3, 5, 2, 0], [1, 3, 4, 2, 0]]
    assert (tok(["a \ud83d"], 5) == tok(["a \ufffd"], 5)).all()


@pytest.mark.parametrize("name", ["clip", "bytes", "file"])
def test_giant_texts_take_bounded_time(name, tmp_path):
    path = save_words(tmp_path / "t.json", ["?", "<s>", "</s>", "fox", "x"])
    tok = tokenizer.load(path if name == "file" else name)
    began = time.process_time()
    for text in ("fox ", "x", "&amp;", "ü", "\u0300", "é\ud83d", "<s>"):
        giant = text * (1 << 20)
        expected = tok([text * 2000], 77)
        np.testing.assert_array_equal(tok([giant], 77), expected)
    assert time.process_time() - began < 10


def test_many_tokens_read_more_of_a_text():
    assert (tokenizer.load("bytes")(["x" * 100_000], 100_002)[0, 1:-1] == ord("x") + 3).all()


def test_errors_name_the_file_or_the_value(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    endless = save_words(tmp_path / "endless.json", ["?", "<s>", "fox"])
    for name in ("klip", endless, str(tmp_path / "broken.json")):
        with pytest.raises(UserError, match=f"'{name}'"):
            tokenizer.load(name)
    for texts, length, named in (("a cat", 8, "'a cat'"), (["a cat"], 1, "length 1")):
        with pytest.raises(UserError, match=named):
            tokenizer.load("bytes")(texts, length)


def test_ids_spell_captions_as_open_clip_does():
    import open_clip

    theirs, ours = open_clip.SimpleTokenizer(), tokenizer.load("clip")
    texts = ["a fox, at 7 o'clock!", "caf\u00e9 \u6771\u4eac \U0001f98a", "x" * 40, "", "a !! b"]
    rows = ours(texts, 77)
    for text, row in zip(texts, rows, strict=True):
        end = list(row).index(ours.eot_id)
        (caption,) = tokenizer.clip_captions(row.astype(np.float32))
        assert caption == theirs.decode(row[1:end].tolist()).strip()
        np.testing.assert_array_equal(ours([caption], 77)[0], row), text
    assert tokenizer.clip_captions(rows.ravel()) == [tokenizer.clip_captions(row)[0] for row in rows]
    assert tokenizer.clip_captions([]) == tokenizer.clip_captions([320, 49407, 0]) == []
    for wrong in (-1, 49408):
        with pytest.raises(BadSample, match="ids that CLIP's tokenizer lacks"):
            tokenizer.clip_captions([49406, wrong, 49407])
