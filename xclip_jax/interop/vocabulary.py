"""Tokenizers of weights: which one a folder contains, and files for transformers and open_clip."""

import hashlib
import json
import struct
from typing import Any

import tokenizers
from etils import epath
from google.protobuf import empty_pb2, unknown_fields
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers.normalizers import NFC, Lowercase, Replace, Strip

from xclip_jax.core import storage
from xclip_jax.core.errors import UserError
from xclip_jax.data import tokenizer
from xclip_jax.interop.tensor_files import json_text, read_json

CLIP_SIZE = 49408
FILE = "tokenizer.json"
SENTENCEPIECE = "spiece.model"
CLIP_FILES = ("vocab.json", "merges.txt")
OPTIONS = "tokenizer_config.json"
_END_OF_SIGLIP2 = "<eos>"  # Gemma's
SPECIAL = "special_tokens_map.json"
# Field numbers and values of SentencePiece's messages.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of a piece
_UNKNOWN = 2  # type of the piece for unknown text
_MODEL_TYPE, _UNIGRAM, _BYTE_FALLBACK = 3, 1, 35  # of the trainer's options
_CHARACTER_MAP = 2  # of the normalizer's options
_REPAIRS = [NFC(), Replace(Regex("[\u02bc\u2018-\u201b]"), "'"), Replace(Regex("[\u201c-\u201f]"), '"')]
_CLEANINGS: dict[str, list[Any]] = {
    "clip": [*_REPAIRS, Lowercase()],
    "open_clip": [*_REPAIRS, Replace(Regex(r"\s+"), " "), Strip()],
    "lower": [Lowercase()],
    "canonical": [Lowercase(), Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), Replace(Regex(r"\s+"), " "), Strip()],
}


def identify(folder: epath.Path, size: int, eot: int | None, cleaning: str = "") -> str:
    """Return the tokenizer of a text tower with `size` ids and pooling at id `eot` (None for the largest id).

    The result is "clip" if the folder's tokenizer.json contains CLIP's vocabulary, or is missing and the sizes are
    CLIP's; otherwise it is the path of this file, or of a copy for texts cleaned by `tokenizer.CLEANINGS[cleaning]`. A
    `UserError` says that neither fits.
    """
    end = size - 1 if eot is None else eot
    file = folder / FILE
    words = folder / CLIP_FILES[0]
    if (size, end) == (CLIP_SIZE, CLIP_SIZE - 1):
        if file.exists() and _is_clips(read_json(file).get("model", {}).get("vocab")):
            return "clip"
        if not file.exists() and (not words.exists() or _is_clips(read_json(words))):
            return "clip"
    fault = f"and its folder has no {FILE}"
    if file.exists():
        stored = tokenizer.load(str(file))
        if (stored.vocab_size, stored.eot_id) == (size, end):
            if not cleaning:
                return str(file)
            ids = {"start": stored.sot_id, "end": end, "pad": stored.pad_id}
            tokens: Any = {key: None if i is None else stored.model.id_to_token(i) for key, i in ids.items()}
            content = tokenizer.with_conventions(file.read_text(), **tokens, size=size, cleaning=cleaning)
            return _cached(content)
        fault = f"and {file} has {stored.vocab_size} and ends texts with {stored.eot_id}"
    raise UserError(
        f"it has {size} token ids and pools texts at id {end}, unlike CLIP's tokenizer, {fault}; save the {FILE} of "
        "these weights there, as transformers' save_pretrained does."
    )


def siglip(folder: epath.Path, size: int) -> str:
    """Return the path of a SigLIP tokenizer with `size` ids: no start token, an end token, and padding that counts.

    The folder's tokenizer.json or spiece.model defines neither padding nor cleaning of texts, so a complete file is
    written to the cache. Its tokenizer_config.json names the padding token; without it texts are padded with the end.
    A `UserError` says that the files are missing, damaged, or contain another vocabulary.
    """
    file = folder / SENTENCEPIECE
    if file.exists():
        model = read_sentencepiece(file.read_bytes(), str(file))
    else:
        file = folder / FILE
        with storage.unreadable_as(f"{file} is not a Hugging Face tokenizers JSON; copy the tokenizer there"):
            # From memory, since the library reads only local disks.
            model = tokenizers.Tokenizer.from_str(tokenizer.read_file(str(file)).decode())
    options = read_json(folder / OPTIONS) if (folder / OPTIONS).exists() else {}
    model.no_padding()
    model.no_truncation()
    added = model.encode("").ids  # tokens of the file's template
    end = str(model.id_to_token(added[-1])) if added else _token(options.get("eos_token")) or "</s>"
    pad = _token(options.get("pad_token")) or end
    ids = [model.token_to_id(token) for token in (end, pad)]
    fault = ""
    if any(i is None or i >= size for i in ids):
        fault = f"{file.name} ends texts with {end!r} and pads them with {pad!r}, of ids {ids[0]} and {ids[1]}"
    elif not options and model.token_to_id(_END_OF_SIGLIP2) is not None:
        fault = f"{OPTIONS}, which names the padding of SigLIP 2, is missing"
    elif not options.get("do_lower_case", True):
        fault = f"{OPTIONS} sets do_lower_case to false, which is not supported"
    if fault:
        raise UserError(f"it has {size} token ids, and {fault}; copy the files of its tokenizer into {folder}.")
    # SigLIP 2 was trained on texts in lower case only.
    cleaning = "lower" if end == _END_OF_SIGLIP2 else "canonical"
    model.post_processor = processors.Sequence([])
    content = tokenizer.with_conventions(model.to_str(), end=end, pad=pad, size=size, cleaning=cleaning)
    return _cached(content)


