"""A study small enough for tests: two arms, two seeds, one recipe to tune, seconds a run."""

import dataclasses
import os

from studies.declaration import Arm, Claim, ClaimPart, DoseResponse, Measure, Study
from studies.matrix import Matrix
from tests.helpers import tiny
from tests.studies.greys import TEST_SET, VALIDATION_SET
from xclip_jax.config.load import load_config

PAIRS = "STUDY_PAIRS"  # environment variable: folder of pairs


def load(spec):
    """The recipe "tiny:objective=NAME", else those of the package."""
    name, _, argument = spec.partition(":objective=")
    if name != "tiny":
        return load_config(spec)
    pairs = f"folder:{os.environ.get(PAIRS, 'pairs')}"
    return tiny.config(argument, steps=4, data__sources=(pairs,)).lock()


def study(*, steps=4, tuned=True, **fields):
    lrs = (1e-3, 2e-3) if tuned else ()
    tuning = [
        Arm(f"tuning_{lr:g}", f"lr {lr:g}", "tuning", "tiny:objective=clip", {"optim.lr": lr}, (9,), objective="clip")
        for lr in lrs
    ]
    own = {"tuned": "clip" if tuned else ""}
    declared = {
        "title": "A tiny study",
        "about": ("Nothing is learned from this.",),
        "arms": (
            *tuning,
            Arm("clip", "CLIP", "core", "tiny:objective=clip", {}, (0, 1), **own),
            Arm("xclip", "xCLIP", "core", "tiny:objective=xclip", {}, (0, 1), **own),
            Arm("clip_again", "CLIP, all data", "dose", "tiny:objective=clip", {"data.subset": 1.0}, (0, 1), **own),
        ),
        "changes": {"steps": steps, "optim.warmup": 1},
        "validation": (VALIDATION_SET,),
        "tests": (TEST_SET,),
        "choose": Measure("choose", "validation top-1", VALIDATION_SET),
        "measures": (Measure("top1", "top-1", TEST_SET), Measure("loss", "loss", "", "loss", higher=False, ratio=True)),
        "claims": (Claim("xCLIP is better.", (ClaimPart("top-1 is higher", "xclip", "clip", "top1"),)),),
        "baseline": "clip",
        "choices": {"any": ("clip", "xclip")},
        "common": {"CLIP": "clip"},
        "controls": (("any", "clip", "nothing"),),
        "doses": (
            DoseResponse(
                "data",
                "Data",
                "share",
                ("0.5", "1"),
                {"CLIP": ("clip", "clip_again"), "xCLIP": ("xclip", "xclip")},
                ("top1", "loss"),
            ),
        ),
        "shown": (("any",), ("top1",)),
        "weights": {"1": "xclip"},
        "factors": (),
        "threats": ("It is tiny.",),
    }
    return Study(**declared | fields)


def matrix(**fields):
    return Matrix(study(**fields), load)


def four_seeds(*more, **fields):
    """A matrix of the study whose arms, and `more`, have the seeds 0 to 3."""
    arms = (*study(tuned=False).arms, *more)
    return matrix(tuned=False, arms=tuple(dataclasses.replace(arm, seeds=(0, 1, 2, 3)) for arm in arms), **fields)


def over_seeds(*values):
    return dict(enumerate(values))
