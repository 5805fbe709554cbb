"""Training speed on a GPU or TPU, in one command and under ten minutes: a table ready to paste.

    python -m benchmarks.accelerator                   # ViT-B/16, CLIP and xCLIP, and open_clip if torch has CUDA
    python -m benchmarks.accelerator --trace traces
    JAX_PLATFORMS=cpu python -m benchmarks.accelerator --small      # for tests; its figures mean nothing

Each attempt at a row is a separate process, so that memory and compiled programs of one do not count for the next. Ours
uses the recipes' rematerialisation (remat=dots). The first attempt has 1,024 pairs per device, and each further one
half of the last, until a step fits; the median of --steps steps is printed. Images are random uint8, texts as long as
in CC12M (`benchmarks.step`) and whole without --groups. MFU is the model's FLOPs (`xclip_jax.train.cost`, three forward
passes, nothing for cut tokens) over the devices' dense bf16 peak. open_clip runs on one GPU, without rematerialisation,
with torch.compile, bf16 autocast, fused AdamW and whole texts, first with as many pairs as one of our devices.
"""

import argparse
import contextlib
import json
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import step as cpu
from benchmarks.shared import result_of, seconds_of

PRESET, CLUSTERS = "B/16", 32768
LARGEST = 1024  # pairs per device of the first attempt
LEAST = 128  # fewest pairs of a batch
WARM_UP = 3


def config_of(objective: str, batch: int, small: bool) -> Any:
    """Return the recipe's config with a batch of `batch` pairs; if `small`, with tiny towers for a CPU."""
    from xclip_jax.config import recipes

    config = recipes.base(objective, "Ti/12" if small else PRESET)
    config.update(run="runs/none", steps=1000)
    config.optim.warmup = 0
    config.data.batch = batch
    config.model.img.remat = config.model.txt.remat = "dots"
    config.model.cluster_head.update(clusters=CLUSTERS)
    if small:
        config.model.img.update(image_size=24, depth=1)
        config.model.txt.update(depth=1)
        config.model.scan = False
        config.model.cluster_head.update(clusters=64, hidden=32)
    return config


