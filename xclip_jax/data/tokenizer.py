"""Text -> token ids: `load("clip")` is CLIP's byte-pair encoding, `load("bytes")` needs no file, a path reads others.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021; the ids agree
with open_clip's `SimpleTokenizer` on every character that Unicode 15 assigns.
"""

import dataclasses
import functools
import gzip
import html
import json
import string
from collections.abc import Callable, Sequence

import ftfy
import numpy as np
import tokenizers

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.base import join_surrogates

__all__ = ["Tokenizer", "load"]

NAMES = ("clip", "bytes")
END_TOKENS = ("<|endoftext|>", "</s>", "[SEP]")
START_TOKENS = ("<|startoftext|>", "<s>", "[CLS]")
PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>")
_CONVENTIONS = "xclip_jax"  # first key of a file of `with_conventions`
_MOST_LETTERS = 1 << 16  # later letters of a text are ignored, since megabytes would take seconds
_CLIP_MERGES = 48894
_CLIP_START, _CLIP_END = "<start_of_text>", "<end_of_text>"
_WORD_END = "</w>"  # at the end of words in CLIP's vocabulary
# \p{L} has no brackets: in a class that ignores case, U+0345, which open_clip drops, would count as the letter iota.
_CLIP_WORDS = rf"(?i){_CLIP_START}|{_CLIP_END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"


@dataclasses.dataclass(eq=False)
class Tokenizer:
    """Callable (texts, length) -> int32 (b, length), from `load`; immutable and thread-safe.

    All ids are below `vocab_size`. A row consists of `sot_id`, if the vocabulary has one, the text, cleaned by
    `CLEANINGS[cleaning]` and truncated, `eot_id`, and `pad_id`. `model` encodes a cleaned text without these ids.
    """

    name: str
    _encode: Callable[[str], list[int]]
    model: tokenizers.Tokenizer
    vocab_size: int
    sot_id: int | None
    eot_id: int
    pad_id: int
    cleaning: str = ""

    def __call__(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Return int32 (len(texts), length): start, text, end, padding. Longer texts are cut before their end token.

        Only the first 65,536 letters of a text count, or 256 for each token if this is more. `UserError` if `texts` is
        a string, or `length` is below 2, for a start and an end.
        """
        if isinstance(texts, str) or length < 2:
            raise UserError(
                f"texts {texts[:40]!r}, length {length}: pass a list of strings, and a length of at least 2."
            )
        out = np.full((len(texts), length), self.pad_id, np.int32)
        start = [] if self.sot_id is None else [self.sot_id]
        most = max(_MOST_LETTERS, 256 * length)
        for row, text in zip(out, texts, strict=True):
            ids = [*(start + self._encode(text[:most]))[: length - 1], self.eot_id]
            row[: len(ids)] = ids
        return out

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each row (n, length), up to its first end token; padding may equal it."""
        return (tokens == self.eot_id).argmax(axis=1) + 1


def load(name: str) -> Tokenizer:
    """Return a tokenizer: "clip" (49,408 ids), "bytes" (259), or the path of a Hugging Face `tokenizers` JSON file.

    `UserError` for an unknown name, an unreadable file, or a vocabulary without an end token.
    """
    if name == "clip":
        return _clip()
    if name == "bytes":
        return _bytes()
    path = storage.as_path(name)
    if path.is_file():
        return _from_file(str(path), path.stat().mtime)
    raise UserError(f"tokenizer {name!r} must be one of {', '.join(map(repr, NAMES))} or the path of a tokenizer.json.")


def read_file(name: str) -> bytes:
    """Return the content of a tokenizer file; "~" is the home folder."""
    return storage.as_path(name).read_bytes()


def repair(text: str) -> str:
    """open_clip's cleaning for any tokenizer: repair encodings, resolve HTML entities twice, and fold white space."""
    # The slow repair is needless for printable ASCII without entities.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def clean(text: str) -> str:
    """CLIP's cleaning: `repair`, and lower case."""
    return repair(text).lower()


def _lower_without_punctuation(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


# Like in transformers, SigLIP's texts are lower case without ASCII punctuation, and SigLIP 2's lower case.
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
CLEANINGS: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "lower": str.lower,
    "canonical": _lower_without_punctuation,
    "open_clip": repair,
}


def with_conventions(content: str, *, end: str, pad: str, size: int, cleaning: str, start: str | None = None) -> str:
    """Wrap a tokenizer file with conventions assumed by another project's weights but missing in the file.

    `end`, `pad` and `start` are tokens, the last None if the weights use none, `size` is the number of ids, and
    `cleaning` a key of `CLEANINGS`.
    """
    conventions = {"start": start, "end": end, "pad": pad, "size": size, "cleaning": cleaning}
    return json.dumps({_CONVENTIONS: conventions, "tokenizer": json.loads(content)}, ensure_ascii=False)


@functools.cache
def clip_vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Return the words of CLIP's vocabulary by id, without the start and end tokens, and its merges."""
    lines = gzip.decompress(storage.third_party("bpe_simple_vocab_16e6.txt.gz")).decode("utf-8").split("\n")
    merges = [(first, second) for first, second in map(str.split, lines[1 : 1 + _CLIP_MERGES])]
    # Letters of printable bytes precede the others.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in [*printable, *range(256, 512 - len(printable))]]
    return [*letters, *(f"{letter}{_WORD_END}" for letter in letters), *(a + b for a, b in merges)], merges


def clip_captions(ids: Sequence[float]) -> list[str]:
    """Decode ids of CLIP's tokenizer, with which some tables store one caption or several in a row.

    Captions begin with the start token; ids after their end token are padding. `BadSample` for unknown ids.
    """
    words = clip_vocabulary()[0]
    captions = []
    for i in map(int, ids):
        if not 0 <= i < len(words) + 2:
            raise BadSample("caption has ids that CLIP's tokenizer lacks", str(i))
        if i == len(words):
            inside = []
            captions.append(inside)
        elif i > len(words):
            inside = []
        elif captions:
            inside.append(words[i])
    spelling = tokenizers.decoders.ByteLevel()
    return [spelling.decode(caption).replace(_WORD_END, " ").strip() for caption in captions]


@functools.cache
def _clip() -> Tokenizer:
    words, merges = clip_vocabulary()
    vocab = {word: i for i, word in enumerate([*words, _CLIP_START, _CLIP_END])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, end_of_word_suffix=_WORD_END))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    spell = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, spell])
    special = {_CLIP_START: vocab[_CLIP_START], _CLIP_END: vocab[_CLIP_END]}

    def encode(text: str) -> list[int]:
        text = clean(text)
        if not any(token in text for token in special):
            return bpe.encode(text, add_special_tokens=False).ids
        # No merge makes these two tokens, so BPE would split them, unlike open_clip.
        ids = []
        for piece, _ in bpe.pre_tokenizer.pre_tokenize_str(text):
            ids += [special[piece]] if piece in special else [token.id for token in bpe.model.tokenize(piece)]
        return ids

    start, end = special.values()
    return Tokenizer("clip", encode, bpe, vocab_size=len(vocab), sot_id=start, eot_id=end, pad_id=0)