def _cached(content: str) -> str:
    """Write a tokenizer file to the cache, and return its path."""
    path = storage.cache_dir() / "tokenizers" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(epath.Path(path), content)
    return str(path)


def _token(value: Any) -> str | None:
    """Return a token of tokenizer_config.json, which may be stored as a dict of content and options."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _is_clips(vocabulary: Any) -> bool:
    """Whether {word: id} contains CLIP's words, except start and end, which have several spellings."""
    words = tokenizer.clip_vocabulary()[0]
    return isinstance(vocabulary, dict) and all(vocabulary.get(word) == i for i, word in enumerate(words))


def clip_files(length: int) -> dict[str, str]:
    """Return {file: content} of CLIP's tokenizer for transformers, for texts of `length` tokens."""
    words, merges = tokenizer.clip_vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    return {
        CLIP_FILES[0]: json.dumps({word: i for i, word in enumerate([*words, start, end])}, ensure_ascii=False),
        CLIP_FILES[1]: "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        OPTIONS: json_text(options),
        SPECIAL: json_text(special),
    }


def complete(tokens: tokenizer.Tokenizer, length: int) -> str:
    """Return a tokenizer.json for rows of `length`; of CLIP's cleaning it lacks HTML entities and most repairs."""
    model = tokenizers.Tokenizer.from_str(tokens.model.to_str())
    steps = [*_CLEANINGS.get(tokens.cleaning or tokens.name, []), model.normalizer]
    model.normalizer = normalizers.Sequence(list(filter(None, steps)))
    special = [(str(model.id_to_token(i)), i) for i in (tokens.sot_id, tokens.eot_id) if i is not None]
    *start, end = (token for token, _ in special)
    model.post_processor = processors.TemplateProcessing([*start, "$A", end], special_tokens=special)
    model.enable_truncation(length)
    model.enable_padding(length=length, pad_id=tokens.pad_id, pad_token=str(model.id_to_token(tokens.pad_id)))
    content = json.loads(model.to_str())
    # The file has no `encode_special_tokens`: a special token in a text would end the row.
    words = model.get_vocab(with_added_tokens=False)
    added = content["added_tokens"]
    content["added_tokens"] = [token for token in added if not (token["special"] and token["content"] in words)]
    return json.dumps(content, ensure_ascii=False)


def read_sentencepiece(data: bytes, where: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of a SentencePiece file (spiece.model) with a unigram model.

    Only the fields that determine the ids are read from this Protocol Buffers message, `ModelProto` of
    sentencepiece_model.proto. A `UserError` about another or a damaged file begins with `where`.
    """
    with storage.unreadable_as(
        f"{where} is damaged, or not a unigram model of SentencePiece; replace it by the {FILE} of these weights"
    ):
        fields = _fields(data)
        pieces = [dict(_fields(value)) for number, value in fields if number == _PIECES]
        trainer, normalizer = (
            dict(_fields(b"".join(value for number, value in fields if number == group)))
            for group in (_TRAINER, _NORMALIZER)
        )
        scores = [struct.unpack("<f", struct.pack("<I", piece.get(_SCORE, 0)))[0] for piece in pieces]
        vocabulary = [(piece[_TEXT].decode(), score) for piece, score in zip(pieces, scores, strict=True)]
        unknown = next(i for i, piece in enumerate(pieces) if piece.get(_TYPE) == _UNKNOWN)
        kind = {_UNIGRAM: models.Unigram}[trainer.get(_MODEL_TYPE, _UNIGRAM)]
        model = tokenizers.Tokenizer(kind(vocabulary, unknown, bool(trainer.get(_BYTE_FALLBACK))))
        steps = [normalizers.Precompiled(normalizer[_CHARACTER_MAP])] if normalizer.get(_CHARACTER_MAP) else []
    model.normalizer = normalizers.Sequence([*steps, Replace(Regex(" {2,}"), " ")])
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    return model


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """Return (number, value) for each field of a message; a value is an integer or bytes."""
    message = empty_pb2.Empty.FromString(data)  # ty: ignore[missing-attribute] no field is known
    return [(field.field_number, field.data) for field in unknown_fields.UnknownFieldSet(message)]
