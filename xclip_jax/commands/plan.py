"""Plan the memory, time and traffic of a run on TPUs ahead of time: xclip-jax plan --config FILE.py --topology v5e:4x8.

Compiles the train step for a topology without hardware, and prints whether it fits, the time of the run, and
the bytes sent by the chips. Times are a model based on the TPU compiler's estimates, not a measurement. Needs the
package libtpu (pip install 'xclip_jax[tpu]') and no TPU. With --fit it compiles several steps, and prints the command
of the cheapest one that fits.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags

from xclip_jax.config import load as config_file
from xclip_jax.core.console import format_bytes, log0
from xclip_jax.core.errors import UserError, exit_with_message
from xclip_jax.core.outputs import check_file
from xclip_jax.core.storage import write_whole
from xclip_jax.train import cost
from xclip_jax.train.cost.hlo import collectives, summary
from xclip_jax.train.cost.roofline import devices_of, roofline

_TOPOLOGY = flags.DEFINE_string("topology", "", "CHIP:GRID, for example v5e:4x8 or v4:2x4x4.")
_HLO = flags.DEFINE_string("hlo", "", "Output file for the optimised program.")
_FIT = flags.DEFINE_bool("fit", False, "Find the largest batch, and the cheapest step with this one, that fit.")
flags.declare_key_flag("trust")  # for --help
MOST = 64  # largest batch of `fit` over the config's


def plan(config: ml_collections.ConfigDict, topology: str, *, hlo: str = "") -> dict[str, Any]:
    """Return all facts for `render` as plain numbers and strings; bytes on one device.

    The optimised program is written to the file `hlo`. For `topology` see `devices_of`; `UserError` for an unknown one,
    and for a config that cannot be built.
    """
    file = check_file("--hlo", hlo, rb"^HloModule ") if hlo else None  # compilation takes minutes
    devices, chip = devices_of(topology)
    began = time.perf_counter()
    experiment, compiled, trouble = cost.compile_config(config, devices, chip.memory)
    work = cost.step_flops(experiment.config, rows=experiment.text_rows[0])
    facts: dict[str, Any] = {
        "topology": topology,
        "chips": len(devices) // chip.devices,
        "devices": len(devices),
        "hosts": len({d.process_index for d in devices}),
        "objective": config.objective.name,
        "strategy": config.mesh.strategy,
        "mesh": dict(experiment.mesh.shape),
        "batch": config.data.batch,
        "steps": config.steps,
        "model_parameters": experiment.num_parameters,
        "fits": compiled is not None,
        "trouble": trouble,
        "remedies": [],
        "compile_seconds": time.perf_counter() - began,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "capacity": chip.memory,
        "flops_per_step": work,
        "peak_ms": 1e3 * work / (chip.peak * len(devices)) if work else None,
    }
    if compiled is None:
        return facts | {"remedies": cost.remedies(experiment)}
    program = compiled.as_text()
    if file:
        write_whole(file, program)
    times = dataclasses.asdict(roofline(program, topology, len(devices)))
    step_ms = times["step_ms"]
    pairs_per_second = 1e3 * config.data.batch / step_ms
    days = config.steps * step_ms / 86.4e6
    return facts | {
        "memory": cost.memory_usage(experiment, compiled),
        "sent": summary(collectives(program, len(devices))),
        "roofline": times,
        "flops_per_pair": work / config.data.batch if work else None,
        "step_ms": step_ms,
        "mfu": facts["peak_ms"] / step_ms if work else None,
        "pairs_per_second": pairs_per_second,
        "images_per_second_per_host": pairs_per_second / facts["hosts"],
        "days": days,
        "chip_hours": 24 * days * facts["chips"],
    }


def fit(config: ml_collections.ConfigDict, topology: str) -> tuple[int, list[str]]:
    """Find by trials the largest batch that fits at once, and the cheapest step with the config's batch that fits.

    Microbatches compute features twice, remat=full whole blocks, and remat=dots a few elementwise operations.

    Returns:
      The largest batch, the config's times a power of two, with remat=dots; 0 if none fits. Flags of the step.
    """
    devices, chip = devices_of(topology)
    batch = config.data.batch
    towers = [name for name in ("img", "txt") if name not in config.model.plugins]  # custom towers may lack remat

    def flags_of(microbatches: int, remat: str) -> list[str]:
        return [f"--config.optim.microbatches={microbatches}", *(f"--config.model.{t}.remat={remat}" for t in towers)]

    def fits(size: int, microbatches: int, remat: str) -> bool:
        trial = config.copy_and_resolve_references()
        trial.data.batch = size
        trial.optim.microbatches = microbatches
        for name in towers:
            trial.model[name].remat = remat
        _, compiled, trouble = cost.compile_config(trial, devices, chip.memory)
        verdict = "fits" if compiled is not None else f"does not fit, {trouble}"
        log0(f"{size:,} pairs, {microbatches} microbatches, remat={remat}: {verdict}")
        return compiled is not None

    largest = batch
    if fits(batch, 1, "dots"):
        while largest < MOST * batch and fits(2 * largest, 1, "dots"):
            largest *= 2
        return largest, flags_of(1, "none" if fits(batch, 1, "none") else "dots")
    sizes = (batch >> i for i in range(1, batch.bit_length()))
    possible = itertools.takewhile(lambda size: size % len(devices) == 0 and batch % size == 0, sizes)
    largest = next((size for size in possible if fits(size, 1, "dots")), 0)
    if fits(batch, 1, "full"):
        return largest, flags_of(1, "full")
    parts = batch // (largest or len(devices))
    while batch % (parts * len(devices)) == 0:
        for remat in ("none", "dots", "full"):
            if fits(batch, parts, remat):
                return largest, flags_of(parts, remat)
        parts *= 2
    return largest, []


def train_command(arguments: Sequence[str], changes: Sequence[str]) -> str:
    """Return the command that trains with `changes` to the `arguments` of a plan."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("topology", "hlo", "fit"):
        parser.add_argument(f"-{name}", f"--{name}", nargs="?")
    # Alone, --fit has no value, but argparse would take the next word.
    _, others = parser.parse_known_args([word for word in arguments if word not in ("-fit", "--fit")])
    return shlex.join(["xclip-jax", "train", *others, *changes])


