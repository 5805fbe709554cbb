"""Plans of full-size runs, strategies side by side, and how they scale: writes docs/plans.md, .json and a chart.

    pip install '.[tpu,bench]' && JAX_PLATFORMS=cpu python -m benchmarks.plans [v5e:4x8 strategy=zero1 ...]

Words select the cases that have them all in their line, such as `preset=B/16,batch=4096 v5e:4x8
mesh.strategy=zero1`; without any, all are compiled, 30 of a few minutes each and 16 short ones. Each is kept in
docs/plans.json at once, and is not made again from the same sources, recipes and versions of packages; the page has
those that are there, with their commits. No TPU is used.
"""

import hashlib
import importlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import ml_collections
from absl import logging

from benchmarks import roofline
from xclip_jax.commands import plan
from xclip_jax.config import load as config_file
from xclip_jax.core import environment
from xclip_jax.parallel.topology import GIB

DOCS = pathlib.Path(__file__).parents[1] / "docs"
MIB = 2**20
Changes = dict[str, Any]
Case = tuple[str, str, Changes]  # recipe with its arguments, topology, changes
# Texts are whole: a step that may cut them holds both programs, takes twice as long to compile, and is timed as whole.
WHOLE: Changes = {"data.length_groups": "full"}
FSDP: Changes = WHOLE | {"mesh.strategy": "fsdp", "mesh.fsdp": 8}
STRATEGIES: dict[str, Changes] = {"dp": WHOLE, "zero1": WHOLE | {"mesh.strategy": "zero1"}, "fsdp over 8": FSDP}
OBJECTIVES = ("clip", "xclip")
RUNS = (
    ("preset=B/16,batch=4096", "v5e:4x8"),
    ("preset=B/16,batch=4096", "v5e:4x4"),  # of the JobSet
    ("preset=B/16,batch=4096", "v6e:4x8"),
    ("preset=B/16,batch=32768", "v5e:8x16"),
    ("preset=L/14,batch=32768", "v5p:4x4x4"),
)
# Weak scaling: pairs a chip, chips, and forms of xCLIP with two blocks in each tower.
PER_CHIP = 32
GRIDS = {8: "v4:2x2x2", 64: "v4:4x4x4", 256: "v4:4x8x8", 1024: "v4:8x8x16"}
SHALLOW: Changes = {"model.img.depth": 2, "model.txt.depth": 2}
FORMS = {"dp": WHOLE, "dp, ring loss": WHOLE | {"loss.impl": "ring"}} | {
    name: STRATEGIES[name] for name in ("zero1", "fsdp over 8")
}


def line(case: Case) -> str:
    """A case as one line."""
    spec, topology, changes = case
    return " ".join([spec, topology, *(f"{name}={value}" for name, value in changes.items())])


def planned(config: ml_collections.ConfigDict, topology: str) -> dict[str, Any]:
    """Facts of a plan, with the parts of its step and the floor of its memory traffic."""
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "step.hlo"
        facts = plan.plan(config, topology, hlo=str(program))
        if facts["fits"]:
            rows = roofline.parts(program.read_text(), topology, facts["devices"])
            facts["roofline"] |= {"parts": rows, "hbm_ms": sum(row["hbm_ms"] for row in rows)}
    return facts


