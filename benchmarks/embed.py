"""Images a second from JPEG files to embeddings: xclip_jax.commands.embed and open_clip with the same weights.

    pip install '.[bench]' && JAX_PLATFORMS=cpu python -m benchmarks.embed

Writes 5,000 JPEGs of about 500 x 375, then lets each side embed all of them in turn, --repeats times, each time in a
process of its own, with random weights of a ViT-S/32 (12 layers of width 384, 224 pixels): both in float32, with equal
batch, workers and threads. Ours is the command's own work, from the list of paths to the parquet file; open_clip's is
its preprocessing in a DataLoader, `encode_image`, and a .npy file. Prints medians, their ratio, and how near the
embeddings are. Importing, making the model and the first batches, in which XLA compiles, count for neither; what they
took is printed beside, and so are the seconds of all cores together, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

KINDS = 200  # different pictures; they repeat, so that making them takes no time
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}  # not used


def paths(folder: pathlib.Path, n: int) -> list[str]:
    """Where `n` JPEGs go, in folders of 1,000: of these alone, as a kept folder may have those of a larger run."""
    return [str(folder / "images" / f"{i // 1000:03d}" / f"{i:06d}.jpg") for i in range(n)]


def write(folder: pathlib.Path, n: int) -> None:
    """The JPEGs of `paths`."""
    from benchmarks.loader import picture

    rng = np.random.default_rng(0)
    images = [picture(rng) for _ in range(min(KINDS, n))]
    for i, path in enumerate(map(pathlib.Path, paths(folder, n))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[i % len(images)])


def embeddings(folder: pathlib.Path) -> np.ndarray:
    """Those that our side wrote last: a kept folder has those of earlier runs too."""
    import pyarrow.parquet

    newest = max(folder.glob("ours-*.parquet"))  # their names are times
    rows = pyarrow.parquet.read_table(newest)["embedding"].combine_chunks()
    return rows.flatten().to_numpy().reshape(len(rows), -1)


def cpu_seconds() -> float:
    """Of all threads of this process, and of workers that have ended."""
    return sum(os.times()[:4])


def peer(options: argparse.Namespace):
    """open_clip's model, with weights that depend on the seed alone, and its config."""
    import open_clip
    import torch

    torch.manual_seed(0)
    vision = {"image_size": 224, "patch_size": 32, "width": options.width, "layers": options.layers}
    model = open_clip.model.CLIP(512, vision, TEXT).eval()
    return model, {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": TEXT}}


def open_clips(options: argparse.Namespace) -> dict[str, float]:
    """open_clip's side."""
    import open_clip
    import torch
    from PIL import Image

    torch.set_num_threads(os.cpu_count())
    began = time.perf_counter()
    (model, _), preprocess = peer(options), open_clip.image_transform(224, is_train=False)

    class Files(torch.utils.data.Dataset):
        def __init__(self, files):
            self.files = files

        def __len__(self):
            return len(self.files)

        def __getitem__(self, i):
            return preprocess(Image.open(self.files[i]))

    def embed(files):
        loader = torch.utils.data.DataLoader(Files(files), options.batch, num_workers=options.workers)
        with torch.inference_mode():
            return np.concatenate([model.encode_image(x, normalize=True).numpy() for x in loader])

    files = paths(options.folder, options.images)
    embed(files[: options.batch])
    ready, cpu = time.perf_counter(), cpu_seconds()
    np.save(options.folder / "open_clip.npy", embed(files))
    return {"seconds": time.perf_counter() - ready, "cpu": cpu_seconds() - cpu, "before": ready - began}


def ours(options: argparse.Namespace) -> dict[str, float]:
    """This project's side."""
    import xclip_jax
    from xclip_jax.commands import embed, inputs

    began = time.perf_counter()
    model = xclip_jax.load(options.folder, batch=options.batch)
    for n in (options.batch, 8, 1):
        model.encode_prepared(np.zeros((n, 224, 224, 3), np.uint8))
    ready, cpu = time.perf_counter(), cpu_seconds()
    out = options.folder / f"ours-{time.time_ns()}.parquet"
    images = inputs.Images(paths(options.folder, options.images))
    embed.embed(model, {"image": images}, str(out), threads=options.workers)
    return {"seconds": time.perf_counter() - ready, "cpu": cpu_seconds() - cpu, "before": ready - began}


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.embed", "--side", side, "--folder", str(options.folder)]
    for key in ("images", "batch", "workers", "width", "layers"):
        command += [f"--{key}", str(getattr(options, key))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> None:
    import open_clip
    import torch

    import xclip_jax
    from xclip_jax.core import environment

    write(options.folder, options.images)
    model, config = peer(options)
    torch.save(model.state_dict(), options.folder / "open_clip_pytorch_model.bin")
    (options.folder / "open_clip_config.json").write_text(json.dumps(config))
    runs: dict[str, list[float]] = {"xclip_jax": [], "open_clip": []}
    for _ in range(options.repeats):
        for side in runs:
            measured = measure(side, options)
            runs[side].append(options.images / measured["seconds"])
            cpu = 1000 * measured["cpu"] / options.images
            about = f"{cpu:.1f} ms of cores an image, {measured['before']:.1f} s before the first"
            print(f"{side}: {runs[side][-1]:.1f} images/s, {about}", flush=True)
    cosines = (embeddings(options.folder) * np.load(options.folder / "open_clip.npy")).sum(axis=1)
    medians = {side: statistics.median(values) for side, values in runs.items()}
    versions = f"xclip_jax {xclip_jax.__version__}, open_clip {open_clip.__version__}, torch {torch.__version__}"
    print(f"\n{versions}, {environment.capture()['versions']}")
    print(
        f"{os.cpu_count()} cores, {options.images:,} JPEGs, {options.layers} layers of width {options.width}, batch "
        f"{options.batch}, {options.workers} workers, medians of {options.repeats}; cosine of both sides' embeddings "
        f"{cosines.min():.6f} at least\n\n| side | images/s |\n|---|---|"
    )
    for side, median in medians.items():
        print(f"| {side} | {median:.1f} |")
    print(f"\nxclip_jax / open_clip: {medians['xclip_jax'] / medians['open_clip']:.2f}")


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, help="where images and embeddings go and stay; else deleted")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=("xclip_jax", "open_clip"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"xclip_jax": ours, "open_clip": open_clips}[options.side](options)))
    elif options.folder:
        compare(options)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            options.folder = pathlib.Path(temporary)
            compare(options)


if __name__ == "__main__":
    main()