@functools.cache
def _bytes() -> Tokenizer:
    def encode(text: str) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8", "replace")]

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    return Tokenizer("bytes", encode, model, vocab_size=len(vocab), sot_id=1, eot_id=2, pad_id=0)


@functools.lru_cache
def _from_file(path: str, _modified: float) -> Tokenizer:
    """Read a file once, and again if it is replaced."""
    end_tokens, pad_tokens, start_tokens = END_TOKENS, PAD_TOKENS, START_TOKENS
    size = 0
    cleaning = ""
    try:
        content = read_file(path).decode()
        if content.startswith(f'{{"{_CONVENTIONS}"'):
            wrapped = json.loads(content)
            content = json.dumps(wrapped["tokenizer"])
            conventions = wrapped[_CONVENTIONS]
            end_tokens, pad_tokens, start_tokens = ((conventions.get(key),) for key in ("end", "pad", "start"))
            size, cleaning = conventions["size"], conventions["cleaning"]
        cleaned = CLEANINGS[cleaning]
        model = tokenizers.Tokenizer.from_str(content)
        vocabulary = model.get_vocab(with_added_tokens=True)
        end = next(vocabulary[token] for token in end_tokens if token in vocabulary)
    except BaseException as error:  # the library raises any Exception, and Rust's PanicException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"tokenizer file {path!r} is not a Hugging Face tokenizers JSON with an end token, one of "
            f"{', '.join(end_tokens)} ({error!r})."
        ) from error
    model.no_padding()
    model.no_truncation()
    # A caption that contains "</s>" must not end its row.
    model.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        return model.encode(cleaned(join_surrogates(text)), add_special_tokens=False).ids

    return Tokenizer(
        path,
        encode,
        model,
        vocab_size=size or max(vocabulary.values()) + 1,
        sot_id=next((vocabulary[token] for token in start_tokens if token in vocabulary), None),
        eot_id=end,
        pad_id=next((vocabulary[token] for token in pad_tokens if token in vocabulary), 0),
        cleaning=cleaning,
    )
