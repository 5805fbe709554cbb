"""Plans of full-size runs with each strategy: writes docs/plans.md and docs/plans.json.

    pip install '.[tpu]' && JAX_PLATFORMS=cpu python -m benchmarks.plans [v5e:4x8 strategy=zero1 ...]

Words select the cases whose line contains all of them, such as `preset=B/16,batch=4096 v5e:4x8 mesh.strategy=zero1`;
without any, all are compiled, for a few minutes each. A plan is stored in docs/plans.json at once and not made again
from the same sources, recipes and package versions; the page shows the stored ones with their commits. No TPU is used.
"""

import hashlib
import itertools
import json
import pathlib
import sys
import tempfile
from typing import Any

from absl import logging

from benchmarks import roofline
from xclip_jax.commands import plan
from xclip_jax.config import load as config_file
from xclip_jax.core import environment
from xclip_jax.train.cost.roofline import GIB

DOCS = pathlib.Path(__file__).parents[1] / "docs"
MIB = 2**20
Plan = dict[str, Any]
Case = tuple[str, str, dict[str, Any]]  # recipe with its arguments, topology, changes
# Texts are whole: a step that may cut them holds both programs, takes twice as long to compile, and is timed as whole.
WHOLE = {"data.length_groups": "full"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "dp": WHOLE,
    "zero1": WHOLE | {"mesh.strategy": "zero1"},
    "fsdp over 8": WHOLE | {"mesh.strategy": "fsdp", "mesh.fsdp": 8},
}
RUNS = (
    ("preset=B/16,batch=4096", "v5e:4x8"),
    ("preset=L/14,batch=32768", "v5p:4x4x4"),
)
# Models and topologies of the first table.
MODELS = (("clip", "B/32"), ("clip", "B/16"), ("siglip", "B/16"), ("xclip", "B/16"), ("clip", "L/14"))
TOPOLOGIES = ("v5e:4x8", "v5p:4x4x2", "v6e:4x8", "tpu7x:4x4x2")
PUBLISHED = ("56-67%", "65%", "44-50%", "52-55%")  # see `SIZES`
SIZES = """
## Sizes and chips

A batch of 4,096 on 32 chips with zero1: time of a step, MFU, and HBM floor (-: not compiled). `docs/plans.json` has
the commits.

{table}

*Measured by others*: MFU of language models, whose products are larger:
[MaxText](https://github.com/google/maxtext/blob/main/MaxText/configs/v5e) with 16 to 128 B parameters on 256 v5e, its
Llama 2 70B on v5p, and dense Llama models of [Google's recipes](https://github.com/AI-Hypercomputer/tpu-recipes) on
v6e and TPU7x. We know of no measured MFU of a ViT-B or of CLIP on these chips.
"""
COLUMNS = ("sent, MiB", "ms", "exposed", "HBM floor", "MFU", "pairs/s", "images/s a host", "chip-hours", "commit")
PAGE = """# What full-size runs need and cost

Memory, traffic and time of full-size steps, compiled for TPU topologies without a TPU. **Times are the TPU compiler's
estimates, a model and not a measurement**: no run of this size has been made ([readiness](readiness.md)).

Made by `JAX_PLATFORMS=cpu python -m benchmarks.plans` with jax {jax} and libtpu {libtpu}. One plan in full:

```
xclip-jax plan --config pretrain:objective=clip --topology v5e:4x8 --config.data.length_groups=full
```

| column | meaning |
|---|---|
| peak | memory of the fullest chip |
| sent | bytes summed or gathered by a group of chips, counted once |
| ms | cycles of all operations, one after the other |
| exposed | ms of collectives that no operation hides; a step is ms plus exposed |
| HBM floor | ms to move all operands and results through memory |
| MFU | model FLOPs at the chips' peak over the step's time |

Plan your own size as on [pods](pods.md#plans). The method is in
[notes](performance_notes.md#how-estimates-come-about).
"""


def line(case: Case) -> str:
    """A case as one line."""
    spec, topology, changes = case
    return " ".join([spec, topology, *(f"{name}={value}" for name, value in changes.items())])


def planned(case: Case) -> Plan:
    """Make a plan, with the parts of its step and the floor of its memory traffic."""
    spec, topology, changes = case
    config = config_file.load_config(spec)
    config.update_from_flattened_dict(changes)
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "step.hlo"
        facts = plan.plan(config, topology, hlo=str(program))
        if facts["fits"]:
            rows = roofline.parts(program.read_text(), topology, facts["devices"])
            facts["roofline"] |= {"parts": rows, "hbm_ms": sum(row["hbm_ms"] for row in rows)}
    return facts