class Planner:
    """Plans, each kept in a file as soon as it is made."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.environment = path, environment.capture() | {"command": "python -m benchmarks.plans"}
        folders = (pathlib.Path(plan.__file__).parents[1], DOCS.parent / "configs")
        sources = b"".join(file.read_bytes() for folder in folders for file in sorted(folder.rglob("*.py")))
        # The file of plans itself makes a checkout dirty: this says what was compiled.
        commit = self.environment["commit"].removesuffix("-dirty")
        self.environment |= {"commit": commit, "sources": hashlib.sha256(sources).hexdigest()}
        self.environment["versions"] |= {"libtpu": environment._version("libtpu")}  # the compiler
        self.known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, case: Case) -> None:
        """Make the plan of a case, unless the same sources and packages have made it."""
        name, by = line(case), ("sources", "versions")
        made = self.known.get(name, {}).get("environment", {})
        if all(made.get(key) == self.environment[key] for key in by):
            return
        print(f"{name} ...", file=sys.stderr, flush=True)
        spec, topology, changes = case
        config = config_file.load_config(spec)
        config.update_from_flattened_dict(changes)
        self.known[name] = planned(config, topology) | {"environment": self.environment}
        self.path.write_text(json.dumps(self.known, indent=1) + "\n")

    def rows(self, cases: dict[tuple[Any, ...], Case]) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Known plans, by the keys of their cases."""
        return {key: self.known[line(case)] for key, case in cases.items() if line(case) in self.known}


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def memory(planned: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a plan: what a chip holds, and what it sends."""
    if not planned["fits"]:
        return ("does not fit", "")
    return (f"{planned['memory']['peak'] / GIB:.2f}", f"{sum(planned['sent'].values()) / MIB:,.0f}")


def times(planned: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a plan: the roofline, and what follows from it."""
    if not planned["fits"]:
        return (*("",) * 7, planned["environment"]["commit"][:7])
    account = planned["roofline"]
    return (
        *(f"{account[key]:.1f}" for key in ("ms", "exposed_ms", "hbm_ms")),
        f"{planned['mfu']:.0%}",
        f"{planned['pairs_per_second']:,.0f}",
        f"{planned['images_per_second_per_host']:,.0f}",
        f"{planned['chip_hours']:,.0f}",
        planned["environment"]["commit"][:7],
    )


def side_by_side(make: Planner, run: tuple[str, str]) -> str:
    """A section: the strategies of a run."""
    rows = make.rows(cases_of(run))
    if not rows:
        return ""
    some, (arguments, topology) = next(iter(rows.values())), run
    head = ("objective", "strategy", f"peak, GiB of {some['capacity'] / GIB:.0f}", "sent, MiB", "ms", "exposed")
    peak = min(row["peak_ms"] for row in rows.values())
    return (
        f"## {arguments} on {topology}\n\n{some['chips']} chips, {some['hosts']} hosts, {some['steps']:,} steps. "
        f"At the chips' peak the model's FLOPs take {peak:.1f} ms.\n\n"
        + table(
            (*head, "HBM floor", "MFU", "pairs/s", "images/s a host", "chip-hours", "commit"),
            [(*key, *memory(planned), *times(planned)) for key, planned in rows.items()],
        )
        + "\n"
    )


def cases_of(run: tuple[str, str]) -> dict[tuple[Any, ...], Case]:
    """Cases of a run, by objective and strategy."""
    arguments, topology = run
    return {
        (objective, strategy): (f"pretrain:objective={objective},{arguments}", topology, changes)
        for objective in OBJECTIVES
        for strategy, changes in STRATEGIES.items()
    }


def scaling_cases() -> dict[tuple[Any, ...], Case]:
    """Cases of weak scaling, by form and chips."""
    return {
        (form, chips): (f"pretrain:objective=xclip,preset=B/16,batch={PER_CHIP * chips}", grid, SHALLOW | changes)
        for form, changes in FORMS.items()
        for chips, grid in GRIDS.items()
    }


def scaling(make: Planner) -> str:
    """The section on weak scaling, with its chart."""
    rows = make.rows(scaling_cases())
    if not rows:
        return ""
    draw(rows, DOCS / "weak_scaling.png")
    return (
        f"## Weak scaling\n\nxCLIP, ViT-B/16 with two blocks in each tower, {PER_CHIP} pairs a chip on v4. Two things "
        "must grow with the batch b: the logits of the plain contrastive loss, (b / chips) x b, and the gathered "
        "embeddings, b x e. The ring keeps no logits of other chips; zero1 splits the moments over all chips, fsdp the "
        "kernels over 8. An array that the chips do not divide is not split by zero1.\n\n"
        "![weak scaling](weak_scaling.png)\n\n"
        + table(
            ("form", "chips", "peak, GiB", "sent, MiB a step", "commit"),
            [
                (form, chips, *memory(planned), planned["environment"]["commit"][:7])
                for (form, chips), planned in rows.items()
            ],
        )
    )


def draw(rows: dict[tuple[Any, ...], dict[str, Any]], path: pathlib.Path) -> None:
    """Chart of peak memory and traffic by chips."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for form in FORMS:
        mine = [row for (name, _), row in rows.items() if name == form and row["fits"]]
        chips = [row["chips"] for row in mine]
        left.plot(chips, [row["memory"]["peak"] / GIB for row in mine], marker="o", label=form)
        right.plot(chips, [sum(row["sent"].values()) / MIB for row in mine], marker="o", label=form)
    for axis, title in ((left, "peak memory a chip, GiB"), (right, "payload of collectives a step, MiB")):
        axis.set(title=title, xlabel="chips", xscale="log", xticks=list(GRIDS), ylim=(0, None))
        axis.set_xticklabels(map(str, GRIDS))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)


def page(make: Planner) -> str:
    """The page of the plans that are known."""
    versions = make.environment["versions"]
    head = f"""# What full-size runs need and cost

What full-size runs need: their train steps compiled for TPU topologies, without a TPU. Made by
`JAX_PLATFORMS=cpu python -m benchmarks.plans` with jax {versions["jax"]} and libtpu {versions["libtpu"]}.
One of them in full:
`xclip-jax plan --config pretrain:objective=clip --topology v5e:4x8 --config.data.length_groups=full`.

**Times are the TPU compiler's estimates, a model and not a measurement**: no run of this size has been made. "ms" is
the cycles of all operations, one after the other, and "exposed" what collectives take beyond what operations hide; a
step is their sum, and the MFU follows from it. "HBM floor" is what the operations' bytes take at the bandwidth of the
memory, in ms. [Plans on pods](pods.md#plans) has more. "Sent" is payload: the array that a group of chips sums or
gathers, counted once.
"""
    return "\n".join([head, *filter(None, (side_by_side(make, run) for run in RUNS)), scaling(make)])


def main(words: list[str]) -> None:
    """Make the plans that have all `words`, and write the page."""
    logging.set_verbosity(logging.ERROR)
    make, scaled = Planner(DOCS / "plans.json"), scaling_cases().values()
    cases = [case for group in (*(cases_of(run).values() for run in RUNS), scaled) for case in group]
    chosen = [case for case in cases if all(word in line(case) for word in words)]
    if any(case in scaled for case in chosen):
        importlib.import_module("matplotlib")  # of the chart: where it is missing, before the compilations
    for case in chosen:
        make(case)
    (DOCS / "plans.md").write_text(page(make).rstrip() + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
