"""Readers that `tests.torture.fuzz` gives hostile inputs: each takes bytes, and raises what a command would meet."""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import random
import shutil
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
from xclip_jax.core import fields, json_lines
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import images, tokenizer
from xclip_jax.evaluators import results
from xclip_jax.evaluators.results import Result
from xclip_jax.interop import tensor_files
from xclip_jax.report import collect

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


_TIME = "2026-01-02T03:04:05+00:00"
_FILES = (
    "config.json", "data.json", "results.json", "evaluation.json", "metrics.jsonl", "results.jsonl",
    "bad_samples.jsonl",
)  # fmt: skip


def _run_files() -> dict[str, bytes]:
    config = schema.to_dict(schema.resolve(load.load_config("demo")))
    measured = [
        Result("emoji/test", "zeroshot", "top1", 50.0, n=100, chance=10.0, headline=True, evaluator="zeroshot"),
        Result("emoji/test", "zeroshot", "n", 100, unit=""),
    ]
    values, records = results.flat(measured), results.to_json(measured)
    entry = {"set": "emoji/test", "name": "zeroshot/emoji/test", "metric": "top1", "value": 50.0, "records": records}
    entry |= {"checkpoint": "run", "step": 2, "profile": "openai", "changes": {}, "fingerprint": "1", "items": "2"}
    content = (
        {"config": config, "environment": {"jax": "0.10"}, "started": _TIME, "starts": []},
        [{"samples": 5, "hash": "x", "files": [{"name": "a", "bytes": 3}]}],
        {"results": values, "records": records, "config": config, "environment": {}, "seconds": 3.0, "ended": _TIME},
        {"results": [entry], "config": config},
        {"step": 1, "loss": 2.5, "lr": 0.1},
        {"step": 2, "records": records},
        {"step": 2, "position": 3, "reason": "image damaged", "detail": "x", "source": 0, "index": 1},
    )
    files = {name: json.dumps(part).encode() + b"\n" for name, part in zip(_FILES, content, strict=True)}
    files["metrics.jsonl"] += json.dumps({"step": 2} | values).encode() + b'\n{"step": 3, "lo'
    return files


def _make_run_file(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    name = rng.choice(_FILES)
    lines = [seed.partition(b"\n")[2] for seed in seeds if seed.startswith(name.encode())]
    made = [fuzz_inputs.mutated(rng, lines) for _ in range(rng.choice((1, 1, 3)) if name.endswith("l") else 1)]
    return name.encode() + b"\n" + b"\n".join(made)


def _read_run(data: bytes, folder: Path) -> None:
    """The first line of `data` is the name of the run's file that the rest replaces."""
    name, _, content = data.partition(b"\n")
    for other, sound in _run_files().items():
        (folder / other).write_bytes(content if other.encode() == name else sound)
    run = RunReader(folder)
    run.is_run()
    read = collect.read(folder)
    _ = read.steps, run.read_classes()
    results.read(run.evaluation_file)
    for file in (run.metrics_file, run.results_log_file, run.bad_samples_file):
        json_lines.JsonLines(file, lambda line: True)


READERS = {
    "tar": Reader(fuzz_data.tars, fuzz_data.read_tar),
    "wds": Reader(fuzz_data.wds_tars, fuzz_data.read_wds),
    "image_training": Reader(fuzz_data.images, fuzz_data.read_image),
    "image_evaluation": Reader(fuzz_data.images, fuzz_data.evaluate_image),
    "captions": Reader(lambda: fuzz_data.CAPTION_FILES, fuzz_data.read_captions),
    "folder": Reader(lambda: fuzz_data.CAPTION_FILES, fuzz_data.read_folder),
    "tokenizer_clip": Reader(lambda: _TEXT_BYTES, lambda data, _: fuzz_data.TOKENIZERS["clip"]([_text(data)], 77)),
    "tokenizer_bytes": Reader(lambda: _TEXT_BYTES, lambda data, _: fuzz_data.TOKENIZERS["bytes"]([_text(data)], 77)),
    "tokenizer_file": Reader(_tokenizer_files, _read_tokenizer_file),
    "config": Reader(_keys, _read_overrides, fuzz_inputs.overrides),
    "safetensors": Reader(_safetensors, _read_tensors("x.safetensors")),
    "torch": Reader(_torch_files, _read_tensors("x.pt")),
    "torch_pickle": Reader(
        _pickled, _read_tensors("x.pt"), lambda rng, seeds: _torch_file(fuzz_inputs.mutated(rng, seeds))
    ),
    "weights_index": Reader(lambda: _INDEXES, _read_tensors("model.safetensors.index.json")),
    "csv": Reader(lambda: fuzz_data.CSV, fuzz_data.read_csv),
    "labels": Reader(lambda: fuzz_data.LABELS, fuzz_data.read_labels),
    "parquet": Reader(fuzz_data.parquets, fuzz_data.read_parquet),
    "run_folder": Reader(
        lambda: [name.encode() + b"\n" + data for name, data in _run_files().items()], _read_run, _make_run_file
    ),
}


def prepare() -> None:
    """What costs time in the first call of each process, once for all of them."""
    warnings.simplefilter("ignore")
    images.formats()
    for reader in READERS.values():
        reader.seeds()


def empty(folder: Path) -> None:
    """Removes what is in `folder`."""
    for entry in os.scandir(folder):
        shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