class Planner:
    """Plans, each stored in a file as soon as it is made."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.environment = environment.capture() | {"command": "python -m benchmarks.plans"}
        folders = (pathlib.Path(plan.__file__).parents[1], DOCS.parent / "configs")
        sources = b"".join(file.read_bytes() for folder in folders for file in sorted(folder.rglob("*.py")))
        # The file of plans itself makes a checkout dirty; the hash identifies the compiled sources.
        commit = self.environment["commit"].removesuffix("-dirty")
        self.environment |= {"commit": commit, "sources": hashlib.sha256(sources).hexdigest()}
        self.environment["versions"] |= {"libtpu": environment._version("libtpu")}  # the compiler
        self.known: dict[str, Plan] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, case: Case) -> None:
        """Make the plan of a case, unless it was made from the same sources and packages."""
        name = line(case)
        made = self.known.get(name, {}).get("environment", {})
        if all(made.get(key) == self.environment[key] for key in ("sources", "versions")):
            return
        print(f"{name} ...", file=sys.stderr, flush=True)
        self.known[name] = planned(case) | {"environment": self.environment}
        self.path.write_text(json.dumps(self.known, indent=1) + "\n")


def case_of(objective: str, run: tuple[str, str], strategy: str) -> Case:
    """The case of a run with an objective and a strategy."""
    arguments, topology = run
    return f"pretrain:objective={objective},{arguments}", topology, STRATEGIES[strategy]


def sized(objective: str, preset: str, topology: str) -> Case:
    """The case of a cell in the table of sizes."""
    return case_of(objective, (f"preset={preset},batch=4096", topology), "zero1")


def cases_of(run: tuple[str, str]) -> dict[tuple[str, str], Case]:
    """Cases of a run, by objective and strategy."""
    return {key: case_of(key[0], run, key[1]) for key in itertools.product(("clip", "xclip"), STRATEGIES)}


def cells(planned: Plan) -> list[str]:
    """Cells of a plan, from its peak memory on."""
    commit = planned["environment"]["commit"][:7]
    if not planned["fits"]:
        return ["does not fit", *[""] * (len(COLUMNS) - 1), commit]
    return [
        f"{planned['memory']['peak'] / GIB:.2f}",
        f"{sum(planned['sent'].values()) / MIB:,.0f}",
        *(f"{planned['roofline'][key]:.1f}" for key in ("ms", "exposed_ms", "hbm_ms")),
        f"{planned['mfu']:.0%}",
        f"{planned['pairs_per_second']:,.0f}",
        f"{planned['images_per_second_per_host']:,.0f}",
        f"{planned['chip_hours']:,.0f}",
        commit,
    ]


def sizes(known: dict[str, Plan]) -> str:
    """The table of sizes and chips."""
    lines = [f"| | {' | '.join(TOPOLOGIES)} |", f"|---{'|---' * len(TOPOLOGIES)}|"]
    for objective, preset in MODELS:
        row = []
        for topology in TOPOLOGIES:
            plan = known.get(line(sized(objective, preset, topology)))
            if plan is None or not plan["fits"]:
                row.append("-" if plan is None else "does not fit")
                continue
            row.append(f"{plan['step_ms']:.1f} ms, {plan['mfu']:.0%}, {plan['roofline']['hbm_ms']:.1f} ms")
        lines.append(f"| {objective} {preset} | {' | '.join(row)} |")
    lines.append(f"| *measured by others: language models* | {' | '.join(PUBLISHED)} |")
    return SIZES.format(table="\n".join(lines))


def section(known: dict[str, Plan], run: tuple[str, str]) -> str:
    """The section of a run with all strategies, "" without a plan."""
    rows = {key: known[line(case)] for key, case in cases_of(run).items() if line(case) in known}
    if not rows:
        return ""
    some = next(iter(rows.values()))
    peak = min(row["peak_ms"] for row in rows.values())
    head = ("objective", "strategy", f"peak, GiB of {some['capacity'] / GIB:.0f}", *COLUMNS)
    body = "".join(f"| {' | '.join([*key, *cells(row)])} |\n" for key, row in rows.items())
    return (
        f"\n## {run[0]} on {run[1]}\n\n{some['chips']} chips, {some['hosts']} hosts, {some['steps']:,} steps. "
        f"At the chips' peak the model's FLOPs take {peak:.1f} ms.\n\n"
        f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n{body}"
    )


def main(words: list[str]) -> None:
    """Make the plans of all cases with `words`, and write the page."""
    logging.set_verbosity(logging.ERROR)
    planner = Planner(DOCS / "plans.json")
    cases = [sized(*model, topology) for model, topology in itertools.product(MODELS, TOPOLOGIES)]
    for case in (*cases, *(case for run in RUNS for case in cases_of(run).values())):
        if all(word in line(case) for word in words):
            planner(case)
    sections = (section(planner.known, run) for run in RUNS)
    page = PAGE.format(**planner.environment["versions"])
    (DOCS / "plans.md").write_text(page + sizes(planner.known) + "".join(sections))


if __name__ == "__main__":
    main(sys.argv[1:])
