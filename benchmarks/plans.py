"""Plans of full-size runs, and how they scale: writes docs/plans.md, docs/plans.json and docs/weak_scaling.png.

    pip install '.[tpu,bench]' && JAX_PLATFORMS=cpu python -m benchmarks.plans

About 28 compilations of a minute or two each; no TPU is used. Each is kept in docs/plans.json at once, and is not made
again from the same sources, recipes and versions of packages.
"""

import datetime
import hashlib
import json
import pathlib
import sys

from absl import logging

from xclip_jax import environment, plan
from xclip_jax.config import load as config_file

DOCS = pathlib.Path(__file__).parents[1] / "docs"
ZERO1 = {"mesh.strategy": "zero1"}
# Recipe and argument, topology, changes.
PLANS = [
    ("clip:preset=B/16,batch=4096", "v4:2x4x4", {}),
    ("xclip:preset=B/16,batch=4096", "v4:2x4x4", {}),
    ("clip:preset=B/16,batch=4096", "v5e:4x8", {}),
    ("xclip:preset=B/16,batch=4096", "v5e:4x8", {}),
    ("clip:preset=B/16,batch=4096", "v5e:4x8", ZERO1),
    ("xclip:preset=B/16,batch=4096", "v5e:4x8", ZERO1),
    # The smallest slices that hold these recipes as they are: half of each is tried below.
    ("clip:preset=B/16,batch=32768", "v5e:8x16", ZERO1),
    ("xclip:preset=B/16,batch=32768", "v5e:8x16", ZERO1),
    ("clip:preset=L/14,batch=32768", "v5p:4x4x4", ZERO1),
    ("xclip:preset=L/14,batch=32768", "v5p:4x4x4", ZERO1),
]
HALVES = [
    ("clip:preset=B/16,batch=32768", "v5e:8x8", ZERO1),
    ("clip:preset=L/14,batch=32768", "v5p:2x4x4", ZERO1),
]
# Weak scaling of xCLIP, ViT-B/16: 32 pairs a chip, from 8 chips to 1024.
GRIDS = {8: "v4:2x2x2", 64: "v4:4x4x4", 256: "v4:4x8x8", 1024: "v4:8x8x16"}
PER_CHIP = 32
FORMS = {
    "dp": {},
    "dp, ring loss": {"loss.impl": "ring"},
    "zero1": ZERO1,
    "fsdp over 8": {"mesh.strategy": "fsdp", "mesh.fsdp": 8},
}


class Planner:
    """Plans, each kept in a file as soon as it is made."""

    def __init__(self, path):
        self.path, self.environment = path, environment.capture() | {"command": "python -m benchmarks.plans"}
        folders = (pathlib.Path(plan.__file__).parent, DOCS.parent / "configs")
        sources = b"".join(file.read_bytes() for folder in folders for file in sorted(folder.rglob("*.py")))
        # The file of plans itself makes a checkout dirty: this says what was compiled.
        commit = self.environment["commit"].removesuffix("-dirty")
        self.environment |= {"commit": commit, "sources": hashlib.sha256(sources).hexdigest()}
        self.environment["versions"] |= {"libtpu": environment._version("libtpu")}  # the compiler
        saved = json.loads(path.read_text()) if path.exists() else {}
        # Versions too: docs/plans.md names those of this process.
        same = all(saved.get("environment", {}).get(key) == self.environment[key] for key in ("sources", "versions"))
        self.known = saved["plans"] if same else {}

    def __call__(self, spec, topology, **changes):
        key = " ".join([spec, topology, *(f"{name}={value}" for name, value in changes.items())])
        if key not in self.known:
            print(f"{key} ...", file=sys.stderr, flush=True)
            config = config_file.load_config(spec)
            config.update_from_flattened_dict(changes)
            self.known[key] = plan.plan(config, topology, look=False)
            self.path.write_text(json.dumps({"environment": self.environment, "plans": self.known}, indent=1) + "\n")
        return self.known[key]


