"""Tokenizers of weights: identify the tokenizer of a folder, and write files for transformers and open_clip."""

import hashlib
import json
import struct
from collections.abc import Iterator
from typing import Any

import tokenizers
from etils import epath
from tokenizers import models, normalizers, pre_tokenizers, processors

from xclip_jax.core import storage
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import write_whole
from xclip_jax.data import tokenizer
from xclip_jax.interop.tensor_files import read_json

CLIP_SIZE = 49408
FILE = "tokenizer.json"
SENTENCEPIECE = "spiece.model"
CLIP_FILES = ("vocab.json", "merges.txt")
OPTIONS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
# Field numbers and values of SentencePiece's messages.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of a piece
_UNKNOWN = 2  # type of the piece of what the vocabulary lacks
_MODEL_TYPE, _UNIGRAM = 3, 1  # of the trainer's options
_BYTE_FALLBACK = 35
_CHARACTER_MAP = 2  # of the normalizer's options
_SPACE = "▁"


def identify(folder: epath.Path, size: int, eot: int | None, where: str) -> str:
    """Return the tokenizer of a text tower of `size` ids that pools at id `eot` (None: the largest id).

    Returns:
      "clip" if the folder's tokenizer.json has CLIP's vocabulary, or is missing and the sizes are CLIP's; else the path
      of this file.

    Raises:
      UserError: neither has this number of ids and this end, or the folder has another vocabulary.
    """
    end = size - 1 if eot is None else eot
    like_clip = (size, end) == (CLIP_SIZE, CLIP_SIZE - 1)
    file, words = folder / FILE, folder / CLIP_FILES[0]
    if file.exists():
        if like_clip and _is_clips(read_json(file).get("model", {}).get("vocab")):
            return "clip"
        stored = tokenizer.load(str(file))
        if (stored.vocab_size, stored.eot_id) != (size, end):
            remedy = f", or remove {FILE} if the tokenizer is CLIP's" if like_clip else ""
            raise UserError(
                f"{where} has {size} token ids and pools texts at id {end}; {file} has {stored.vocab_size} and ends "
                f"texts with {stored.eot_id}. Replace it by the {FILE} of these weights{remedy}."
            )
        return str(file)
    if not like_clip:
        raise UserError(
            f"{where} has a vocabulary of {size} with end {end}, which is not CLIP's, and no {FILE} in its folder; "
            "copy the file of its tokenizer there."
        )
    if words.exists() and not _is_clips(read_json(words)):
        raise UserError(
            f"{words} is not CLIP's vocabulary; save the tokenizer as {FILE} in its folder, as transformers' "
            "save_pretrained does."
        )
    return "clip"


def siglip(folder: epath.Path, size: int, cleaning: str, where: str) -> str:
    """Return the path of a SigLIP tokenizer with `size` ids: no start token, an end token, and padding that counts.

    The folder's file defines neither padding nor cleaning of texts, so a complete file is written to the cache.

    Args:
      folder: has tokenizer.json or spiece.model; tokenizer_config.json names the padding, which is else the end token.
      size: number of ids of the text tower.
      cleaning: cleaning of the first SigLIP, a name of `tokenizer.CLEANINGS`; SigLIP 2 only has texts in lower case.
      where: path of the weights, for errors.

    Raises:
      UserError: no file, a damaged one, or one of another vocabulary.
    """
    file, pieces = folder / FILE, folder / SENTENCEPIECE
    if pieces.exists():
        file, model = pieces, read_sentencepiece(pieces.read_bytes(), str(pieces))
    elif file.exists():
        model = _library_tokenizer(file)
    else:
        raise UserError(
            f"{where} has no {FILE} or {SENTENCEPIECE} in its folder; copy the file of its tokenizer there."
        )
    options = read_json(folder / OPTIONS) if (folder / OPTIONS).exists() else {}
    model.no_padding()
    model.no_truncation()
    added = model.encode("").ids  # tokens of the file's template
    end = str(model.id_to_token(added[-1])) if added else _token(options.get("eos_token")) or "</s>"
    pad = _token(options.get("pad_token")) or end
    ids = [model.token_to_id(token) for token in (end, pad)]
    if any(i is None or i >= size for i in ids):
        raise UserError(
            f"{where} has {size} token ids; {file} ends texts with {end!r} and pads them with {pad!r}, of ids {ids[0]} "
            f"and {ids[1]}. Replace it by the file of these weights."
        )
    if not options.get("do_lower_case", True):
        raise UserError(f"{folder / OPTIONS} sets do_lower_case to false, which is not supported; expected true.")
    if str(options.get("tokenizer_class")).startswith(("Gemma", "Siglip2")) and cleaning == "canonical":
        cleaning = "lower"
    model.post_processor = processors.Sequence([])
    content = tokenizer.with_conventions(model.to_str(), end=end, pad=pad, size=size, cleaning=cleaning)
    path = storage.cache_dir() / "tokenizers" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(epath.Path(path), content)
    return str(path)


