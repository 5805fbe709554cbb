"""The study of the paper's claims at scale: ViT-B/16 on CC12M, batch 4096, SLIP's recipe; see study.md.

    python -m studies --study cc12m --dry-run         the runs
    python -m studies --study cc12m                   all of them, on the chips of this machine
    python -m xclip_jax.main --config studies/cc12m/recipe.py:arm=xclip_30,seed=0 --config.run=gs://bucket/xclip_30-0

The last line is one run of the study, for launch scripts and pods; `python -m studies --study cc12m --collect
gs://bucket/xclip_30-0` records it. An arm that takes over a recipe needs the records of its candidates.

The argument's keys, all optional: root (folder of cc12m/*.tar), arm and seed of the study; or objective (clip, siglip,
nclip, xclip), preset, batch, epochs and pairs, without an arm. No run of this size has been made.
"""

import pathlib

import ml_collections

from xclip_jax.config import recipes
from xclip_jax.config.load import load_config

PAIRS = 12_423_374  # as published; a third of the links are dead
ARGUMENTS = {"root": "/data", "preset": "B/16", "batch": 4096, "epochs": 25, "pairs": PAIRS}
RUNS = str(pathlib.Path(__file__).with_name("runs.jsonl"))


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(arg, objective="clip", arm="", seed=0, runs=RUNS, **ARGUMENTS)
    if args.arm:
        return _run_of_arm(args)
    given = ",".join(f"{key}={args[key]}" for key in ("objective", *ARGUMENTS))
    config = load_config(f"pretrain:data=cc12m,{given}")
    config.run = f"runs/study-{args.objective}"
    # Fits 8 chips of 16 GiB. Runs are recognised by `remat`, not by the mesh, so that it is the same for all.
    config.mesh.strategy = "zero1"
    config.model.img.remat = config.model.txt.remat = "full"
    return config


def _run_of_arm(args: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    from studies import records
    from studies.cc12m.study import RECIPE, study
    from studies.matrix import Matrix, Snapshot

    arguments = ",".join(f"{key}={args[key]}" for key, default in ARGUMENTS.items() if args[key] != default)
    matrix = Matrix(study(f"{RECIPE}:{arguments}" if arguments else RECIPE), load_config)
    config = Snapshot(matrix, records.read_all(pathlib.Path(args.runs))).config_of(args.arm, args.seed)
    config.run = f"runs/{args.arm}-s{args.seed}"
    return config
