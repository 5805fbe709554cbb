"""Readers of training data for `tests.torture.fuzz`: tars and their indexes, images, captions and tables."""

import dataclasses
import io
import json
import pathlib
import tarfile
from collections.abc import Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from tests.helpers import bad_tars
from tests.helpers.bad_tars import encode as _encode
from xclip_jax.core.errors import BadSample
from xclip_jax.data import loader, records, tokenizer, transforms
from xclip_jax.data.base import Source, SourceOptions
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers import table as table_reader
from xclip_jax.data.readers.tar import TarSource

Path = pathlib.Path
_OPTIONS = SourceOptions(text_columns=("text", "caption", "a/b"), tags_key="tags", negative_columns=("a",))


def _picture(mode: str = "RGB", **size: int) -> Image.Image:
    return bad_tars.picture(0, mode=mode, **size)


def images() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    frames = [_picture("P")] * 2
    modes = (
        ("RGBA", "PNG"), ("1", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "BMP"), ("RGBA", "WEBP"),
        ("RGB", "AVIF"), ("RGB", "JPEG2000"),
    )  # fmt: skip
    return [
        *(_encode(_picture(mode), kind) for mode, kind in modes),
        _encode(_picture(w=200, h=150), "JPEG", progressive=True, exif=exif),
        _encode(_picture(), "TIFF", compression="tiff_lzw"),
        _encode(deep, "PNG", exif=exif),
        _encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    ]


_CONFIG = DataConfig(sources=("x",), max_bad_fraction=1.0)
TOKENIZERS = {name: tokenizer.load(name) for name in tokenizer.NAMES}


def _train(item: dict) -> None:
    """Becomes a row of a batch as in training; any exception of a sample is a bad sample there."""
    rng = np.random.default_rng(0)
    for resample, name in (("area", "bytes"), ("bicubic", "clip")):
        config = dataclasses.replace(_CONFIG, resample=resample)
        row = {"image": np.zeros((1, 32, 32, 3), np.uint8), "text": np.zeros((1, 16), np.int32)}
        try:
            loader.Transform(config, 32, TOKENIZERS[name], 16)(item, rng, row)
        except Exception as error:
            raise records.as_bad_sample(error) from error


def read_image(data: bytes, _: Path) -> None:
    for mode in transforms.RESIZE_MODES:
        Preprocessing(32, resize_mode=mode)(data)
    _train({"image": data, "text": ["a fox"], "tags": []})


def _read_all(source: Source, train: bool = False) -> None:
    """Reads up to 40 samples; of a source whose samples are all bad, raises the first one's reason."""
    source.fingerprint()
    bad, good = [], 0
    for index in range(min(len(source), 40)):
        source.describe(index)
        item = records.read(source, index)
        if isinstance(item, BadSample):
            bad.append(item)
            continue
        good += 1
        if train:
            _train(item)
    if bad and not good:
        raise bad[0]


def _tar(parts: Sequence[tuple[str, bytes]], fmt: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as tar:
        for name, data in parts:
            bad_tars.add(tar, name, data)
    return out.getvalue()


def tars() -> list[bytes]:
    image = _encode(_picture(), "JPEG")
    text = json.dumps({"caption": "a fox", "tags": ["red", "fox"], "a": {"b": "x"}}).encode()
    parts = [
        (f"{stem}.{suffix}", data)
        for stem in ("0", "long/" * 40 + "1", "ü")
        for suffix, data in (("jpg", image), ("txt", b"a fox"), ("json", text))
    ]
    return [_tar(parts), _tar(parts, tarfile.PAX_FORMAT), _tar(parts[:3], tarfile.USTAR_FORMAT)]


def read_tar(data: bytes, folder: Path) -> None:
    (folder / "x.tar").write_bytes(data)
    _read_all(TarSource(str(folder / "x.tar"), _OPTIONS))


CAPTION_FILES = (
    json.dumps({"text": "no", "caption": ["a fox", "x"], "tags": ["red", "fox"], "a": {"b": "x"}}).encode(),
    b'{"caption": "half a letter \\ud83d", "tags": ["\\udc00"], "a": {"b": ["\\ud83d\\ude00"]}}',
    b"a plain caption &amp; more\r\n",
    "café".encode("latin-1"),
    "mark".encode("utf-16"),
)


def read_captions(data: bytes, folder: Path) -> None:
    parts = [("0.jpg", _encode(_picture(), "JPEG")), ("0.txt", data), ("0.json", data)]
    (folder / "x.tar").write_bytes(_tar(parts[:2]) + _tar([(f"1{n[1:]}", d) for n, d in (parts[0], parts[2])]))
    _read_all(TarSource(str(folder / "x.tar"), _OPTIONS), train=True)


CSV = (
    b'image,text,tags\nx.png,a fox,"red,fox"\nx.png,"a ""quoted"" fox, in\ntwo lines",\n/etc/passwd,x,\n../x.png,y,\n',
    b"\xef\xbb\xbftext,image\nfox,x.png\n\nfox,missing.png\n,\n",
    b'image\ttext\nx.png\ta "quote\nx.png\tb\n',
)


def _with_picture(data: bytes, folder: Path, name: str) -> str:
    (folder / "x.png").write_bytes(_encode(_picture(), "PNG"))
    (folder / name).write_bytes(data)
    return str(folder / name)


def read_csv(data: bytes, folder: Path) -> None:
    path = _with_picture(data, folder, "x.csv")
    options = SourceOptions(tags_key="tags" if b"tags" in data.split(b"\n")[0] else "")
    _read_all(table_reader.TableSource(path, options, table_reader.read_csv))


def parquets() -> list[bytes]:
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


def read_parquet(data: bytes, folder: Path) -> None:
    path, options = _with_picture(data, folder, "x.parquet"), SourceOptions(tags_key="tags")
    _read_all(table_reader.TableSource(path, options, table_reader.read_parquet))