def _library_tokenizer(file: epath.Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(file.read_text())
    except Exception as error:  # The library raises bare `Exception`.
        raise UserError(f"{file} is not a Hugging Face tokenizers JSON: {error}") from error


def _token(value: Any) -> str | None:
    """Return a token of tokenizer_config.json, which may be a dict of content and options."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _is_clips(vocabulary: Any) -> bool:
    """Whether {word: id} has CLIP's words; start and end, which have several spellings, are ignored."""
    if not isinstance(vocabulary, dict):
        return False
    return all(vocabulary.get(word) == i for i, word in enumerate(tokenizer.clip_vocabulary()[0]))


def clip_files(length: int) -> dict[str, str]:
    """Return {file: content} of CLIP's tokenizer for transformers, for texts of `length` tokens."""
    words, merges = tokenizer.clip_vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    return {
        CLIP_FILES[0]: json.dumps({word: i for i, word in enumerate([*words, start, end])}, ensure_ascii=False),
        CLIP_FILES[1]: "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        OPTIONS: json.dumps(options, indent=2) + "\n",
        SPECIAL: json.dumps(special, indent=2) + "\n",
    }


def own_files(path: str, length: int) -> dict[str, str]:
    """Return {file: content} of a tokenizer for transformers, which open_clip uses too, with the same ids as here.

    Our tokenizer adds start, end and padding itself and reads special tokens in a text as text; the files configure the
    same for other projects.

    Args:
      path: a tokenizer file that `tokenizer.load` reads.
      length: tokens of a text.
    """
    ours = tokenizer.load(path)
    if ours.cleaning:
        raise UserError(f"{path} is SigLIP's tokenizer, which other formats cannot express; write to 'safetensors'.")
    model = _read(path)
    model.no_padding()
    model.no_truncation()

    def token(i: int) -> str:
        if (text := model.id_to_token(i)) is None:
            raise UserError(f"{path} has no token of id {i}; repair the file.")
        return text

    start, end = [] if ours.sot_id is None else [token(ours.sot_id)], token(ours.eot_id)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*start, "$A", end], special_tokens=[(text, model.token_to_id(text)) for text in (*start, end)]
    )
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "padding_side": "right",
        "truncation_side": "right", "split_special_tokens": True, "clean_up_tokenization_spaces": False,
        **({"bos_token": start[0]} if start else {}), "eos_token": end, "pad_token": token(padding(ours)),
    }  # fmt: skip
    return {FILE: model.to_str(), OPTIONS: json.dumps(options, indent=2) + "\n"}


def _read(path: str) -> tokenizers.Tokenizer:
    # The library's `from_file` only reads local disks.
    return tokenizers.Tokenizer.from_str(epath.Path(path).read_text())


def padding(tokens: tokenizer.Tokenizer) -> int:
    """Return the id to pad with in other projects: the padding token's id if there is one, else the end's, as for CLIP.

    Towers do not read tokens after the first end, so both give the same embeddings.
    """
    if tokens.name in tokenizer.NAMES:
        return tokens.eot_id
    token = _read(tokens.name).id_to_token(tokens.pad_id)
    return tokens.pad_id if token in tokenizer.PAD_TOKENS else tokens.eot_id


def read_sentencepiece(data: bytes, where: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of a SentencePiece file (spiece.model), without the library SentencePiece.

    The file is a Protocol Buffers message, `ModelProto` of sentencepiece_model.proto, read here as far as it
    decides the ids of a unigram model.

    Args:
      data: content of the file.
      where: path of the file, for errors.

    Raises:
      UserError: another file, a damaged one, or a model that is not of the unigram kind.
    """
    try:
        fields = list(_fields(data))
        pieces = [dict(_fields(value)) for number, value in fields if number == _PIECES]
        trainer, normalizer = (
            dict(_fields(b"".join(value for number, value in fields if number == group)))
            for group in (_TRAINER, _NORMALIZER)
        )
        vocabulary = [(piece[_TEXT].decode(), *struct.unpack("<f", piece.get(_SCORE, bytes(4)))) for piece in pieces]
        unknown = next(i for i, piece in enumerate(pieces) if piece.get(_TYPE) == _UNKNOWN)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, StopIteration, struct.error) as error:
        raise UserError(f"{where} is not a file of SentencePiece, or damaged; download it again.") from error
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM:
        raise UserError(f"{where} is not a unigram model; put the tokenizer.json of these weights into its folder.")
    try:
        model = tokenizers.Tokenizer(models.Unigram(vocabulary, unknown, bool(trainer.get(_BYTE_FALLBACK))))
        steps = [normalizers.Precompiled(normalizer[_CHARACTER_MAP])] if normalizer.get(_CHARACTER_MAP) else []
    except Exception as error:  # The library raises bare `Exception`.
        raise UserError(f"{where} cannot be read: {error}.") from error
    model.normalizer = normalizers.Sequence([*steps, normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a message's fields; a value is an integer for a varint, else bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a varint without end")

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 2: None, 5: 4}[kind]
        length = varint() if length is None else length
        if at + length > len(data):
            raise ValueError("a field beyond the end")
        yield key >> 3, data[at : at + length]
        at += length
