"""What a config needs of TPUs, ahead of time: xclip-jax plan --config FILE.py --topology v5e:4x8.

Compiles the train step that a run would use for a topology that need not exist, and prints for each chip what it
holds, whether that fits, and what it sends; with the analytic FLOPs, how long the run takes at a given MFU. Needs the
package libtpu (pip install 'xclip_jax[tpu]') and no TPU. `--explain` prints the sharding of each parameter, and stops.
"""

import dataclasses
import importlib.util
import json
import os
import re
import time
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from jax.experimental import topologies

from xclip_jax import flops
from xclip_jax.config import load as config_file
from xclip_jax.console import format_bytes
from xclip_jax.errors import UserError, check_choice, check_count, exit_with_message
from xclip_jax.parallel.collectives import Collective, collectives, summary
from xclip_jax.train import memory
from xclip_jax.train.build import Experiment, build
from xclip_jax.train.memory import bytes_on_device

_TOPOLOGY = flags.DEFINE_string("topology", "", "CHIP:GRID, as v5e:4x8 or v4:2x4x4; without it, the devices here.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology.")
_MFU = flags.DEFINE_float("mfu", 0.4, "Share of the chips' peak that the model's FLOPs reach.")
_PRICE = flags.DEFINE_float("price", 0.0, "Of a chip-hour, for the cost of the run.", lower_bound=0.0)
_EXPLAIN = flags.DEFINE_bool("explain", False, "Print the sharding of each parameter, and stop.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
_SUGGEST = flags.DEFINE_bool("suggest", True, "Look for the nearest change that fits, where the step does not.")

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU. Source: docs.cloud.google.com/tpu/docs.

    Attributes:
      memory: bytes of a device.
      peak: bf16 FLOP/s of a device.
      options: of its topology.
      devices: that JAX sees in a chip.
    """

    memory: float
    peak: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    devices: int = 1


CHIPS = {
    "v4": Chip(32 * GIB, flops.PEAK["TPU v4"], {"chip_config_name": "megacore"}),  # two cores that are one device
    "v5e": Chip(16 * GIB, flops.PEAK["TPU v5e"]),
    "v5p": Chip(95 * GIB, flops.PEAK["TPU v5p"], {"chip_config_name": "megacore"}),
    "v6e": Chip(32 * GIB, flops.PEAK["TPU v6e"]),
    "tpu7x": Chip(192 * GIB / 2, flops.PEAK["TPU7x"], devices=2),  # two chiplets, each with half of the memory
}


def devices_of(topology: str, slices: int = 1) -> tuple[list[Any], Chip]:
    """Devices of a topology such as "v5e:4x8", none of which need exist, and their kind.

    Raises:
      UserError: an unknown chip, a grid that the chip does not come in, slices below 1, or no libtpu.
    """
    check_count("--slices", slices, 1)
    chip, _, grid = topology.partition(":")
    if not re.fullmatch(r"\d+(x\d+)+", grid):
        raise UserError(f"--topology is {topology!r}; write CHIP:GRID, such as v5e:4x8 for 32 chips of v5e.")
    check_choice("--topology's chip", chip, CHIPS)
    # libtpu looks for a TPU's metadata server, and lets one process of a machine in, unless these variables allow more.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # it says on stderr that it finds none
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning for TPUs needs libtpu: pip install 'xclip_jax[tpu]'")
    options = CHIPS[chip].options | ({"num_slices": slices} if slices > 1 else {})
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices, CHIPS[chip]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--topology={topology!r} is none that {chip} comes in ({reason}).") from error


def explain(experiment: Experiment) -> list[dict[str, Any]]:
    """One row a parameter: name, shape, sharding, bytes on each chip."""
    rows = []
    for path, x in jax.tree_util.tree_leaves_with_path(experiment.abstract.params):
        rows.append(
            {
                "parameter": jax.tree_util.keystr(path, simple=True, separator="/"),
                "shape": list(x.shape),
                "sharding": str(x.sharding.spec).removeprefix("PartitionSpec"),
                "bytes": bytes_on_device(x),
            }
        )
    return rows


def plan(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    slices: int = 1,
    mfu: float = 0.4,
    price: float = 0.0,
    look: bool = True,
) -> dict[str, Any]:
    """Everything that the command prints, as plain numbers and strings; bytes are of one device.

    Args:
      config: of a run.
      topology, slices: see `devices_of`.
      mfu: share of peak FLOP/s that the model's FLOPs are taken to reach.
      price: of a chip-hour.
      look: whether to look for a change that fits, where the step does not; each try is a compilation.

    Raises:
      UserError: as `devices_of`; a config that cannot be built; an `mfu` that is not a share.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu is {mfu}; expected a share of the chips' peak, above 0 and at most 1, such as 0.4.")
    devices, chip = devices_of(topology, slices)
    began = time.perf_counter()
    experiment, compiled, trouble = memory.compile_config(config, devices)
    hosts = len({(getattr(d, "slice_index", 0), d.process_index) for d in devices})
    facts = {
        "topology": topology,
        "slices": slices,
        "chips": len(devices) // chip.devices,
        "devices": len(devices),
        "hosts": hosts,
        "objective": config.objective.name,
        "strategy": config.mesh.strategy,
        "mesh": dict(experiment.mesh.shape),
        "batch": config.data.batch,
        "steps": config.steps,
        "model_parameters": sum(x.size for x in jax.tree.leaves(experiment.abstract.params)),
        "fits": compiled is not None,
        "trouble": trouble,
        "remedy": memory.suggest(config, devices) if compiled is None and look else "",
        **_time(experiment, mfu * chip.peak * len(devices), len(devices) // chip.devices, hosts, price),
        "mfu": mfu,
        "compile_seconds": time.perf_counter() - began,
        "capacity": chip.memory,
    }
    if compiled is not None:
        sent = collectives(compiled.as_text(), len(devices))
        facts |= {"memory": memory.usage(experiment, compiled), "sent": summary(sent), "collectives": _largest(sent)}
    return facts


def _time(experiment: Experiment, per_second: float, chips: int, hosts: int, price: float) -> dict[str, Any]:
    """How long the run takes at `per_second` FLOP/s, and what it costs; or why that is not known."""
    config = experiment.config
    step = flops.train_step(config, rows=experiment.text_rows[0])
    if step is None:
        return {"untimed": flops.uncounted(config)}
    pairs_per_second, seconds = per_second / step * config.data.batch, config.steps * step / per_second
    chip_hours = seconds / 3600 * chips
    return {
        "flops_per_step": step,
        "flops_per_pair": step / config.data.batch,
        "pairs_per_second": pairs_per_second,
        "images_per_second_per_host": pairs_per_second / hosts,
        "chip_hours": chip_hours,
        "cost": chip_hours * price,
        "days": seconds / 86400,
    }


def _largest(sent: list[Collective], n: int = 12) -> list[dict[str, Any]]:
    """The collectives that move most, with their shapes."""
    ordered = sorted(sent, key=lambda each: -each.total)[:n]
    return [
        {
            "kind": x.kind,
            "shapes": list(x.shapes[:3]),
            "arrays": len(x.shapes),
            "group": x.group,
            "count": x.count,
            "bytes": x.total,
        }
        for x in ordered
    ]


def render(facts: dict[str, Any]) -> str:
    """The plan as text."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in facts["mesh"].items())
    slices = f", {facts['slices']} slices" if facts["slices"] > 1 else ""
    device, devices = "chip", ""
    if facts["devices"] > facts["chips"]:
        device, devices = "device", f" with {facts['devices'] // facts['chips']} devices each"
    lines = [
        f"{facts['objective']}, {facts['model_parameters'] / 1e6:.1f} M parameters, batch {facts['batch']:,}, "
        f"on {facts['topology']}{slices}: {facts['chips']} chips{devices}, {facts['hosts']} hosts",
        f"mesh {mesh}, strategy {facts['strategy']}; compiled in {facts['compile_seconds']:.0f} s",
        "",
    ]
    if facts["fits"]:
        lines += [f"{name:<14}{format_bytes(n):>12}" for name, n in facts["memory"].items() if n]
        lines += [f"{'fits in':<14}{format_bytes(facts['capacity']):>12}", "", "sent in a step, payload:"]
        lines += [f"{kind:<22}{format_bytes(n):>12}" for kind, n in facts["sent"].items()]
        for x in facts["collectives"]:
            more = f" and {x['arrays'] - len(x['shapes'])} more" if x["arrays"] > len(x["shapes"]) else ""
            each = f"{x['kind']} {', '.join(x['shapes'])}{more}"
            lines.append(f"  {format_bytes(x['bytes']):>12}  {x['count']:>3} times among {x['group']:>4}: {each}")
    else:
        lines += [f"DOES NOT FIT in a {device}'s {format_bytes(facts['capacity'])}: {facts['trouble']}"]
        lines += [f"it would with {facts['remedy']}" if facts["remedy"] else "no change that was tried makes it fit"]
    if "untimed" in facts:
        return "\n".join([*lines, "", f"no estimate of the time: {facts['untimed']}"])
    lines += [
        "",
        f"{facts['flops_per_pair'] / 1e9:.1f} GFLOP a pair, {facts['flops_per_step'] / 1e12:,.0f} TFLOP a step",
        f"at an MFU of {facts['mfu']:.0%}: {facts['pairs_per_second']:,.0f} pairs/s; each host decodes "
        f"{facts['images_per_second_per_host']:,.0f} images/s",
        f"{facts['steps']:,} steps take {facts['days']:.2f} days, {facts['chip_hours']:,.0f} chip-hours"
        + (f", which cost {facts['cost']:,.0f}" if facts["cost"] else ""),
    ]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["parameter"]) for row in rows)
    lines = [f"{'parameter':<{width}}  {'shape':<20}{'sharding':<28}{'per chip':>12}"]
    lines += [
        f"{row['parameter']:<{width}}  {' x '.join(map(str, row['shape'])):<20}{row['sharding']:<28}"
        f"{format_bytes(row['bytes']):>12}"
        for row in rows
    ]
    return "\n".join([*lines, f"{'sum':<{width}}  {'':<48}{format_bytes(sum(row['bytes'] for row in rows)):>12}"])


def main(_: list[str]) -> None:
    """Prints a plan or an explanation."""
    logging.set_verbosity(logging.ERROR)
    config = flags.FLAGS.config
    with exit_with_message():
        if _EXPLAIN.value:
            devices = devices_of(_TOPOLOGY.value, _SLICES.value)[0] if _TOPOLOGY.value else None
            rows = explain(build(config, devices))
            print(json.dumps(rows, indent=2) if _JSON.value else _table(rows))
            return
        if not _TOPOLOGY.value:
            raise UserError("--topology is missing; name one such as v5e:4x8, v6e:4x4, v5p:4x4x8 or tpu7x:2x2x2")
        facts = plan(
            config, _TOPOLOGY.value, slices=_SLICES.value, mfu=_MFU.value, price=_PRICE.value, look=_SUGGEST.value
        )
        print(json.dumps(facts, indent=2) if _JSON.value else render(facts))


if __name__ == "__main__":
    # Planning needs no accelerator, and must not wait for one. jax read the variable when it was imported.
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    app.run(main, flags_parser=config_file.parse)
