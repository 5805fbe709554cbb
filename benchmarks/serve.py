"""Start, memory and answers of the search page with many images: xclip_jax.commands.serve.

    pip install '.[serve]' && JAX_PLATFORMS=cpu python -m benchmarks.serve --images 1000000

The folder has --images names of 200 different JPEGs of about 500 x 375, as hard links. Random embeddings of 512 numbers
are written by the code that embeds, so no image is encoded. The model is a ViT-B/32 with random weights. The command
then starts in a new process, as it does the second time. Prints the seconds up to its address, its peak of resident
memory over the bytes of the embeddings, and the time over HTTP of different texts and of pages of new thumbnails.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

import numpy as np

from benchmarks.shared import seconds_of

WIDTH = 512


def prepare(folder: pathlib.Path, n: int) -> None:
    """Write the weights, the images, and the embeddings that a first start would have left in the cache."""
    import xclip_jax
    from benchmarks.loader import picture
    from xclip_jax.commands import embed, serve

    learner = xclip_jax.create("B/32", objective="clip", steps=1, batch=8, embed=WIDTH)
    learner.save(folder / "model", learner.init())
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / "images" / f"{i // 1000:04d}" / f"holiday-{i:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < 200:
            path.write_bytes(picture(rng))
        else:
            path.hardlink_to(folder / "images" / "0000" / f"holiday-{i % 200:07d}.jpg")

    def embed_images(model: object, source: object, first: int, threads: int) -> Iterator[embed.Part]:
        for start in range(0, n, embed.PART):
            rows = rng.standard_normal((min(embed.PART, n - start), WIDTH), np.float32)
            yield embed.Part(rows / np.linalg.norm(rows, axis=1, keepdims=True), [""] * len(rows), {})

    embed.embed_images = embed_images
    serve.make_index(xclip_jax.load(folder / "model"), str(folder / "images"))


def measure(folder: pathlib.Path, n: int, searches: int) -> None:
    """Start the command, ask it, and print what it took."""
    command = [sys.executable, "-m", "xclip_jax.commands.serve", f"{folder}/model", "--images", f"{folder}/images"]
    began = time.perf_counter()
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        start = time.perf_counter() - began

        def milliseconds(path: str) -> float:
            return 1000 * seconds_of(lambda: urllib.request.urlopen(f"{address}/{path}").read())

        texts = [milliseconds(f"search?text=a+photo+of+thing+number+{i}") for i in range(searches)]
        with concurrent.futures.ThreadPoolExecutor(6) as browser:  # connections that browsers open to a server
            grids = [range(first, first + 24) for first in range(0, min(n, 40_000) - 24, 1000)]
            page = [
                1000 * seconds_of(lambda g=g: [*browser.map(milliseconds, (f"thumbnail/{i}" for i in g))])
                for g in grids
            ]
        peak = 1024 * int(re.findall(r"VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{server.pid}/status").read_text())[0])
        server.terminate()
    print(
        f"{n:,} images: second start {start:.1f} s; peak of memory {peak / 2**30:.2f} GiB, "
        f"{peak / (4 * WIDTH * n):.2f} x the embeddings; a search p50 {np.percentile(texts, 50):.0f} ms, "
        f"p99 {np.percentile(texts, 99):.0f} ms; 24 new thumbnails p50 {np.percentile(page, 50):.0f} ms, "
        f"p99 {np.percentile(page, 99):.0f} ms"
    )


def main() -> None:
    """Measure each number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--searches", type=int, default=500)
    flags = parser.parse_args()
    for n in flags.images:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XCLIP_CACHE"] = f"{folder}/cache"
            prepare(pathlib.Path(folder), n)
            measure(pathlib.Path(folder), n, flags.searches)


if __name__ == "__main__":
    main()
