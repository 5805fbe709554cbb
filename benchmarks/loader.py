"""Images per second from tars: a bare decoding loop, this loader's threads and open_clip's worker processes.

    pip install '.[bench]' && JAX_PLATFORMS=cpu python -m benchmarks.loader

takes six minutes on an idle machine, or one with --quick. Writes tars of 10,000 JPEGs of about 500 x 375 (0.4 GB),
reads them once, then measures all readers in turn, --repeats times, and prints medians. All crop between half and all
of an image to 224 px, read the same tars in random order and make batches of 64.

- The bare loop is the least that any loader must do: it reads a JPEG from a tar at a known offset, decodes it with
  simplejpeg, and crops and resizes it with OpenCV, with the options of this loader, in one thread of one process. Two
  of them at once show the worth of a second core on this machine.
- This loader returns uint8 and tokens in the order of a global shuffle, from threads of one process.
- open_clip's is `open_clip_train.data.get_wds_dataset` with its defaults: Pillow, bicubic, normalised floats, tokens.
  Its rows need torch and are left out without it.

Time and size of an index are measured on --index samples and extrapolated to a million.
"""

import argparse
import concurrent.futures
import functools
import io
import itertools
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from xclip_jax.core import environment, storage
from xclip_jax.data import loader, tokenizer, transforms
from xclip_jax.data.readers import tar_index
from xclip_jax.data.readers.tar import TarSource

SIZE = 224
SCALE = (0.5, 1.0)
KINDS = 200  # different pictures; they repeat, so that making them takes no time


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG of about 500 x 375 and 37 kB: clouds with the spectrum of photographs."""
    w = int(rng.integers(480, 521))
    h = int(rng.integers(360, 391))
    image = np.zeros((h, w, 3), np.float32)
    for octave in range(8):
        small = rng.normal(size=(3 << octave, 4 << octave, 3)).astype(np.float32) * 60 / 1.7**octave
        image += cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)
    out = io.BytesIO()
    Image.fromarray((image + 127).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write(folder: pathlib.Path, images: list[bytes], n: int, shard: int) -> str:
    """Write `n` samples in tars of `shard` each, and return their pattern."""
    folder.mkdir()
    for first in range(0, n, shard):
        with tarfile.open(folder / f"{first // shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + shard, n)):
                caption = f"a photo of thing number {i}, seen from the side".encode()
                for suffix, data in (("jpg", images[i % len(images)]), ("json", b'{"width": 500}'), ("txt", caption)):
                    entry = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return f"{folder}/*.tar"


def bare(pattern: str, n: int) -> float:
    """Images/s of a loop that reads, decodes, and resizes a random part, on one core."""
    source = TarSource(pattern)
    handles = [os.open(tar, os.O_RDONLY) for tar in source.tars]
    places = [
        (handle, int(row["image_size"]), int(row["image"]))
        for handle, index in zip(handles, tar_index.load(source.tars), strict=True)
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
    for handle in handles:
        os.close(handle)
    return n / taken


def bare_twice(pattern: str, n: int) -> float:
    """Images/s of two bare loops together, while both run."""
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(bare, [pattern] * 2, [64] * 2))  # both have started
        return sum(pool.map(bare, [pattern] * 2, [n // 2] * 2))


def rate(batches: Iterator, batch: int, n: int) -> float:
    """Images/s of `n` images after the first batches, which wait for workers to start and fill their buffers."""
    for _ in range(16):
        next(batches)
    began = time.perf_counter()
    count = sum(batch for _ in itertools.islice(batches, n // batch))
    return count / (time.perf_counter() - began)


def ours(pattern: str, threads: int, batch: int, n: int) -> float:
    """This loader's images/s: shuffled over all tars, cropped, with tokens, as arrays."""
    tokens = tokenizer.load("clip")
    config = loader.DataConfig((f"tar:{pattern}",), batch=batch, crop_scale=SCALE, resample="area", threads=threads)
    order = loader.sample_order([TarSource(pattern)], config, seed=0)
    transform = loader.Transform(config, SIZE, tokens, 77)
    return rate(loader.batches(order, transform, batch=batch, start=0, stop=n // batch + 24, seed=0), batch, n)


def open_clips(pattern: str, workers: int, batch: int, n: int) -> float:
    """Images/s of `open_clip_train.data`: normalised floats and tokens, read like in its training."""
    import open_clip
    from open_clip_train import data

    args = SimpleNamespace(
        train_data="::".join(storage.expand(pattern)),
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


def readers_of(pattern: str, batch: int, n: int) -> dict[str, Callable[[], float]]:
    """Functions that measure images/s, by name."""
    programs = {"bare loop": lambda: bare(pattern, n), "bare loop, twice": lambda: bare_twice(pattern, n)}
    for threads in (1, 2, 16):
        programs[f"xclip_jax, threads {threads}"] = functools.partial(ours, pattern, threads, batch, n)
    try:
        import open_clip_train.data  # noqa: F401
        import webdataset  # noqa: F401
    except ImportError as error:
        print(f"open_clip's rows are left out ({error})")
    else:
        for workers in (1, 2):
            programs[f"open_clip, workers {workers}"] = functools.partial(open_clips, pattern, workers, batch, n)
    return programs


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--index", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="2,000 images once, an index of 10,000: for a first look")
    options = parser.parse_args()
    if options.quick:
        options.images, options.repeats, options.index = 2000, 1, 10_000
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        rng = np.random.default_rng(0)
        images = [picture(rng) for _ in range(KINDS)]
        pattern = write(folder / "images", images, options.images, 1000)
        for path in (folder / "images").iterdir():
            path.read_bytes()  # all readers find the tars in memory
        readers = readers_of(pattern, options.batch, options.images)
        runs: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(options.repeats):
            for name, reader in readers.items():
                runs[name].append(reader())
                print(f"{name}: {runs[name][-1]:,.0f} images/s", flush=True)
        paths = storage.expand(write(folder / "index", [bytes(2000)], options.index, 10_000))
        began = time.perf_counter()
        stored = sum(tar_index.build(path).stat().st_size for path in paths)
        indexed = time.perf_counter() - began
    print(
        f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {options.images:,} JPEGs of "
        f"{statistics.mean(map(len, images)):,.0f} bytes, batch {options.batch}, medians of {options.repeats}; "
        f"{environment.capture()['versions']}\n\n| reader | images/s | lowest to highest | of the bare loop |"
    )
    print("|---|---|---|---|")
    bare_rate = statistics.median(runs["bare loop"])
    for name, values in runs.items():
        median = statistics.median(values)
        print(f"| {name} | {median:,.0f} | {min(values):,.0f} to {max(values):,.0f} | {median / bare_rate:.2f} |")
    million = 1e6 / options.index
    print(
        f"\nindex of a million samples: {indexed * million:.0f} s on one core, {stored * million / 1e6:.0f} MB "
        f"(from {options.index:,})"
    )


if __name__ == "__main__":
    main()
