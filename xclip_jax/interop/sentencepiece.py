"""Files of SentencePiece (spiece.model) as tokenizers of the library `tokenizers`, without SentencePiece.

Such a file is a Protocol Buffers message, `ModelProto` of sentencepiece_model.proto; this reader knows the fields that
decide the ids of a unigram model.
"""

import struct
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from xclip_jax.core.errors import UserError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of a piece
_UNKNOWN = 2  # type of the piece of what the vocabulary lacks
_MODEL_TYPE, _UNIGRAM = 3, 1  # of the trainer's options
_BYTE_FALLBACK = 35
_CHARACTER_MAP = 2  # of the normalizer's options
_SPACE = "▁"


def convert(data: bytes, where: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of a file.

    Args:
      data: content of the file.
      where: its path, for errors.

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
        raise UserError(f"{where} is not a unigram model; put the tokenizer.json of these weights beside it.")
    try:
        model = tokenizers.Tokenizer(models.Unigram(vocabulary, unknown, bool(trainer.get(_BYTE_FALLBACK))))
        steps = [normalizers.Precompiled(normalizer[_CHARACTER_MAP])] if normalizer.get(_CHARACTER_MAP) else []
    except Exception as error:  # The library raises bare `Exception`.
        raise UserError(f"{where} cannot be read: {error}.") from error
    model.normalizer = normalizers.Sequence([*steps, normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield numbers and values of a message's fields: integers of varints, else bytes."""
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
