"""Plan the memory, time and traffic of a run on TPUs ahead of time: xclip-jax plan --config FILE.py --topology v5e:4x8.

Compiles the train step for a topology without hardware, and prints whether it fits, the time and cost of the run, and
the bytes sent by the chips. Times are a model based on the TPU compiler's estimates, not a measurement; `--mfu`
replaces them. Needs the package libtpu (pip install 'xclip_jax[tpu]') and no TPU.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging

from xclip_jax.config import load as config_file
from xclip_jax.core.console import format_bytes
from xclip_jax.core.errors import UserError, check_file, exit_with_message
from xclip_jax.plan.hlo import collectives, summary
from xclip_jax.plan.roofline import devices_of, roofline
from xclip_jax.train import cost
from xclip_jax.train.build import Experiment

_TOPOLOGY = flags.DEFINE_string("topology", "", "CHIP:GRID, for example v5e:4x8 or v4:2x4x4.")
_MFU = flags.DEFINE_float("mfu", None, "Model FLOPs utilisation, if you know it: the share of the chips' peak.")
_PRICE = flags.DEFINE_float("price", 0.0, "Price of a chip-hour, for the cost of the run.", lower_bound=0.0)
_HLO = flags.DEFINE_string("hlo", "", "Output file for the optimised program.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def plan(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    mfu: float | None = None,
    price: float = 0.0,
    hlo: str = "",
) -> dict[str, Any]:
    """Return all facts for `render` as plain numbers and strings; bytes on one device.

    Args:
      config: the config of a run.
      topology: see `devices_of`.
      mfu: share of peak FLOP/s reached by the model's FLOPs; by default the compiler's estimates decide.
      price: per chip-hour.
      hlo: output file for the optimised program.

    Raises:
      UserError: see `devices_of`; a config that cannot be built; an `mfu` outside (0, 1].
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu is {mfu}; expected a share of the chips' peak, above 0 and at most 1, such as 0.4.")
    hlo = os.path.expanduser(hlo)
    if hlo:  # compilation takes minutes
        check_file("--hlo", hlo)
    devices, chip = devices_of(topology)
    began = time.perf_counter()
    experiment, compiled, trouble = cost.compile_config(config, devices)
    facts = {
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
    }
    if compiled is None:
        facts["remedies"] = cost.remedies(experiment.config, experiment.text_rows[0], experiment.mesh.size)
    else:
        program = compiled.as_text()
        if hlo:
            pathlib.Path(hlo).write_text(program)
        sent = summary(collectives(program, len(devices)))
        facts |= {"memory": cost.memory_usage(experiment, compiled), "sent": sent}
        facts["roofline"] = dataclasses.asdict(roofline(program, topology, len(devices)))
    return facts | _time(experiment, facts, mfu, chip.peak * len(devices), price)


def _time(
    experiment: Experiment, facts: dict[str, Any], mfu: float | None, peak: float, price: float
) -> dict[str, Any]:
    """Return time and cost of the run by `mfu` or the roofline, or the reason if they are unknown."""
    config = experiment.config
    work = cost.step_flops(config, rows=experiment.text_rows[0])
    peak_ms = 1e3 * work / peak if work else None
    if mfu and peak_ms:
        step_ms = peak_ms / mfu
    elif "roofline" in facts and not mfu:
        step_ms = facts["roofline"]["step_ms"]
    else:
        reason = "the step does not fit; --mfu gives one" if work else cost.UNCOUNTED
        return {"untimed": reason, "peak_ms": peak_ms}
    pairs_per_second = 1e3 * config.data.batch / step_ms
    days = config.steps * step_ms / 86.4e6
    chip_hours = 24 * days * facts["chips"]
    return {
        "flops_per_step": work,
        "flops_per_pair": work / config.data.batch if work else None,
        "peak_ms": peak_ms,
        "step_ms": step_ms,
        "mfu": peak_ms / step_ms if peak_ms else None,
        "mfu_is_given": mfu is not None,
        "pairs_per_second": pairs_per_second,
        "images_per_second_per_host": pairs_per_second / facts["hosts"],
        "days": days,
        "chip_hours": chip_hours,
        "cost": chip_hours * price,
    }


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
    if facts["fits"]:
        sizes = facts["memory"]
        held = ", ".join(f"{name} {format_bytes(n)}" for name, n in sizes.items() if n and name != "peak")
        lines += [f"fits: {format_bytes(sizes['peak'])} of a {device}'s {capacity} ({held})"]
    else:
        lines += [f"DOES NOT FIT in a {device}'s {capacity}: {facts['trouble']}"]
        lines += [f"to need less, add one after the other: {', '.join(facts['remedies'])}"]
    lines += _render_time(facts)
    if facts["fits"]:
        lines += ["", "sent in a step, payload:"]
        lines += [f"{kind:<22}{format_bytes(n):>12}" for kind, n in facts["sent"].items()]
    return "\n".join(lines)


def _render_time(facts: dict[str, Any]) -> list[str]:
    if "untimed" in facts:
        return [f"no estimate of the time: {facts['untimed']}"]
    mfu = f", an MFU of {facts['mfu']:.0%}" if facts["mfu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    estimates = f"by the compiler's estimates ({versions}), a model and not a measurement"
    source = "as given" if facts["mfu_is_given"] else estimates
    cost = f", which cost {facts['cost']:,.0f}" if facts["cost"] else ""
    images = f"{facts['images_per_second_per_host']:,.0f} images/s"
    lines = [f"a step takes {facts['step_ms']:,.1f} ms{mfu}, {source}"]
    if not facts["mfu_is_given"]:
        times = facts["roofline"]
        hidden = f"{times['hidden_ms']:,.1f} ms more behind operations"
        lines.append(f"collectives take {times['exposed_ms']:,.1f} ms of it, and {hidden}")
    lines += [
        f"{facts['pairs_per_second']:,.0f} pairs/s; each host decodes {images}",
        f"{facts['steps']:,} steps take {facts['days']:.2f} days, {facts['chip_hours']:,.0f} chip-hours{cost}",
    ]
    if facts["peak_ms"]:
        lines.append(
            f"{facts['flops_per_pair'] / 1e9:.1f} GFLOP per pair, "
            f"{facts['flops_per_step'] / 1e12:,.0f} TFLOP per step: {facts['peak_ms']:.1f} ms at the chips' peak"
        )
    return lines


def main(_: list[str]) -> None:
    """Run the command."""
    logging.set_verbosity(logging.ERROR)
    config = flags.FLAGS.config
    with exit_with_message():
        if not _TOPOLOGY.value:
            raise UserError("--topology is missing; name one such as v5e:4x8, v6e:4x4, v5p:4x4x8 or tpu7x:2x2x2")
        options = {"mfu": _MFU.value, "price": _PRICE.value, "hlo": _HLO.value}
        facts = plan(config, _TOPOLOGY.value, **options)
        print(json.dumps(facts, indent=2) if _JSON.value else render(facts))


if __name__ == "__main__":
    # Planning must not wait for an accelerator. jax read the variable at import.
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    app.run(main, flags_parser=config_file.parse)
