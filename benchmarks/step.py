"""Seconds of a training step on this machine, compared with open_clip, CLIP or another checkout.

    pip install '.[bench]' && JAX_PLATFORMS=cpu python -m benchmarks.step
    python -m benchmarks.step --captions natural         # context 77, captions as long as in CC12M
    python -m benchmarks.step --captions natural --whole # compared with the same step with whole texts
    python -m benchmarks.step --objective xclip          # compared with CLIP, k = 4096, instead of open_clip
    python -m benchmarks.step --against ../old-checkout  # compared with another checkout

Two processes train models of equal size (17,750,401 parameters: image tower 12 x 192, 64 pixels, patch 16; text tower
6 x 192, 32 tokens; embedding 256) with batch 256, float32, texts that fill the context, and AdamW (open_clip: fused).
Both compile first; then they take --steps steps in turn, --turns times, while the other waits. Prints the median of
each turn, the time of the first step, and finally "ratio R", the first median over the second. docs/performance.md
lists the allocator settings of its figures.

Captions of CC12M have 20.2 tokens on average, with a standard deviation of 16.3 (Changpinyo et al. 2021, arXiv
2102.08981, table 1). Natural captions are drawn from the log-normal distribution with these moments, get two more
tokens for start and end, and are cut at 77.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.shared import seconds_of

BATCH, IMAGE_SIZE, PATCH, VOCAB, EMBED = 256, 64, 16, 49408, 256
CONTEXT = {"full": 32, "natural": 77}
TOWERS = {"img": {"width": 192, "depth": 12, "heads": 3}, "txt": {"width": 192, "depth": 6, "heads": 3}}
ALLOCATOR = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF")
CLUSTERS, HIDDEN = 4096, 1024  # the usual hidden layer of 4096 would need a fifth of these small towers' FLOPs
ROOT = pathlib.Path(__file__).resolve().parents[1]


def caption_lengths(n: int, seed: int = 0) -> np.ndarray:
    """Tokens of `n` captions, int (n,), with start and end."""
    mean, deviation = 20.2, 16.3
    variance = math.log(1 + (deviation / mean) ** 2)
    words = np.random.default_rng(seed).lognormal(math.log(mean) - variance / 2, variance**0.5, n)
    return np.minimum(np.maximum(words.round(), 1).astype(int) + 2, CONTEXT["natural"])


def random_tokens(ends: np.ndarray, context: int, vocab: int) -> np.ndarray:
    """int32 (n, context): `ends` random tokens per text, ending in the largest token, then zeros."""
    rows = np.random.default_rng(0).integers(1, vocab - 2, (len(ends), context), np.int32)
    rows[:, 0] = vocab - 2
    rows[np.arange(len(ends)), ends - 1] = vocab - 1
    return np.where(np.arange(context) < ends[:, None], rows, 0)


def batch(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 images (b, h, w, 3) and int32 tokens (b, n), each text ending in the largest token."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    # `experiment_of` chooses groups for captions of another seed.
    lengths = caption_lengths(BATCH, seed=1) if kind == "natural" else np.full(BATCH, CONTEXT[kind])
    return images, random_tokens(lengths, CONTEXT[kind], VOCAB)


def config_of(objective: str, kind: str) -> Any:
    """Return the config of our model and batch."""
    from xclip_jax.config import recipes

    config = recipes.base(objective, "Ti/12")
    config.update(run="runs/none", steps=1000)
    config.optim.warmup = 0
    config.data.batch = BATCH
    config.model.update(dtype="float32", embed=EMBED, scan=False)
    config.model.img.update(TOWERS["img"], image_size=IMAGE_SIZE, patch=PATCH)
    config.model.txt.update(TOWERS["txt"], context_length=CONTEXT[kind])
    config.model.cluster_head.update(clusters=CLUSTERS, hidden=HIDDEN)
    return config


def experiment_of(config: Any, in_groups: bool) -> Any:
    """Return the experiment; if `in_groups`, with groups for natural captions like by `data.length_groups=auto`."""
    import jax

    from xclip_jax.data import length_groups
    from xclip_jax.train import build

    experiment = build.build(config)
    if not in_groups:
        return experiment
    devices = jax.device_count()
    counts = np.bincount(caption_lengths(1024), minlength=CONTEXT["natural"] + 1)
    flops_of = experiment.config.model.txt.cut_flops
    groups = length_groups.choose(counts, rows=config.data.batch // devices, draws=devices, flops_of=flops_of)
    return dataclasses.replace(experiment, length_groups=groups)


def saved_flops() -> float:
    """Return the fraction of a CLIP step's FLOPs that groups of lengths save with natural captions."""
    from xclip_jax.train import cost

    experiment = experiment_of(config_of("clip", "natural"), in_groups=True)
    config = experiment.config
    return 1 - cost.step_flops(config, experiment.length_groups, experiment.text_rows[0]) / cost.step_flops(config)


def ours(experiment: Any, kind: str) -> Callable[[], float]:
    """Return a function that takes one step of an experiment and returns its loss."""
    import jax

    from xclip_jax.parallel.mesh import batch_sharding
    from xclip_jax.train import state

    current = state.create(experiment.init, experiment.abstract)
    image, text = (jax.device_put(x, batch_sharding(experiment.mesh)) for x in batch(kind))

    def step() -> float:
        nonlocal current
        current, metrics = experiment.compiled(current, {"image": image, "text": text})
        assert metrics.get("text/cut", 1) == 1, "the texts of the batch do not fit the groups of lengths"
        return float(metrics["loss"])

    return step