def attempt(flags: argparse.Namespace) -> dict[str, Any]:
    """Measure with --batch; {"retry": half of it} if that does not fit."""
    run = open_clip if flags.child == "open_clip" else ours
    try:
        return run(flags, flags.batch)
    except RuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)) or flags.batch < 2 * LEAST:
            raise
        return {"retry": flags.batch // 2}


def ours(flags: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Return the row of an objective."""
    import jax

    from xclip_jax.data import loader
    from xclip_jax.train import cost, state

    experiment = cpu.experiment_of(config_of(flags.child, batch, flags.small), flags.groups)
    current = state.create(experiment.init, experiment.abstract)
    size, context = experiment.image_size, experiment.context_length
    ends = np.minimum(cpu.caption_lengths(batch), context)
    data = {
        "image": np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8),
        "text": cpu.random_tokens(ends, context, experiment.tokenizer.vocab_size),
    }
    assert experiment.tokenizer.eot_id == experiment.tokenizer.vocab_size - 1
    batch_on_devices = loader.to_global(data, experiment.mesh)
    metrics: dict[str, Any] = {}

    def step() -> None:
        nonlocal current, metrics
        current, metrics = experiment.compiled(current, batch_on_devices)
        float(metrics["loss"])

    times = measured(step, flags.steps)
    if flags.trace:
        with jax.profiler.trace(flags.trace):
            for _ in range(3):
                step()
    device = jax.devices()[0]
    devices = jax.device_count()
    whole = cost.step_flops(experiment.config)
    in_groups = cost.step_flops(experiment.config, experiment.length_groups, experiment.text_rows[0])
    cut = bool(metrics.get("text/cut", 0))
    return times | {
        "program": "xclip_jax", "objective": flags.child, "batch": batch, "whole": whole, "cut": cut,
        "flops": in_groups if cut else whole,
        "peak": cost.PEAK_FLOPS.get(device.device_kind, 0) * devices, "loss": float(metrics["loss"]),
        "memory": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "device_count": devices, "devices": f"{devices} {device.device_kind}",
    }  # fmt: skip


def measured(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Return the seconds of the first step, and the median of `steps` steps after a warm-up."""
    seconds = [seconds_of(step) for _ in range(1 + WARM_UP + steps)]
    return {"first": seconds[0], "seconds": statistics.median(seconds[1 + WARM_UP :])}


def open_clip(flags: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Return the row of open_clip's ViT-B-16 on one GPU."""
    import open_clip as peer
    import torch

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = peer.create_model("ViT-B-16").cuda()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.2, fused=True)
    loss_of = peer.ClipLoss()
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, 224, 224), np.uint8)
    images = torch.from_numpy(images).cuda()
    rows = cpu.random_tokens(cpu.caption_lengths(batch), cpu.CONTEXT["natural"], cpu.VOCAB)
    texts = torch.from_numpy(rows.astype(np.int64)).cuda()
    value = 0.0

    def step() -> None:
        nonlocal value
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(*compiled((images.float() / 255 - 0.5) / 0.25, texts)[:3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.item()

    return measured(step, flags.steps) | {
        "program": "open_clip", "objective": "clip", "batch": batch, "loss": value, "cut": False,
        "memory": torch.cuda.max_memory_allocated(), "devices": f"1 {torch.cuda.get_device_name()}",
    }  # fmt: skip


def torch_has_cuda() -> bool:
    """Return whether open_clip can run here, by a separate process, since torch would keep GPU memory."""
    code = "import open_clip, torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def device_count() -> int:
    """Return the number of JAX's devices, by a separate process, since JAX would keep their memory."""
    code = "import jax; print(jax.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def measure(child: str, flags: argparse.Namespace, batch: int) -> dict[str, Any] | None:
    """Return the row of the first fitting batch, or None if the process failed."""
    arguments = ["--child", child, "--steps", flags.steps]
    arguments += ["--small"] * flags.small + ["--groups"] * flags.groups
    arguments += ["--trace", pathlib.Path(flags.trace) / child] if flags.trace else []
    result: dict[str, Any] | None = {"retry": batch}
    while result and "retry" in result:
        batch = result["retry"]
        print(f"{child}, {batch} pairs ...", file=sys.stderr, flush=True)
        result = result_of("accelerator", *arguments, "--batch", batch)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
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
    """Complete open_clip's row by the FLOPs of our pairs with whole texts, and the peak of one of our devices."""
    flops = ours["whole"] / ours["batch"] * peer["batch"]
    return peer | {"flops": flops, "peak": ours["peak"] / ours["device_count"]}


def texts(row: dict[str, Any]) -> str:
    """Say whether a program computed its texts in groups."""
    if row["program"] != "xclip_jax":
        return "its texts are whole"
    return "texts in groups of their lengths" if row["cut"] else "texts are whole, since this batch fits no groups"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", default="clip,xclip", help="joined by commas")
    parser.add_argument("--batch", type=int, default=0, help="global batch of the first attempt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", action="store_true", help="texts in groups of their lengths, data.length_groups")
    parser.add_argument("--trace", default="", help="folder for traces of three steps")
    parser.add_argument("--small", action="store_true", help="tiny towers and a tiny batch: a test of this script")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        with contextlib.redirect_stdout(sys.stderr):  # output of libraries
            result = attempt(flags)
        print(json.dumps(result))
        return
    batch = flags.batch or (16 if flags.small else LARGEST * device_count())
    measured_rows = [measure(objective, flags, batch) for objective in flags.objectives.split(",")]
    rows = [row for row in measured_rows if row]
    clip = next((row for row in rows if row["objective"] == "clip"), None)
    if clip and not flags.small and torch_has_cuda():
        peer = measure("open_clip", flags, clip["batch"] // clip["device_count"])
        rows += [of_one_device(clip, peer)] if peer else []
    if not rows:
        raise SystemExit(1)
    from xclip_jax.core import environment

    facts = environment.capture()
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("jax", "flax"))
    print(f"ViT-{'tiny' if flags.small else PRESET}, bf16, commit {facts['commit']}, {versions}\n")
    print(table(rows))
    if flags.groups:
        print("\n" + "\n".join(f"{row['program']}, {row['objective']}: {texts(row)}." for row in rows))


if __name__ == "__main__":
    main()
