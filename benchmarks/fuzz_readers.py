"""Readers that `benchmarks.fuzz` gives hostile inputs: each takes bytes, and raises what a command would meet."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.numpy
import tokenizers
from absl import flags
from etils import epath
from PIL import Image

from benchmarks import fuzz_inputs
from xclip_jax import storage
from xclip_jax.config import fields, load, schema
from xclip_jax.configs import demo
from xclip_jax.data import labelled, loader, records, tables, tar_index, tokenizer, transforms
from xclip_jax.data.base import Source
from xclip_jax.data.config import DataConfig
from xclip_jax.data.folder_source import FolderSource
from xclip_jax.data.tar_source import TarSource
from xclip_jax.errors import BadSample
from xclip_jax.evaluators import results
from xclip_jax.interop import tensor_files
from xclip_jax.report import record
from xclip_jax.run_folder import RunFolder

Path = pathlib.Path
_CAPTIONS = ("text", "caption", "a/b")


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


def _picture(mode: str = "RGB", w: int = 40, h: int = 30) -> Image.Image:
    y, x = np.mgrid[:h, :w]
    waves = [127 + 120 * np.sin((x * (1 + c) + y) / 9 + c) for c in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _images() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    frames = [_picture("P"), _picture("P", 40, 30)]
    modes = (
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "BMP"),
        ("RGB", "PPM"),
        ("RGB", "TIFF"),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
        ("RGB", "ICO"),
        ("RGB", "JPEG2000"),
    )
    return [
        *(_encode(_picture(mode), kind) for mode, kind in modes),
        _encode(_picture(w=200, h=150), "JPEG", quality=80),
        _encode(_picture(), "JPEG", progressive=True),
        _encode(_picture(), "JPEG", exif=exif),
        _encode(_picture(), "TIFF", compression="tiff_lzw"),
        _encode(_picture(), "TIFF", compression="jpeg"),
        _encode(_picture(), "PNG", exif=exif),
        _encode(deep, "PNG"),
        _encode(deep.convert("I"), "TIFF"),
        _encode(deep.convert("F"), "TIFF"),
        _encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    ]


_CONFIG = DataConfig(sources=("x",), tags=2, max_bad_fraction=1.0)
_TOKENIZERS = {name: tokenizer.load(name) for name in tokenizer.NAMES}


def _train(found: dict) -> None:
    """Becomes a row of a batch as in training; any exception of a sample is a bad sample there."""
    rng = np.random.default_rng(0)
    for resample, name in (("area", "bytes"), ("bicubic", "clip")):
        config = dataclasses.replace(_CONFIG, resample=resample)
        row = {"image": np.zeros((1, 32, 32, 3), np.uint8), "text": np.zeros((1, 16), np.int32)}
        try:
            loader.Transform(config, 32, _TOKENIZERS[name], 16)(found, rng, row)
        except Exception as error:
            raise records.as_bad_sample(error) from error


def _read_image(data: bytes, _: Path) -> None:
    _train({"image": data, "text": ["a fox"], "tags": []})


def _evaluate_image(data: bytes, _: Path) -> None:
    for mode in transforms.RESIZE_MODES:
        transforms.evaluation_image(data, 32, mode=mode)


def _read_all(source: Source, train: bool = False) -> None:
    """Reads up to 40 samples; of a source whose samples are all bad, raises the first one's reason."""
    source.fingerprint()
    source.known_faults()
    list(source.remarks())
    bad, good = [], 0
    for index in range(min(len(source), 40)):
        source.describe(index)
        source.known_fault(index)
        found = records.read(source, index)
        if isinstance(found, BadSample):
            bad.append(found)
            continue
        good += 1
        if train:
            _train(found)
    if bad and not good:
        raise bad[0]


