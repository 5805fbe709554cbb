"""Readers that `tests.torture.fuzz` gives hostile inputs: each takes bytes, and raises what a command would meet."""

import dataclasses
import io
import pathlib
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence

import numpy as np
import safetensors.numpy
import tokenizers
from absl import flags
from etils import epath
from tokenizers import normalizers, pre_tokenizers

from tests.torture import fuzz_data, fuzz_inputs
from xclip_jax.config import load, schema
from xclip_jax.core import fields
from xclip_jax.data import images, tokenizer
from xclip_jax.interop import tensor_files

Path = pathlib.Path


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something that reads what others wrote.

    Attributes:
      seeds: sound inputs.
      read: reads an input in an empty folder; raises `UserError` or `SystemExit` with a sentence, and else nothing.
      make: makes an input of the seeds.
    """

    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[bytes, Path], object]
    make: fuzz_inputs.Make = fuzz_inputs.mutated


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


_TEXTS = ("a red fox &amp; a dog", "ünïcödé 🦊 fox", "l’été <start_of_text> <end_of_text>", "\u0345\u0300 \ud83d")
_TEXT_BYTES = [text.encode("utf-8", "surrogatepass") for text in _TEXTS]


def _tokenizer_files() -> list[bytes]:
    words = {word: i for i, word in enumerate(["?", "</s>", "<s>", "f", "o", "x", "fo", "fox"])}
    scores = [(word, -float(i)) for word, i in words.items()]
    models = tokenizers.models
    made = [
        models.WordLevel(words, unk_token="?"),
        models.BPE(words, [("f", "o"), ("fo", "x")], unk_token="?"),
        models.Unigram(scores, 0),
        models.WordPiece(words, unk_token="?"),
    ]
    files = []
    for model in made:
        made_tokenizer = tokenizers.Tokenizer(model)
        made_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        split = pre_tokenizers.Split(tokenizers.Regex(r"\s+|\p{P}"), "removed")
        made_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Digits()])
        made_tokenizer.add_special_tokens(["</s>", "<s>"])
        files.append(made_tokenizer.to_str().encode())
    return files


def _read_tokenizer_file(data: bytes, folder: Path) -> None:
    path = str(folder / "tokenizer.json")
    Path(path).write_bytes(data)
    loaded = tokenizer._from_file(path, 0.0)
    for text in (*_TEXTS, "", "x" * 3000):
        loaded([text], 16)


def _keys() -> list[bytes]:
    return [name.encode() for name, *_ in fields.describe(schema.Config)]


def _read_overrides(data: bytes, _: Path) -> None:
    defined = set(flags.FLAGS)
    try:
        load.parse(["main", "--config", "demo", *_text(data).split("\n")])
        schema.resolve(flags.FLAGS.config)
    finally:
        for name in set(flags.FLAGS) - defined:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def _safetensors() -> list[bytes]:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.float16), "c": np.int64(3)}
    return [
        safetensors.numpy.save({k: np.asarray(v) for k, v in arrays.items()}, {"format": "pt"}),
        safetensors.numpy.save({}),
    ]


def _read_tensors(name: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> object:
        (folder / "model.safetensors").write_bytes(_safetensors()[0])
        (folder / name).write_bytes(data)
        return tensor_files.tensors(
            tensor_files.find(str(folder / name)) if "index" not in name else epath.Path(folder / name)
        )

    return read


_INDEXES = [
    b'{"weight_map": {"a": "model.safetensors", "b": "x.bin"}}',
    b'{"weight_map": {"a": "model.safetensors"}}',
]
_STORAGE = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((" + _STORAGE + b"K\0K\x04\x85K\x01\x85\x89}tR"


def _pickled() -> list[bytes]:
    return [
        b"\x80\x02}q\0(X\x01\0\0\0x" + _TENSOR + b"X\x01\0\0\0yccollections\nOrderedDict\n)Ru.",
        pickle.dumps({"x": [1]}),
    ]


def _torch_files() -> list[bytes]:
    return [_torch_file(pickled) for pickled in _pickled()]


def _torch_file(pickled: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
    return out.getvalue()


READERS = {
    "tar": Reader(fuzz_data.tars, fuzz_data.read_tar),
    "image": Reader(fuzz_data.images, fuzz_data.read_image),
    "captions": Reader(lambda: fuzz_data.CAPTION_FILES, fuzz_data.read_captions),
    "tokenizer_clip": Reader(lambda: _TEXT_BYTES, lambda data, _: fuzz_data.TOKENIZERS["clip"]([_text(data)], 77)),
    "tokenizer_file": Reader(_tokenizer_files, _read_tokenizer_file),
    "config": Reader(_keys, _read_overrides, fuzz_inputs.overrides),
    "safetensors": Reader(_safetensors, _read_tensors("x.safetensors")),
    "torch": Reader(_torch_files, _read_tensors("x.pt")),
    "torch_pickle": Reader(
        _pickled, _read_tensors("x.pt"), lambda rng, seeds: _torch_file(fuzz_inputs.mutated(rng, seeds))
    ),
    "weights_index": Reader(lambda: _INDEXES, _read_tensors("model.safetensors.index.json")),
    "csv": Reader(lambda: fuzz_data.CSV, fuzz_data.read_csv),
    "parquet": Reader(fuzz_data.parquets, fuzz_data.read_parquet),
}


def prepare() -> None:
    """What costs time in the first call of each process, once for all of them."""
    warnings.simplefilter("ignore")
    images.formats()
    for reader in READERS.values():
        reader.seeds()
