"""Training speed on a GPU or TPU, in one command and under ten minutes: a table ready to paste.

    python -m benchmarks.accelerator                   # ViT-B/16, CLIP and xCLIP, and open_clip where torch has CUDA
    python -m benchmarks.accelerator --trace traces
    JAX_PLATFORMS=cpu python -m benchmarks.accelerator --small      # what the tests run; its figures mean nothing

Each row is a process of its own, and so is each attempt at it: one that ran out of memory would leave its peak and what
it compiled to the next. Ours, with the rematerialisation of the recipes (remat=dots), compiles the step of two small
batches, takes the largest multiple of 128 pairs a device whose memory fits by what the compiler says of these (less, if
the device disagrees), and takes --steps steps, whose median counts. Images are random uint8, texts as long as those of
CC12M (`benchmarks.captions`) and whole unless --groups. MFU is the model's FLOPs (`xclip_jax.train.cost`, three
forward passes, of what is cut from texts none) over the devices' dense bf16 peak. open_clip runs on one GPU, without
rematerialisation, with torch.compile, bf16 autocast and fused AdamW, at the pairs of one of our devices or the largest
half, quarter ... of these that fits; its texts are always whole.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import captions

PRESET, CLUSTERS = "B/16", 32768
MULTIPLE = 128  # pairs of a device
LARGEST = 3 * MULTIPLE  # pairs of a device, of the steps that are compiled for their memory alone
FREE = 0.92  # share of a device's memory that a step may take
WARM_UP = 3


def config_of(objective: str, batch: int, small: bool, groups: bool) -> Any:
    """The recipe's config with a batch of `batch` pairs; with `small` of towers that a CPU computes in a moment."""
    import jax

    from xclip_jax.config import recipes

    config = recipes.base(objective, "Ti/12" if small else PRESET)
    config.model.img.remat = config.model.txt.remat = "dots"
    config.run, config.steps, config.data.batch, config.optim.warmup = "runs/none", 1000, batch, 0
    if small:
        config.model.img.update(image_size=24, depth=1, scan=False)
        config.model.txt.update(depth=1, scan=False)
        config.model.cluster_head.update(clusters=64, hidden=32)
    else:
        config.model.cluster_head.update(clusters=CLUSTERS)
    if groups:
        from xclip_jax.config.schema import resolve

        devices = jax.device_count()
        config.data.length_groups = str(captions.groups_for(batch // devices, devices, resolve(config).model.txt))
    return config


def rounded(pairs: float) -> int:
    """The largest multiple of 128 pairs of a device, or below that power of two, up to `pairs`; at least 1."""
    return int(pairs) // MULTIPLE * MULTIPLE or 1 << max(int(pairs), 1).bit_length() - 1


def fitting_batch(objective: str, small: bool, groups: bool) -> int:
    """The largest batch of one device's share times the devices, by the memory of the steps of two small ones."""
    import jax

    from xclip_jax.train import cost
    from xclip_jax.train.build import build

    devices = jax.devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    if small or not limit:
        return 16 * len(devices)
    peaks: dict[int, float] = {}
    size = LARGEST
    while size and len(peaks) < 2:
        experiment = build(config_of(objective, size * len(devices), small, groups))
        compiled, trouble = cost.compile_if_fits(experiment)  # compilers of TPUs refuse what does not fit
        if compiled is not None:
            peaks[size] = cost.memory_usage(experiment, compiled)["peak"]
        size //= 2
    if len(peaks) < 2:
        raise SystemExit(f"not even two pairs a device fit: {trouble}")
    large, small_one = peaks
    slope = (peaks[large] - peaks[small_one]) / (large - small_one)
    return rounded(large + (FREE * limit - peaks[large]) / slope) * len(devices)


def ours(flags: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, in --batch or the batch that should fit; {"retry": smaller batch} where it does not."""
    import jax

    batch = flags.batch or fitting_batch(flags.child, flags.small, flags.groups)
    devices = jax.device_count()
    try:
        return _ours(flags, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or batch <= devices:
            raise
        return {"retry": rounded(0.9 * batch / devices) * devices}


def _ours(flags: argparse.Namespace, batch: int) -> dict[str, Any]:
    import jax

    from xclip_jax.data import loader
    from xclip_jax.data.length_groups import WHOLE
    from xclip_jax.train import build, cost, state

    experiment = build.build(config_of(flags.child, batch, flags.small, flags.groups))
    current = state.create(experiment.init, experiment.abstract)
    rng, size, context = np.random.default_rng(0), experiment.image_size, experiment.context_length
    ends = np.minimum(captions.lengths(batch), context)
    data = {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "text": captions.tokens(ends, context, experiment.tokenizer.vocab_size),
    }
    assert experiment.tokenizer.eot_id == experiment.tokenizer.vocab_size - 1
    batch_on_devices = loader.to_global(data, experiment.mesh)
    began, metrics = time.perf_counter(), {}

    def step() -> None:
        nonlocal current, metrics
        current, metrics = experiment.compiled(current, batch_on_devices)
        float(metrics["loss"])

    step()
    first = time.perf_counter() - began
    seconds = measured(step, flags.steps)
    if flags.trace:
        with jax.profiler.trace(flags.trace):
            for _ in range(3):
                step()
    device = jax.devices()[0]
    used = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    peak = cost.PEAK_FLOPS.get(device.device_kind, 0) * jax.device_count()
    cut = bool(metrics.get("text/cut", 0))
    whole = cost.step_flops(experiment.config, WHOLE)
    counted = cost.step_flops(experiment.config, rows=experiment.text_rows[0]) if cut else whole
    return {
        "program": "xclip_jax", "objective": flags.child, "batch": batch, "seconds": seconds, "first": first,
        "flops": counted, "whole": whole, "cut": cut, "peak": peak,
        "memory": used, "device_count": jax.device_count(), "devices": f"{jax.device_count()} {device.device_kind}",
        "loss": float(metrics["loss"]),
    }  # fmt: skip


def measured(step: Callable[[], None], steps: int) -> float:
    """Median seconds of `steps` steps, after a warm-up."""
    seconds = []
    for i in range(WARM_UP + steps):
        began = time.perf_counter()
        step()
        if i >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def open_clip(flags: argparse.Namespace) -> dict[str, Any]:
    """The same of open_clip's ViT-B-16 on one GPU, in --batch."""
    import torch

    try:
        return _open_clip(flags, flags.batch)
    except torch.OutOfMemoryError:
        if flags.batch <= MULTIPLE:
            raise
        return {"retry": flags.batch // 2}


def _open_clip(flags: argparse.Namespace, batch: int) -> dict[str, Any]:
    import open_clip as peer
    import torch

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = peer.create_model("ViT-B-16").cuda()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.2, fused=True)
    loss_of = peer.ClipLoss()
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (batch, 3, 224, 224), np.uint8)).cuda()
    rows = captions.tokens(captions.lengths(batch), captions.CONTEXT, 49408)
    texts = torch.from_numpy(rows.astype(np.int64)).cuda()
    began, value = time.perf_counter(), 0.0

    def step() -> None:
        nonlocal value
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(*compiled((images.float() / 255 - 0.5) / 0.25, texts)[:3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.item()

    step()
    first = time.perf_counter() - began
    return {
        "program": "open_clip", "objective": "clip", "batch": batch, "seconds": measured(step, flags.steps),
        "first": first, "memory": torch.cuda.max_memory_allocated(), "loss": value,
        "devices": f"1 {torch.cuda.get_device_name()}",
    }  # fmt: skip


def torch_has_cuda() -> bool:
    """Whether open_clip can run here, asked in a process of its own: torch would keep memory of the GPU."""
    code = "import open_clip, torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def measure(child: str, flags: argparse.Namespace, batch: int = 0) -> dict[str, Any] | None:
    """What a process of its own measured, of the first batch that fits, or None where it failed."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--child", child, "--steps", str(flags.steps)]
    command += ["--small"] * flags.small + ["--groups"] * flags.groups
    command += ["--trace", str(pathlib.Path(flags.trace) / child)] if flags.trace else []
    result: dict[str, Any] = {"retry": batch or flags.batch}
    while "retry" in result:
        batch = result["retry"]
        print(f"{child}, {batch or 'the most'} pairs ...", file=sys.stderr, flush=True)
        done = subprocess.run([*command, "--batch", str(batch)], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{child} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            return None
        result = json.loads(done.stdout.splitlines()[-1])
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    units = ["s a step", "pairs/s", "model TFLOP/s", "MFU", "GiB", "s of the first step"]
    heads = ["program", "objective", "devices", "batch", *units]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        rate = row["flops"] / row["seconds"]
        mfu = f"{rate / row['peak']:.1%}" if row["peak"] else "-"
        memory = f"{row['memory'] / 2**30:.1f}" if row["memory"] else "-"
        lines.append(
            f"| {row['program']} | {row['objective']} | {row['devices']} | {row['batch']:,} | {row['seconds']:.3f} | "
            f"{row['batch'] / row['seconds']:,.0f} | {rate / 1e12:.1f} | {mfu} | {memory} | {row['first']:.0f} |"
        )
    return "\n".join(lines)


def of_one_device(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """open_clip's row, with the FLOPs of our pairs with whole texts, and the peak of one of our devices."""
    work, peak = ours["whole"] / ours["batch"] * peer["batch"], ours["peak"] / ours["device_count"]
    return peer | {"flops": work, "peak": peak, "cut": False}


def texts(row: dict[str, Any]) -> str:
    """Whether a program computed its texts in groups."""
    if row["program"] != "xclip_jax":
        return "its texts are whole"
    return "texts in groups of their lengths" if row["cut"] else "texts are whole, since this batch fits no groups"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", default="clip,xclip", help="joined by commas")
    parser.add_argument("--batch", type=int, default=0, help="global batch; by default the largest that fits")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", action="store_true", help="texts in groups of their lengths, data.length_groups")
    parser.add_argument("--trace", default="", help="folder for traces of three steps")
    parser.add_argument("--small", action="store_true", help="tiny towers and a tiny batch: a test of this script")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        with contextlib.redirect_stdout(sys.stderr):  # libraries' own lines
            result = open_clip(flags) if flags.child == "open_clip" else ours(flags)
        print(json.dumps(result))
        return
    rows = [row for objective in flags.objectives.split(",") if (row := measure(objective, flags))]
    clip = next((row for row in rows if row["objective"] == "clip"), None)
    share = clip and clip["batch"] // clip["device_count"]
    if clip and not flags.small and torch_has_cuda() and (peer := measure("open_clip", flags, share)):
        rows.append(of_one_device(clip, peer))
    if not rows:
        raise SystemExit(1)
    from xclip_jax.core import environment

    facts = environment.capture()
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("jax", "flax") if name in facts["versions"])
    print(f"ViT-{PRESET if not flags.small else 'tiny'}, bf16, commit {facts['commit']}, {versions}\n")
    print(table(rows))
    if flags.groups:
        print("\n" + "\n".join(f"{row['program']}, {row['objective']}: {texts(row)}." for row in rows))


if __name__ == "__main__":
    main()
