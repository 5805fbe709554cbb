"""Seconds of a training step on this machine: xclip_jax beside open_clip, beside CLIP, or beside another checkout.

    pip install '.[bench]' && JAX_PLATFORMS=cpu python -m benchmarks.step
    python -m benchmarks.step --captions natural         # context 77, captions as long as those of CC12M
    python -m benchmarks.step --captions natural --whole # beside itself with texts that are not cut
    python -m benchmarks.step --objective xclip          # beside CLIP, k = 4096, in place of open_clip
    python -m benchmarks.step --against ../old-checkout  # the same of another checkout

Two processes with models of equal size (17,750,401 parameters: image tower 12 x 192, 64 pixels, patch 16; text tower
6 x 192, 32 tokens; embedding 256), batch 256, float32, texts that fill the context, AdamW (open_clip: fused). With
--captions natural the context is 77 and texts are drawn as `benchmarks.captions` says. Both compile first; then each
takes --steps steps in turn, --turns times, while the other waits. Prints each turn's median, what the first step took,
and last "ratio R", the median of the first over that of the second. docs/performance.md names the allocator of its
figures.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import captions

BATCH, IMAGE_SIZE, PATCH, VOCAB, EMBED = 256, 64, 16, 49408, 256
CONTEXT = {"full": 32, "natural": captions.CONTEXT}
TOWERS = {"img": {"width": 192, "depth": 12, "heads": 3}, "txt": {"width": 192, "depth": 6, "heads": 3}}
ALLOCATOR = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF")
CLUSTERS, HIDDEN = 4096, 1024  # a hidden layer of 4096, as full-size recipes have, would be a fifth of these towers


def batch(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (b, h, w, 3) and int32 tokens (b, n), of which the largest is the end of the text."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    # Others than those that the groups of lengths are chosen by.
    lengths = captions.lengths(BATCH, seed=1) if kind == "natural" else np.full(BATCH, CONTEXT[kind])
    return images, captions.tokens(lengths, CONTEXT[kind], VOCAB)


def config_of(objective: str, kind: str, groups: str) -> Any:
    """Return our config of the model and batch."""
    from xclip_jax.config import recipes
    from xclip_jax.models.transformer import TextTowerConfig

    config = recipes.base(objective, "Ti/12")
    config.steps, config.optim.warmup, config.data.batch = 1000, 0, BATCH
    config.model.dtype, config.model.embed = "float32", EMBED
    config.model.img.image_size, config.model.img.patch = IMAGE_SIZE, PATCH
    config.model.txt.context_length = CONTEXT[kind]
    if groups == "auto":
        text = TextTowerConfig(context_length=CONTEXT[kind], width=TOWERS["txt"]["width"], depth=TOWERS["txt"]["depth"])
        groups = str(captions.groups_for(BATCH, 1, text)) if kind == "natural" else "full"
    config.data.length_groups = groups
    for tower, sizes in TOWERS.items():
        config.model[tower].update(sizes, scan=False)
    config.model.cluster_head.update(clusters=CLUSTERS, hidden=HIDDEN)
    return config


def saved_flops() -> float:
    """Return the share of a CLIP step's FLOPs that groups of lengths save with natural captions."""
    from xclip_jax.config.schema import resolve
    from xclip_jax.data import length_groups
    from xclip_jax.train import cost

    config = config_of("clip", "natural", "auto")
    config.run = "runs/none"
    return 1 - cost.step_flops(resolve(config)) / cost.step_flops(resolve(config), length_groups.WHOLE)


def ours(objective: str, kind: str, groups: str) -> Callable[[], float]:
    """Take one step of xclip_jax and return its loss."""
    import jax

    from xclip_jax.parallel.mesh import batch_sharding
    from xclip_jax.train import build, state

    experiment = build.build(config_of(objective, kind, groups))
    current = [state.create(experiment.init, experiment.abstract)]
    image, text = (jax.device_put(x, batch_sharding(experiment.mesh)) for x in batch(kind))

    def step() -> float:
        current[0], metrics = experiment.compiled(current[0], {"image": image, "text": text})
        assert metrics.get("text/cut", 1) == 1, "the texts of the batch do not fit the groups of lengths"
        return float(metrics["loss"])

    return step