def short(planned):
    """One row of the table."""
    gib = plan.GIB
    if not planned["fits"]:
        return ["-", "-", "-", f"does not fit {planned['capacity'] / gib:.0f}", "-"]
    memory, sent = planned["memory"], sum(planned["sent"].values())
    return [
        f"{memory['parameters'] / gib:.2f}",
        f"{memory['optimizer'] / gib:.2f}",
        f"{memory['activations'] / gib:.2f}",
        f"{memory['peak'] / gib:.2f} of {planned['capacity'] / gib:.0f}",
        f"{sent / 2**20:,.0f}",
    ]


def flags_of(changes):
    return "".join(f" --config.{key}={value}" for key, value in changes.items())


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def draw(rows, path):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for form in FORMS:
        mine = [row for name, row in rows if name == form and row["fits"]]
        chips = [row["chips"] for row in mine]
        left.plot(chips, [row["memory"]["peak"] / plan.GIB for row in mine], marker="o", label=form)
        right.plot(chips, [sum(row["sent"].values()) / 2**20 for row in mine], marker="o", label=form)
    for axis, title in ((left, "peak memory a chip, GiB"), (right, "payload of collectives a step, MiB")):
        axis.set(title=title, xlabel="chips", xscale="log", xticks=list(GRIDS), ylim=(0, None))
        axis.set_xticklabels(map(str, GRIDS))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    logging.set_verbosity(logging.ERROR)
    DOCS.mkdir(exist_ok=True)
    make = Planner(DOCS / "plans.json")
    environment = make.environment
    plans = [(spec, topology, changes, make(spec, topology, **changes)) for spec, topology, changes in PLANS]
    halves = [(spec, topology, changes, make(spec, topology, **changes)) for spec, topology, changes in HALVES]
    scaling = [
        (form, make(f"xclip:preset=B/16,batch={PER_CHIP * chips}", grid, **changes))
        for form, changes in FORMS.items()
        for chips, grid in GRIDS.items()
    ]
    draw(scaling, DOCS / "weak_scaling.png")
    parts = [
        "# Plans\n\nWhat full-size runs need: their train steps compiled for TPU topologies, without a TPU. Made by",
        "`JAX_PLATFORMS=cpu python -m benchmarks.plans` on "
        f"{datetime.date.today()}, commit {environment['commit']}, jax {environment['versions']['jax']}.",
        "Bytes are of one chip; times assume an MFU of 40 %, which is a guess: no run of this size has been made.",
        "MiB sent are payloads: the array that a group of chips sums or gathers, counted once.\n",
        table(
            [
                "config",
                "TPU",
                "strategy",
                "chips",
                "parameters, GiB",
                "optimizer",
                "activations",
                "peak",
                "sent, MiB a step",
                "GFLOP a pair",
                "pairs/s",
                "images/s a host",
                "chip-hours",
                "days",
            ],
            [
                [
                    f"`{spec}`",
                    topology,
                    f["strategy"],
                    f["chips"],
                    *short(f),
                    f"{f['flops_per_pair'] / 1e9:.1f}",
                    f"{f['pairs_per_second']:,.0f}",
                    f"{f['images_per_second_per_host']:,.0f}",
                    f"{f['chip_hours']:,.0f}",
                    f"{f['days']:.2f}",
                ]
                for spec, topology, _, f in [*plans, *halves]
            ],
        ),
        "\n## Each in full\n",
        *(
            f"`xclip-jax plan --config {spec} --topology {topology}{flags_of(changes)}`\n\n"
            f"```\n{plan.render(planned)}\n```\n"
            for spec, topology, changes, planned in plans
        ),
        f"## Weak scaling\n\nxCLIP, ViT-B/16, {PER_CHIP} pairs a chip on v4. Two things must grow with the batch b: "
        "the logits of the plain contrastive loss, (b / chips) x b, and the gathered embeddings, b x e. The ring keeps "
        "no logits of other chips; zero1 splits the moments over all chips, fsdp the kernels over 8. An array that the "
        "chips do not divide is not split by zero1: at 1,024 chips the token table and the attention kernels.\n\n"
        "![weak scaling](weak_scaling.png)\n",
        table(
            ["form", "chips", "batch", "parameters, GiB", "optimizer", "activations", "peak", "sent, MiB a step"],
            [[form, f["chips"], f["batch"], *short(f)] for form, f in scaling],
        ),
    ]
    (DOCS / "plans.md").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
