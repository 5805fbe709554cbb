"""Images per second from JPEG files to embeddings: xclip_jax.commands.embed and open_clip with the same weights.

    pip install '.[bench]' && JAX_PLATFORMS=cpu python -m benchmarks.embed

Writes 5,000 JPEGs of about 500 x 375, then each side embeds all of them in turn, --repeats times, in a new process each
time, with random weights of a ViT-S/32 (12 layers of width 384, 224 pixels) in float32, with equal batch, workers and
threads. Ours is the work of the command, from the list of paths to the parquet file; open_clip's is its preprocessing
in a DataLoader, `encode_image`, and a .npy file. Prints medians, their ratio, and the smallest cosine between both
sides' embeddings. Imports, making the model and the first batches, in which XLA compiles, do not count; their time is
printed too, and so are the seconds of all cores together, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.shared import result_of, seconds_of

KINDS = 200  # different pictures; they repeat, so that making them takes no time
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}  # not used


def write(folder: pathlib.Path, n: int) -> None:
    """Write `n` JPEGs in folders of 1,000."""
    from benchmarks.loader import picture

    rng = np.random.default_rng(0)
    images = [picture(rng) for _ in range(min(KINDS, n))]
    for i in range(n):
        path = folder / "images" / f"{i // 1000:03d}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[i % len(images)])


def peer(options: argparse.Namespace):
    """open_clip's model, with the same random weights each time, and its config."""
    import open_clip
    import torch

    torch.manual_seed(0)
    vision = {"image_size": 224, "patch_size": 32, "width": options.width, "layers": options.layers}
    model = open_clip.model.CLIP(512, vision, TEXT).eval()
    return model, {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": TEXT}}


def open_clips(options: argparse.Namespace) -> Callable[[], object]:
    """Return a function that embeds all images with open_clip."""
    import open_clip
    import torch
    from PIL import Image

    torch.set_num_threads(os.cpu_count())
    model, _ = peer(options)
    preprocess = open_clip.image_transform(224, is_train=False)

    class Pictures(list):
        def __getitem__(self, i):
            return preprocess(Image.open(super().__getitem__(i)))

    def embed(files):
        loader = torch.utils.data.DataLoader(Pictures(files), options.batch, num_workers=options.workers)
        with torch.inference_mode():
            return np.concatenate([model.encode_image(x, normalize=True).numpy() for x in loader])

    files = sorted((options.folder / "images").rglob("*.jpg"))
    embed(files[: options.batch])
    return lambda: np.save(options.folder / "open_clip.npy", embed(files))


def ours(options: argparse.Namespace) -> Callable[[], object]:
    """Return a function that embeds all images with this project's command."""
    import xclip_jax
    from xclip_jax.commands import embed, inputs

    model = xclip_jax.load(options.folder, batch=options.batch)
    for n in (options.batch, 8, 1):
        model.encode_prepared(np.zeros((n, 224, 224, 3), np.uint8))
    out = options.folder / "ours.parquet"
    out.unlink(missing_ok=True)  # from an earlier turn
    images = inputs.open_images(f"{options.folder}/images/**/*.jpg")
    return lambda: embed.embed(model, {"image": images}, str(out), threads=options.workers)


def compare(options: argparse.Namespace) -> None:
    """Write the images and weights, and measure both sides."""
    import open_clip
    import torch

    from xclip_jax.core import environment
    from xclip_jax.data import embeddings

    write(options.folder, options.images)
    model, config = peer(options)
    torch.save(model.state_dict(), options.folder / "open_clip_pytorch_model.bin")
    (options.folder / "open_clip_config.json").write_text(json.dumps(config))
    given = [f"--{key}={getattr(options, key)}" for key in ("folder", "batch", "workers", "width", "layers")]
    runs: dict[str, list[float]] = {"xclip_jax": [], "open_clip": []}
    for _ in range(options.repeats):
        for side in runs:
            measured = result_of("embed", "--side", side, *given) or sys.exit(1)
            runs[side].append(options.images / measured["seconds"])
            cpu = 1000 * measured["cpu"] / options.images
            about = f"{cpu:.1f} ms of cores per image, {measured['before']:.1f} s before the first"
            print(f"{side}: {runs[side][-1]:.1f} images/s, {about}", flush=True)
    rows = embeddings.read(options.folder / "ours.parquet")["embedding"]
    cosines = (rows * np.load(options.folder / "open_clip.npy")).sum(axis=1)
    versions = environment.capture()["versions"]
    print(f"\nopen_clip {open_clip.__version__}, torch {torch.__version__}, {versions}")
    print(
        f"{os.cpu_count()} cores, {options.images:,} JPEGs, {options.layers} layers of width {options.width}, batch "
        f"{options.batch}, {options.workers} workers, medians of {options.repeats}; cosine of both sides' embeddings "
        f"{cosines.min():.6f} at least\n\n| side | images/s |\n|---|---|"
    )
    medians = {side: statistics.median(values) for side, values in runs.items()}
    for side, median in medians.items():
        print(f"| {side} | {median:.1f} |")
    print(f"\nxclip_jax / open_clip: {medians['xclip_jax'] / medians['open_clip']:.2f}")


def main() -> None:
    """Measure one side, or compare both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for flag, default in {"images": 5000, "batch": 32, "workers": os.cpu_count(), "width": 384, "layers": 12}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("xclip_jax", "open_clip"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.side:
        with tempfile.TemporaryDirectory() as folder:
            options.folder = pathlib.Path(folder)
            compare(options)
        return
    began = time.perf_counter()
    work = {"xclip_jax": ours, "open_clip": open_clips}[options.side](options)
    before = time.perf_counter() - began
    cpu = sum(os.times()[:4])  # of all threads and of ended workers
    seconds = seconds_of(work)
    print(json.dumps({"seconds": seconds, "cpu": sum(os.times()[:4]) - cpu, "before": before}))


if __name__ == "__main__":
    main()