def open_clip(objective: str, kind: str, groups: str) -> Callable[[], float]:
    """The same of open_clip."""
    import open_clip as peer
    import torch

    del objective, groups
    torch.manual_seed(0)
    img, txt = TOWERS["img"], TOWERS["txt"]
    vision = {
        "image_size": IMAGE_SIZE, "patch_size": PATCH, "width": img["width"], "layers": img["depth"],
        "head_width": img["width"] // img["heads"],
    }  # fmt: skip
    text = {
        "context_length": CONTEXT[kind], "vocab_size": VOCAB, "width": txt["width"], "heads": txt["heads"],
        "layers": txt["depth"],
    }  # fmt: skip
    model = peer.model.CLIP(EMBED, vision, text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.5, fused=True)
    loss_of = peer.ClipLoss()
    pixels, tokens = batch(kind)
    tokens = torch.from_numpy(tokens.astype(np.int64))
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def step() -> float:
        images = (pixels.float() / 255 - 0.5) / 0.25
        loss = loss_of(*model(images, tokens)[:3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return loss.item()

    return step


def child(program: str, objective: str, kind: str, groups: str) -> None:
    """Print the seconds of the first step, then for each line N of stdin those of N more."""
    began = time.perf_counter()
    step = {"ours": ours, "open_clip": open_clip}[program](objective, kind, groups)
    loss = step()
    print(json.dumps({"first": time.perf_counter() - began, "loss": loss}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)


class Program:
    """A process that takes steps when it is asked to."""

    def __init__(
        self, label: str, program: str, objective: str, kind: str, checkout: pathlib.Path, groups: str = "auto"
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.step", "--child", program]
        # Another checkout may be older than a flag.
        values = {"objective": (objective, "clip"), "captions": (kind, "full"), "groups": (groups, "auto")}
        command += [f"--{flag}={value}" for flag, (value, default) in values.items() if value != default]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        self.label, self.seconds = label, []
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        first = self._answer()
        print(f"{label}: first step after {first['first']:.1f} s, loss {first['loss']:.4f}", flush=True)
        self.take(2)
        self.seconds.clear()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.label}: the process ended; see its error above")
        return json.loads(line)

    def take(self, steps: int) -> float:
        """Median seconds of `steps` steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.seconds += answer["seconds"]
        return statistics.median(answer["seconds"])


def main() -> None:
    """Print a line for each turn, then the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("clip", "xclip"), default="clip")
    parser.add_argument("--captions", choices=tuple(CONTEXT), default="full", help="how long texts are")
    parser.add_argument("--whole", action="store_true", help="beside itself with texts that are not cut")
    parser.add_argument("--groups", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--against", type=pathlib.Path, help="another checkout of xclip_jax, in place of open_clip")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--child", choices=("ours", "open_clip"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(flags.child, flags.objective, flags.captions, flags.groups)
        return
    root = pathlib.Path(__file__).resolve().parents[1]
    allocator = " ".join(f"{key}={os.environ[key]}" for key in ALLOCATOR if os.environ.get(key))
    print(f"{os.cpu_count()} cores, {platform.machine()}, {allocator or 'the allocator as it is'}")
    kind = flags.captions
    if kind == "natural":
        print(f"the FLOPs of a CLIP step fall by {saved_flops():.1%} with texts in groups of their lengths")
    first = Program(f"xclip_jax {flags.objective}", "ours", flags.objective, kind, root)
    if flags.against:
        second = Program(str(flags.against), "ours", flags.objective, kind, flags.against.resolve())
    elif flags.whole:
        second = Program("with whole texts", "ours", flags.objective, kind, root, "full")
    elif flags.objective == "xclip":
        second = Program("xclip_jax clip", "ours", "clip", kind, root)
    else:
        second = Program("open_clip", "open_clip", "clip", kind, root)
    for turn in range(flags.turns):
        print(
            f"turn {turn + 1}: " + ", ".join(f"{p.label} {p.take(flags.steps):.3f} s" for p in (first, second)),
            flush=True,
        )
    medians = [statistics.median(p.seconds) for p in (first, second)]
    for program, median in zip((first, second), medians, strict=True):
        print(
            f"{program.label}: median {median:.3f} s of {len(program.seconds)} steps, "
            f"fastest {min(program.seconds):.3f} s"
        )
        program.process.stdin.close()
        program.process.wait()
    print(f"ratio {medians[0] / medians[1]:.3f}")


if __name__ == "__main__":
    main()