def open_clip_config(embed: int, img: Mapping[str, int], txt: Mapping[str, int]) -> dict[str, Any]:
    """Return the arguments of open_clip's CLIP for towers by our keys of `model.img` and `model.txt`."""
    vision = {
        "image_size": img["image_size"], "patch_size": img["patch"], "width": img["width"], "layers": img["depth"],
        "head_width": img["width"] // img["heads"],
    }  # fmt: skip
    text = {
        "context_length": txt["context_length"], "vocab_size": VOCAB, "width": txt["width"], "heads": txt["heads"],
        "layers": txt["depth"],
    }  # fmt: skip
    return {"embed_dim": embed, "vision_cfg": vision, "text_cfg": text}


def open_clip_step(model: Any, optimizer: Any, mean: Any, std: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return a function that takes a step of open_clip on uint8 (b, h, w, 3) and tokens (b, n), and returns the loss.

    `mean` and `std` of pixels between 0 and 1 are numbers or tensors (3, 1, 1).
    """
    import open_clip as peer
    import torch

    loss_of = peer.ClipLoss()

    def step(images: np.ndarray, tokens: np.ndarray) -> float:
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        loss = loss_of(*model(pixels, torch.from_numpy(tokens).long())[:3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return loss.item()

    return step


def open_clip(kind: str) -> Callable[[], float]:
    """Return a function that takes one step of open_clip and returns its loss."""
    import open_clip as peer
    import torch

    torch.manual_seed(0)
    img = TOWERS["img"] | {"image_size": IMAGE_SIZE, "patch": PATCH}
    txt = TOWERS["txt"] | {"context_length": CONTEXT[kind]}
    model = peer.model.CLIP(**open_clip_config(EMBED, img, txt))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.5, fused=True)
    return functools.partial(open_clip_step(model, optimizer, 0.5, 0.25), *batch(kind))


def child(flags: argparse.Namespace) -> None:
    """Print the seconds of the first step; then, for each number on stdin, take as many steps and print theirs."""
    began = time.perf_counter()
    if flags.child == "open_clip":
        step = open_clip(flags.captions)
    else:
        in_groups = flags.captions == "natural" and not flags.whole
        step = ours(experiment_of(config_of(flags.objective, flags.captions), in_groups), flags.captions)
    loss = step()
    print(json.dumps({"first": time.perf_counter() - began, "loss": loss}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": [seconds_of(step) for _ in range(int(line))]}), flush=True)


class Program:
    """A process that takes steps on request."""

    def __init__(self, label: str, program: str, flags: list[str], checkout: pathlib.Path = ROOT) -> None:
        command = [sys.executable, "-m", "benchmarks.step", "--child", program, *flags]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        self.label = label
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        first = self._answer()
        print(f"{label}: first step after {first['first']:.1f} s, loss {first['loss']:.4f}", flush=True)
        self.seconds: list[float] = []
        self.take(2)
        self.seconds.clear()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.label}: the process ended; see its error above")
        return json.loads(line)

    def take(self, steps: int) -> float:
        """Return the median seconds of `steps` steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        seconds = self._answer()["seconds"]
        self.seconds += seconds
        return statistics.median(seconds)


def main() -> None:
    """Print a line for each turn, then the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("clip", "xclip"), default="clip")
    parser.add_argument("--captions", choices=tuple(CONTEXT), default="full", help="lengths of the texts")
    parser.add_argument("--whole", action="store_true", help="compare with the same step with whole texts")
    parser.add_argument("--against", type=pathlib.Path, help="another checkout of xclip_jax, instead of open_clip")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--child", choices=("ours", "open_clip"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(flags)
        return
    allocator = " ".join(f"{key}={os.environ[key]}" for key in ALLOCATOR if os.environ.get(key))
    print(f"{os.cpu_count()} cores, {platform.machine()}, {allocator or 'the default allocator'}")
    if flags.captions == "natural":
        print(f"the FLOPs of a CLIP step fall by {saved_flops():.1%} with texts in groups of their lengths")
    # Only flags without their default values: another checkout may be older than a flag.
    captions = ["--captions=natural"] * (flags.captions == "natural")
    same = captions + ["--objective=xclip"] * (flags.objective == "xclip")
    first = Program(f"xclip_jax {flags.objective}", "ours", same)
    if flags.against:
        second = Program(str(flags.against), "ours", same, flags.against.resolve())
    elif flags.whole:
        second = Program("with whole texts", "ours", [*same, "--whole"])
    elif flags.objective == "xclip":
        second = Program("xclip_jax clip", "ours", captions)
    else:
        second = Program("open_clip", "open_clip", captions)
    for turn in range(1, flags.turns + 1):
        medians = ", ".join(f"{p.label} {p.take(flags.steps):.3f} s" for p in (first, second))
        print(f"turn {turn}: {medians}", flush=True)
    for program in (first, second):
        print(
            f"{program.label}: median {statistics.median(program.seconds):.3f} s of {len(program.seconds)} steps, "
            f"fastest {min(program.seconds):.3f} s"
        )
        program.process.stdin.close()
        program.process.wait()
    print(f"ratio {statistics.median(first.seconds) / statistics.median(second.seconds):.3f}")


if __name__ == "__main__":
    main()
