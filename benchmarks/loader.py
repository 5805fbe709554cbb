"""Images a second from tars: a bare decoding loop, this loader and open_clip's, with one worker and with two.

    pip install '.[bench]' && JAX_PLATFORMS=cpu python -m benchmarks.loader

takes six minutes on an idle machine, with --quick one. Writes tars of 10,000 JPEGs of about 500 x 375 (0.4 GB), reads
them once, then measures all readers in turn, --repeats times, and prints medians. All crop between half and all of an
image to 224 px, read the same tars in random order and make batches of 64.

- The bare loop is what nobody can do without: it reads a JPEG from a tar at an offset known before, decodes it with
  simplejpeg and crops and resizes it with OpenCV, with the options of this loader, in one thread of one process. Run
  twice at once it tells what a second core is worth on this machine.
- This loader gives uint8 and tokens in the order of a global shuffle, from worker processes or from threads.
- open_clip's is `open_clip_train.data.get_wds_dataset` with its own defaults: Pillow, bicubic, normalised floats,
  tokens. Its rows need torch; without it they are left out.

Time and size of an index are measured on --index samples and extrapolated to a million.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import io
import itertools
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from types import SimpleNamespace

import cv2
import numpy as np
import simplejpeg
from absl import flags
from PIL import Image

from xclip_jax.core import storage
from xclip_jax.data import loader, tokenizer, transforms
from xclip_jax.data.readers import tar_index
from xclip_jax.data.readers.tar import TarSource

SIZE = 224
SCALE = (0.5, 1.0)
KINDS = 200  # different pictures; they repeat, so that making them takes no time
PACKAGES = (
    "grain",
    "jax",
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
    "tokenizers",
    "open_clip_torch",
    "webdataset",
    "torch",
    "torchvision",
    "pillow",
)


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG of about 500 x 375 and 37 kB: clouds with the spectrum of photographs."""
    w, h = int(rng.integers(480, 521)), int(rng.integers(360, 391))
    image = np.zeros((h, w, 3), np.float32)
    for octave in range(8):
        small = rng.normal(size=(3 << octave, 4 << octave, 3)).astype(np.float32) * 60 / 1.7**octave
        image += cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)
    out = io.BytesIO()
    Image.fromarray((image + 127).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def header(name: str, size: int) -> bytes:
    """A tar header; tarfile's own take longer than all the rest of the index benchmark."""
    block = bytearray(512)
    block[:100] = name.encode().ljust(100, b"\0")
    block[100:108], block[124:136], block[257:265] = b"0000644\0", b"%011o\0" % size, b"ustar\00000"
    block[148:156], block[156:157] = b" " * 8, b"0"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def write(folder: pathlib.Path, images: list[bytes], n: int, shard: int) -> str:
    """Tars of `shard` samples each, `n` in all. Returns the pattern that names these: a kept folder may have more."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, n, shard):
        with (folder / f"{first // shard:05d}.tar").open("wb") as tar:
            for i in range(first, min(first + shard, n)):
                caption = f"a photo of thing number {i}, seen from the side".encode()
                image = images[i % len(images)]
                for suffix, data in (("jpg", image), ("json", b'{"width": 500}'), ("txt", caption)):
                    tar.write(header(f"{i:09d}.{suffix}", len(data)) + data + bytes(-len(data) % 512))
            tar.write(bytes(1024))
    return f"{folder}/{{00000..{(n - 1) // shard:05d}}}.tar"


def bare(pattern: str, n: int) -> float:
    """Images/s of what no loader can do without, on one core: read, decode, resize a random part."""
    source = TarSource(pattern)
    places = [
        (os.open(tar, os.O_RDONLY), int(row["image_size"]), int(row["image"]))
        for tar, index in zip(source.tars, tar_index.load(source.tars), strict=True)
        for row in np.load(index)
    ]
    rng = np.random.default_rng(0)
    chosen = [places[i % len(places)] for i in rng.permutation(n)]
    shortest = math.ceil(SIZE / SCALE[0] ** 0.5)
    options = {"fastdct": True, "fastupsample": True, "min_height": shortest, "min_width": shortest, "min_factor": 2}
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    began = time.perf_counter()
    for place in chosen:
        image = simplejpeg.decode_jpeg(os.pread(*place), "RGB", **options)
        transforms.random_resized_crop(image, SIZE, rng, SCALE, resample="area", out=out)
    taken = time.perf_counter() - began
    for handle in dict.fromkeys(place[0] for place in places):
        os.close(handle)
    return n / taken


def bare_twice(pattern: str, n: int) -> float:
    """Images/s of two bare loops at once: of both, while both run."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        list(pool.map(bare, [pattern] * 2, [64] * 2))  # both have started
        return sum(pool.map(bare, [pattern] * 2, [n // 2] * 2))


def rate(batches: Iterator, batch: int, n: int) -> float:
    """Images/s of `n` images behind the first batches, which wait for workers to start and fill their buffers."""
    for _ in range(16):
        next(batches)
    began = time.perf_counter()
    count = sum(batch for _ in itertools.islice(batches, n // batch))
    return count / (time.perf_counter() - began)


def ours(pattern: str, workers: int, threads: int, batch: int, n: int) -> float:
    """This loader's images/s: shuffled over all tars, cropped, with tokens, as arrays."""
    tokens = tokenizer.load("clip")
    config = loader.DataConfig(
        (f"tar:{pattern}",), batch=batch, crop_scale=SCALE, resample="area", threads=threads, workers=workers
    )
    order = loader.sample_order([TarSource(pattern)], config, seed=0)
    transform = loader.Transform(config, SIZE, tokens, 77)
    return rate(loader.batches(order, transform, batch=batch, start=0, stop=n // batch + 24, seed=0), batch, n)


def open_clips(pattern: str, workers: int, batch: int, n: int) -> float:
    """Images/s of `open_clip_train.data`, tensors of normalised floats and tokens, as its training reads them."""
    import open_clip
    from open_clip_train import data

    paths = storage.expand(pattern)
    args = SimpleNamespace(
        train_data="::".join(paths),
        train_num_samples=2 * n + 32 * batch,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=batch,
        workers=workers,
        seed=0,
        world_size=1,
        distributed=False,
    )
    transform = open_clip.image_transform(SIZE, is_train=True, aug_cfg={"scale": SCALE})
    made = data.get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    return rate(iter(made.dataloader), batch, n)


def index(folder: pathlib.Path, n: int) -> dict[str, float]:
    """Seconds on one core and bytes of the index of a million samples, from `n` of 2 kB in tars of 10,000."""
    pattern = write(folder, [bytes(2000)], n, 10_000)
    paths = storage.expand(pattern)
    began = time.perf_counter()
    stored = sum(tar_index.build(path).stat().st_size for path in paths)
    return {"index_seconds_1M": (time.perf_counter() - began) * 1e6 / n, "index_bytes_1M": stored * 1e6 / n}


def readers_of(pattern: str, batch: int, n: int) -> dict[str, Callable[[], float]]:
    """Name -> function that measures images/s."""
    programs = {"bare loop": lambda: bare(pattern, n), "bare loop, twice": lambda: bare_twice(pattern, n)}
    for workers, threads in ((1, 1), (2, 1), (0, 1), (0, 2)):
        name = f"xclip_jax, workers {workers}" if workers else f"xclip_jax, threads {threads}"
        programs[name] = functools.partial(ours, pattern, workers, threads, batch, n)
    try:
        import open_clip_train.data  # noqa: F401
        import webdataset  # noqa: F401
    except ImportError as error:
        print(f"open_clip's rows are left out ({error})")
    else:
        for workers in (1, 2):
            programs[f"open_clip, workers {workers}"] = functools.partial(open_clips, pattern, workers, batch, n)
    return programs


def verdicts(result: dict[str, float]) -> Iterator[str]:
    """The ratios that matter, beside what is asked of them."""

    def ratio(above: str, below: str, target: float) -> str:
        if above not in result or below not in result:
            return f"{above} / {below}: not measured"
        return f"{above} / {below}: {result[above] / result[below]:.2f}, target {target}"

    yield ratio("xclip_jax, workers 1", "bare loop", 0.9)
    yield ratio("xclip_jax, workers 2", "xclip_jax, workers 1", 1.8)
    yield ratio("bare loop, twice", "bare loop", 2.0)
    for workers in (1, 2):
        yield ratio(f"xclip_jax, workers {workers}", f"open_clip, workers {workers}", 1.5)


def versions(names: Sequence[str]) -> str:
    """Name and version of each package that is installed."""
    installed = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed.append(f"{name} {metadata.version(name)}")
    return ", ".join(installed)


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", default="", help="where tars go and stay; else they are deleted")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--index", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="2,000 images once, an index of 10,000: for a first look")
    options = parser.parse_args()
    if options.quick:
        options.images, options.repeats, options.index = 2000, 1, 10_000
    flags.FLAGS.mark_as_parsed()  # Grain's workers ask absl, which only app.run sets up
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.folder or temporary)
        rng = np.random.default_rng(0)
        images = [picture(rng) for _ in range(KINDS)]
        pattern = write(folder / "images", images, options.images, 1000)
        for path in storage.expand(pattern):
            pathlib.Path(path).read_bytes()  # all readers find the tars in memory
        readers = readers_of(pattern, options.batch, options.images)
        runs: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(options.repeats):
            for name, reader in readers.items():
                runs[name].append(reader())
                print(f"{name}: {runs[name][-1]:,.0f} images/s", flush=True)
        result = {name: statistics.median(values) for name, values in runs.items()}
        result |= index(folder / "index", options.index)
    print(
        f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {options.images:,} JPEGs of "
        f"{statistics.mean(map(len, images)):,.0f} bytes, batch {options.batch}, medians of {options.repeats}; Python "
        f"{platform.python_version()}, {versions(PACKAGES)}\n"
    )
    print("| reader | images/s | lowest to highest | of the bare loop |\n|---|---|---|---|")
    for name, values in runs.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"| {name} | {result[name]:,.0f} | {spread} | {result[name] / result['bare loop']:.2f} |")
    print("", *verdicts(result), sep="\n")
    print(
        f"index of a million samples: {result['index_seconds_1M']:.0f} s on one core, "
        f"{result['index_bytes_1M'] / 1e6:.0f} MB (from {options.index:,})"
    )


if __name__ == "__main__":
    main()