def _tar(parts: Sequence[tuple[str, bytes]], fmt: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as tar:
        for name, data in parts:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _tars() -> list[bytes]:
    image = _encode(_picture(), "JPEG")
    text = json.dumps({"caption": "a fox", "tags": ["red", "fox"], "a": {"b": "x"}}).encode()
    parts = [
        (f"{stem}.{suffix}", data)
        for stem in ("0", "long/" * 40 + "1", "ü")
        for suffix, data in (("jpg", image), ("txt", b"a fox"), ("json", text))
    ]
    return [_tar(parts), _tar(parts, tarfile.PAX_FORMAT), _tar(parts[:3], tarfile.USTAR_FORMAT)]


def _read_tar(data: bytes, folder: Path) -> None:
    (folder / "x.tar").write_bytes(data)
    _read_all(TarSource(str(folder / "x.tar"), _CAPTIONS, "tags"))


def _stored_indexes() -> list[bytes]:
    out = io.BytesIO()
    rows = np.zeros(3, tar_index.dtype(5))
    rows["image"], rows["image_size"], rows["text"], rows["text_size"] = (512, 1536, 0), (700, 0, 1 << 31), 512, 5
    rows["fault"], rows["key"] = (0, 1, 2), (b"a", b"b", b"c")
    np.save(out, rows)
    return [out.getvalue()]


def _make_index(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A mutated index, in most cases with the digest that belongs to it."""
    data = fuzz_inputs.mutated(rng, seeds)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return data + (digest if rng.random() < 0.8 else rng.randbytes(16))


def _read_index(data: bytes, folder: Path) -> None:
    (folder / "x.tar").write_bytes(_tars()[0])
    stored = tar_index.index_files(str(folder / "x.tar"))[0]
    stored.parent.mkdir()
    stored.write_bytes(data)
    _read_all(TarSource(str(folder / "x.tar"), _CAPTIONS, "tags"))


_CAPTION_FILES = (
    json.dumps({"text": "no", "caption": ["a fox", "x"], "tags": ["red", "fox"], "a": {"b": "x"}}).encode(),
    b'{"caption": "half a letter \\ud83d", "tags": ["\\udc00"], "a": {"b": ["\\ud83d\\ude00"]}}',
    b"a plain caption &amp; more\r\n",
    "café".encode("latin-1"),
    "mark".encode("utf-16"),
)


def _read_captions(data: bytes, folder: Path) -> None:
    parts = [("0.jpg", _encode(_picture(), "JPEG")), ("0.txt", data), ("0.json", data)]
    (folder / "x.tar").write_bytes(_tar(parts[:2]) + _tar([(f"1{n[1:]}", d) for n, d in (parts[0], parts[2])]))
    _read_all(TarSource(str(folder / "x.tar"), _CAPTIONS, "tags"), train=True)


def _read_folder(data: bytes, folder: Path) -> None:
    (folder / "0.jpg").write_bytes(_encode(_picture(), "JPEG"))
    (folder / "0.txt").write_bytes(data)
    _read_all(FolderSource(folder), train=True)


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
        made_tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
        )
        made_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s+|\p{P}"), "removed"),
                tokenizers.pre_tokenizers.Digits(),
            ]
        )
        made_tokenizer.add_special_tokens(["</s>", "<s>"])
        files.append(made_tokenizer.to_str().encode())
    return files


def _read_tokenizer_file(data: bytes, folder: Path) -> None:
    path = str(folder / "tokenizer.json")
    Path(path).write_bytes(data)
    loaded = tokenizer._from_file(path)
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


def _pickled() -> list[bytes]:
    return [
        b"\x80\x02}q\0(X\x01\0\0\0x" + fuzz_inputs._TENSOR + b"X\x01\0\0\0yccollections\nOrderedDict\n)Ru.",
        pickle.dumps({"x": [1]}),
    ]


def _torch_files() -> list[bytes]:
    files = []
    for pickled in _pickled():
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
        files.append(out.getvalue())
    return files


_CSV = (
    b'image,text,tags\nx.png,a fox,"red,fox"\nx.png,"a ""quoted"" fox, in\ntwo lines",\n/etc/passwd,x,\n../x.png,y,\n',
    b"\xef\xbb\xbftext,image\nfox,x.png\n\nfox,missing.png\n,\n",
    b'image\ttext\nx.png\ta "quote\nx.png\tb\n',
)
_LABELS = (
    b"path,label\nx.png,cat\nx.png,dog\n",
    b"path,label,more\nx.png,1|2,\nx.png,,x\n",
    b"label,path\n3,x.png\n07,x.png\n",
)


def _with_picture(data: bytes, folder: Path, name: str) -> str:
    (folder / "x.png").write_bytes(_encode(_picture(), "PNG"))
    (folder / name).write_bytes(data)
    return str(folder / name)


def _read_csv(data: bytes, folder: Path) -> None:
    path = _with_picture(data, folder, "x.csv")
    _read_all(tables.CsvSource(path, "image", ("text",), "tags" if b"tags" in data.split(b"\n")[0] else ""))


def _read_labels(data: bytes, folder: Path) -> None:
    source = labelled.open_files("csv:x.csv", _with_picture(data, folder, "x.csv"))
    source.fingerprint()
    for index in range(min(len(source), 40)):
        found = records.read(source, index)
        if isinstance(found, BadSample):
            raise found


def _parquets() -> list[bytes]:
    image = _encode(_picture(w=8, h=8), "PNG")
    columns = (
        {"image": [image, None], "text": ["a fox", None], "tags": ["a,b", ""]},
        {"image": [{"bytes": image, "path": None}] * 3, "text": [["a", "b"], [], None], "tags": [["x"], None, []]},
        {"image": ["x.png"] * 40, "text": [f"text {i % 3}" for i in range(40)], "tags": [None] * 40},
    )
    files = []
    for table in columns:
        for compression in ("snappy", "zstd"):
            out = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table(table), out, compression=compression)
            files.append(out.getvalue())
    return files


def _read_parquet(data: bytes, folder: Path) -> None:
    _read_all(tables.ParquetSource(_with_picture(data, folder, "x.parquet"), "image", ("text",), "tags"))


_FILES = ("config.json", "data.json", "results.json", "evaluation.json", "metrics.jsonl", "bad_samples.jsonl")


def _run_files() -> dict[str, bytes]:
    config = schema.to_dict(schema.resolve(demo.get_config("")))
    values = {"zeroshot/emoji/test/top1": 50.0, "zeroshot/emoji/test/ways": 10, "zeroshot/emoji/test/n": 100}
    entry = {
        "set": "emoji/test",
        "name": "zeroshot/emoji/test/top1",
        "metric": "top1",
        "value": 50.0,
        "step": 2,
        "unit": "%",
    }
    content = (
        {"config": config, "environment": {"jax": "0.10"}, "started": "2026-01-02T03:04:05+00:00", "starts": []},
        [{"samples": 5, "hash": "x", "files": [{"name": "a", "bytes": 3}]}],
        {"results": values, "config": config, "environment": {}, "seconds": 3.0},
        {"results": [entry], "config": config},
        {"step": 1, "loss": 2.5, "lr": 0.1},
        {"step": 2, "position": 3, "reason": "image damaged", "detail": "x", "source": 0, "index": 1},
    )
    files = {name: json.dumps(part).encode() + b"\n" for name, part in zip(_FILES, content, strict=True)}
    files["metrics.jsonl"] += json.dumps({"step": 2} | values).encode() + b'\n{"step": 3, "lo'
    return files


def _make_run_file(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    name = rng.choice(_FILES)
    lines = [seed.partition(b"\n")[2] for seed in seeds if seed.startswith(name.encode())]
    made = [fuzz_inputs.json_texts(rng, lines) for _ in range(rng.choice((1, 1, 3)) if name.endswith("l") else 1)]
    return name.encode() + b"\n" + b"\n".join(made)


def _read_run(data: bytes, folder: Path) -> None:
    """The first line of `data` is the name of the run's file that the rest replaces."""
    name, _, content = data.partition(b"\n")
    for other, sound in _run_files().items():
        (folder / other).write_bytes(content if other.encode() == name else sound)
    run = RunFolder(folder)
    run.is_run()
    read = record.read(folder)
    _ = read.steps, run.read_classes()
    results.read(run.evaluation_file)
    for file in (run.metrics_file, run.bad_samples_file):
        storage.JsonLines(file, lambda line: True)


READERS = {
    "tar": Reader(_tars, _read_tar, fuzz_inputs.tars),
    "tar_bytes": Reader(_tars, _read_tar),
    "stored_index": Reader(_stored_indexes, _read_index, _make_index),
    "image_training": Reader(_images, _read_image, fuzz_inputs.images),
    "image_evaluation": Reader(_images, _evaluate_image, fuzz_inputs.images),
    "captions": Reader(lambda: _CAPTION_FILES, _read_captions, fuzz_inputs.json_texts),
    "folder": Reader(lambda: _CAPTION_FILES, _read_folder, fuzz_inputs.texts),
    "tokenizer_clip": Reader(
        lambda: _TEXT_BYTES, lambda data, _: _TOKENIZERS["clip"]([_text(data)], 77), fuzz_inputs.texts
    ),
    "tokenizer_bytes": Reader(
        lambda: _TEXT_BYTES, lambda data, _: _TOKENIZERS["bytes"]([_text(data)], 77), fuzz_inputs.texts
    ),
    "tokenizer_file": Reader(_tokenizer_files, _read_tokenizer_file, fuzz_inputs.json_texts),
    "config": Reader(_keys, _read_overrides, fuzz_inputs.overrides),
    "safetensors": Reader(_safetensors, _read_tensors("x.safetensors")),
    "torch": Reader(_torch_files, _read_tensors("x.pt")),
    "torch_pickle": Reader(_pickled, _read_tensors("x.pt"), fuzz_inputs.pickles),
    "weights_index": Reader(
        lambda: [
            b'{"weight_map": {"a": "model.safetensors", "b": "x.bin"}}',
            b'{"weight_map": {"a": "model.safetensors"}}',
        ],
        _read_tensors("model.safetensors.index.json"),
        fuzz_inputs.json_texts,
    ),
    "csv": Reader(lambda: _CSV, _read_csv),
    "labels": Reader(lambda: _LABELS, _read_labels),
    "parquet": Reader(_parquets, _read_parquet),
    "run_folder": Reader(
        lambda: [name.encode() + b"\n" + data for name, data in _run_files().items()], _read_run, _make_run_file
    ),
}


def prepare() -> None:
    """What costs time in the first call of each process, once for all of them."""
    warnings.simplefilter("ignore")
    transforms._formats()
    for reader in READERS.values():
        reader.seeds()


def empty(folder: Path) -> None:
    """Removes what is in `folder`."""
    for entry in os.scandir(folder):
        shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