def render(facts: dict[str, Any]) -> str:
    """Return the plan as text."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in facts["mesh"].items())
    per_chip = facts["devices"] // facts["chips"]
    device = "device" if per_chip > 1 else "chip"
    devices = f" with {per_chip} devices each" if per_chip > 1 else ""
    lines = [
        f"{facts['objective']}, {facts['model_parameters'] / 1e6:.1f} M parameters, batch {facts['batch']:,}, "
        f"on {facts['topology']}: {facts['chips']} chips{devices}, {facts['hosts']} hosts",
        f"mesh {mesh}, strategy {facts['strategy']}; compiled in {facts['compile_seconds']:.0f} s",
        "",
    ]
    capacity = format_bytes(facts["capacity"])
    if not facts["fits"]:
        lines += [f"DOES NOT FIT in a {device}'s {capacity}: {facts['trouble']}"]
        lines += [f"to need less, add one after the other: {', '.join(facts['remedies'])}"]
        return "\n".join(lines)
    sizes = facts["memory"]
    held = ", ".join(f"{name} {format_bytes(n)}" for name, n in sizes.items() if n and name != "peak")
    mfu = f", an MFU of {facts['mfu']:.0%}" if facts["mfu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    times = facts["roofline"]
    lines += [
        f"fits: {format_bytes(sizes['peak'])} of a {device}'s {capacity} ({held})",
        f"a step takes {facts['step_ms']:,.1f} ms{mfu}, by the compiler's estimates ({versions}), a model and not a "
        "measurement",
        f"collectives take {times['exposed_ms']:,.1f} ms, and {times['hidden_ms']:,.1f} ms more behind operations",
        f"{facts['pairs_per_second']:,.0f} pairs/s; each host decodes {facts['images_per_second_per_host']:,.0f} "
        "images/s",
        f"{facts['steps']:,} steps take {facts['days']:.2f} days, {facts['chip_hours']:,.0f} chip-hours",
    ]
    if facts["peak_ms"]:
        lines.append(
            f"{facts['flops_per_pair'] / 1e9:.1f} GFLOP per pair, "
            f"{facts['flops_per_step'] / 1e12:,.0f} TFLOP per step: {facts['peak_ms']:.1f} ms at the chips' peak"
        )
    lines += ["", "sent in a step, payload:"]
    lines += [f"{kind:<22}{format_bytes(n):>12}" for kind, n in facts["sent"].items()]
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Run the command."""
    config = flags.FLAGS.config
    with exit_with_message():
        if not _TOPOLOGY.value:
            raise UserError("--topology is missing; name one such as v5e:4x8, v6e:4x4, v5p:4x4x8 or tpu7x:2x2x2")
        if not _FIT.value:
            print(render(plan(config, _TOPOLOGY.value, hlo=_HLO.value)))
            return
        largest, changes = fit(config, _TOPOLOGY.value)
        text = f"the largest batch at once has {largest:,} pairs, with remat=dots"
        print(text if largest else "no batch fits at once")
        if not changes:
            raise UserError(f"no step of {config.data.batch:,} pairs fits {_TOPOLOGY.value}; split parameters by fsdp")
        print(train_command(sys.argv[1:], changes))


if __name__ == "__main__":
    # Planning must not wait for an accelerator. jax read the variable at import.
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    app.run(main, flags_parser=config_file.parse)
