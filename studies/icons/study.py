"""The declared study: the paper's three claims (arXiv 2210.09304) on the icons, with the controls that they need."""

import pathlib
from collections.abc import Iterator
from typing import Any

from studies.arms import (
    AGAINST,
    CONTROLS,
    FLOOR,
    OBJECTIVES,
    OUT_OF_DOMAIN,
    SMOOTHED,
    SMOOTHING,
    XCLIP,
    Arms,
    claims,
    objectives,
    terms,
    title,
)
from studies.declaration import Arm, Claim, ClaimPart, DoseResponse, ExtraComparisons, Measure, Study
from studies.icons import texts

RECIPE = str(pathlib.Path(__file__).with_name("recipe.py"))
STEPS, WARM_UP = 1000, 300
MORE_STEPS = 1.14  # xCLIP's step over CLIP's at these sizes
# Candidates (learning rate, warm-up) of each objective. The second pass is about the best learning rate of the first;
# the third goes on where the best had the longest warm-up, and gives CLIP and SigLIP, which were best at half the rate
# of the others, that rate with longer warm-ups too.
_FIRST_PASS = tuple((lr, WARM_UP) for lr in (5e-4, 1e-3, 2e-3, 4e-3))
_SECOND_PASS = {
    objective: tuple((lr, warmup) for warmup in (150, 450))
    for objective, lr in (("clip", 1e-3), ("siglip", 1e-3), ("nclip", 2e-3), ("xclip", 2e-3))
}
_THIRD_PASS = {
    "clip": ((2e-3, 450), (2e-3, 600)),
    "siglip": ((2e-3, 450), (2e-3, 600)),
    "nclip": ((2e-3, 600),),
    "xclip": ((2e-3, 600),),
}
TUNING_SEEDS = (100,)  # other seeds than the core's, which therefore plays no part in the choice
SEEDS, DOSE_SEEDS, FACTOR_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2), (0, 1)
COMMON = {"optim.lr": 2e-3, "optim.warmup": 600}

VALIDATION = ("icons/validation_concepts", "icons/validation_rendering")
SEARCH = Measure("search", "validation probe", "icons/validation_probe")
SEARCHED = "nclip_probe"  # what the factors are candidates for
SEARCHED_AGAIN = "nclip_probe_again"  # the same of a second search, around the best of the first
SEARCHED_XCLIP = "xclip_probe"  # and of one for xCLIP itself
# What the factors chose, for xCLIP at the weight that the core chose; `nclip_probe` takes it over by itself.
XCLIP_SEARCHED = {**terms(0.5), "objective.nclip.tau": 0.5}
TESTS = (
    "icons/test_concepts",
    "icons/test_rendering",
    "icons/test_probe",
    "icons/test_dense",
    "icons/test_retrieval",
    "icons/test_aliases",
    "icons/test_categories",
    "emoji/test_concepts",
)

MEASURES = (
    Measure(
        "zeroshot", "zero-shot, unseen concepts", "icons/test_concepts", family="zero-shot classification",
        what="drawings of 455 concepts that training lacks, named among the names of these; top-1",
    ),
    Measure(
        "rank", "rank among unseen concepts", "icons/test_concepts", "rank_gmean", higher=False, ratio=True,
        what="rank of the right name of the same drawings; geometric mean",
    ),
    Measure(
        "rendering", "zero-shot, unseen artists", "icons/test_rendering", family=f"{OUT_OF_DOMAIN}: unseen artists",
        what="drawings by artists that training lacks, named among the 8,421 names of training; top-1",
    ),
    Measure(
        "emoji", "zero-shot, emoji", "emoji/test_concepts", family=f"{OUT_OF_DOMAIN}: emoji",
        what="emoji of 200 concepts by three artists, among these by prompts of name and keywords; top-1",
    ),
    Measure(
        "retrieval", "retrieval", "icons/test_retrieval", family="retrieval",
        what="image to text: a caption of a drawing among the 2,206 of all, one drawing of each concept by unseen "
        "artists; recall at 1",
    ),
    Measure(
        "probe", "linear probe", "icons/test_probe", family="visual representation",
        what="logistic regression on features of images before any projection: 100 unseen concepts, learned from some "
        "artists and recognised in drawings by others; top-1",
    ),
    Measure(
        "dense", "patch probe, mIoU", "icons/test_dense",
        what="linear probe of features of patches: which part of each is outside, drawn or enclosed; mean IoU times "
        "100, of which a probe of the patches' pixels has 64.4",
    ),
    Measure(
        "aliases", "alias-to-name retrieval", "icons/test_aliases", family="textual representation: alias to name",
        what="names of unseen concepts, retrieved among all 455 by what else they are called; recall at 1",
    ),
    Measure(
        "text_probe", "text probe", "icons/test_categories", family="textual representation: text probe",
        what="logistic regression on features of names: the category of a concept, 20 ways; top-1, chance is the "
        "largest category",
    ),
)  # fmt: skip
SECONDARY = (
    Measure("knn", "nearest neighbours", "icons/test_probe", "knn/top1"),
    Measure("shot1", "linear probe, 1 shot", "icons/test_probe", "linear/1-shot/top1"),
    Measure("shot4", "linear probe, 4 shots", "icons/test_probe", "linear/4-shot/top1"),
    Measure("top5", "zero-shot, unseen concepts, top-5", "icons/test_concepts", "top5"),
    Measure("to_image", "retrieval, text to image", "icons/test_retrieval", "text_to_image/r1"),
    Measure("enclosed", "patch probe, IoU of enclosed parts", "icons/test_dense", "iou/enclosed"),
)


# Name, title, what changes, an arm's heading, and {level: (changes, length)}. Twice the steps for batches: 500 of 1024
# pairs are beyond the plateau, 250 are not.
_DOSES: tuple[tuple[str, str, str, str, dict[float, tuple[dict[str, Any], float]]], ...] = (
    ("batch", f"Batch, {512 * STEPS:,} pairs seen", "pairs of a batch", "batch {}",
     {b: ({"data.batch": b}, 512 / b) for b in (64, 256, 1024)}),
    ("noise", "Caption noise", "captions exchanged among pairs, %", "{} % noise",
     {n: ({"data.caption_noise": n / 100}, 1.0) for n in (0, 25, 50)}),
    ("data", "Training data, the same steps", "share of pairs", "{} of the data",
     {share: ({"data.subset": float(share)}, 1.0) for share in (0.125, 0.5, 1)}),
    ("steps", "Length of training", "steps", "{} steps", {s: ({}, s / STEPS) for s in (500, 1000, 2000, 4000)}),
)  # fmt: skip


# A control that this study adds, with both things that CLIP gains from, and what all controls show.
LONGER_SMOOTHED = "clip_longer_smoothed"
SHOWS = AGAINST | {LONGER_SMOOTHED: "gain over CLIP with soft targets trained for the same time"}

_NOISE = 25  # the level of noise with controls, %
_LONGEST = 4000  # steps
_DOSE_CONTROLS = {
    "noise": (
        ("xclip_noise25", "clip_noise25_longer", SHOWS["clip_longer"]),
        ("xclip_noise25", "clip_noise25_smoothed", SHOWS["clip_smoothed"]),
        ("xclip_noise25_common", "clip_noise25", "gain with CLIP's learning rate and warm-up"),
    ),
    "steps": ((f"xclip_steps{_LONGEST}", f"clip_steps{_LONGEST}_longer", SHOWS["clip_longer"]),),
}

# The two objectives of doses: title and changes.
_DOSED = {"clip": (title("clip"), {}), "xclip": (f"{title('xclip_50')}, tau 0.5", XCLIP_SEARCHED)}


def _dose_arms(arms: Arms) -> Iterator[Arm]:
    for name, _, _, heading, levels in _DOSES:
        for level, (changes, length) in levels.items():
            for objective, (label, own) in _DOSED.items():
                yield arms.arm(
                    f"{objective}_{name}{level}", f"{label}, {heading.format(level)}", "dose", objective,
                    changes | own, seeds=DOSE_SEEDS, tuned=objective, length=length,
                )  # fmt: skip
    noise = {"data.caption_noise": _NOISE / 100}
    for name, heading, objective, changes, length in (
        ("clip_noise25_longer", f"CLIP, {MORE_STEPS:g} times the steps", "clip", {}, MORE_STEPS),
        ("clip_noise25_smoothed", f"CLIP, label smoothing {SMOOTHING:g}", "clip", SMOOTHED, 1.0),
        ("xclip_noise25_common", f"{_DOSED['xclip'][0]}, CLIP's recipe", "xclip", XCLIP_SEARCHED | COMMON, 1.0),
    ):
        yield arms.arm(
            name, f"{heading}, {_NOISE} % noise", "dose", objective, noise | changes, seeds=DOSE_SEEDS, tuned=objective,
            length=length,
        )  # fmt: skip
    length = MORE_STEPS * _LONGEST / STEPS
    yield arms.arm(
        f"clip_steps{_LONGEST}_longer", f"CLIP, {MORE_STEPS:g} times {_LONGEST} steps", "dose", "clip", {},
        seeds=DOSE_SEEDS, tuned="clip", length=length,
    )  # fmt: skip


def _doses() -> Iterator[DoseResponse]:
    for name, heading, axis, _, levels in _DOSES:
        lines = {label: [f"{objective}_{name}{level}" for level in levels] for objective, (label, _) in _DOSED.items()}
        controls = _DOSE_CONTROLS.get(name, ())
        yield DoseResponse(name, heading, axis, tuple(map(str, levels)), lines, ("zeroshot", "probe"), controls)


def _factors(arms: Arms) -> Iterator[Arm]:
    n, head = "objective.nclip", "model.cluster_head"
    settings: dict[str, dict[str, Any]] = {
        "as_declared": {},
        "target_joint": {f"{n}.target": "joint"},
        "target_ema": {f"{n}.target": "ema"},
        "sharpness_0.5": {f"{n}.sharpness": 0.5},
        "sharpness_0.8": {f"{n}.sharpness": 0.8},
        "smoothness_1": {f"{n}.smoothness": 1.0},
        "smoothness_3": {f"{n}.smoothness": 3.0},
        "balance_center": {f"{n}.balance": "center"},
        "balance_sinkhorn": {f"{n}.balance": "sinkhorn"},
        "k_256": {f"{head}.clusters": 256},
        "k_4096": {f"{head}.clusters": 4096},
        "head_2_layers": {f"{head}.layers": 2},
        "last_batchnorm": {f"{head}.last_norm": True},
        "lr_0.001": {"optim.lr": 1e-3},
        "lr_0.004": {"optim.lr": 4e-3},
        "tau_0.5": {f"{n}.tau": 0.5},
        "tau_2": {f"{n}.tau": 2.0},
    }
    half = {"seeds": FACTOR_SEEDS, "length": 0.5}
    for name, changes in settings.items():
        heading = name.replace("_", " ")
        yield arms.arm(f"nclip_{name}", heading, "factors", "nclip", changes, tuned="nclip", objective=SEARCHED, **half)
    best = {f"{n}.tau": 0.5}
    again: dict[str, dict[str, Any]] = {
        "tau_0.5_again": {},  # the run of the first search
        "tau_0.35": {f"{n}.tau": 0.35},
        "tau_0.25": {f"{n}.tau": 0.25},
        "tau_0.5_target_joint": {f"{n}.target": "joint"},
        "tau_0.5_smoothness_3": {f"{n}.smoothness": 3.0},
        "tau_0.5_head_2_layers": {f"{head}.layers": 2},
        "tau_0.35_target_joint": {f"{n}.tau": 0.35, f"{n}.target": "joint"},
    }
    for name, changes in again.items():
        heading = name.replace("_", " ")
        yield arms.arm(
            f"nclip_{name}",
            heading,
            "factors",
            "nclip",
            best | changes,
            tuned="nclip",
            objective=SEARCHED_AGAIN,
            **half,
        )
    for target in ("detach", "joint"):
        for tau in (0.5, 0.35):
            changes = terms(0.5) | {f"{n}.tau": tau, f"{n}.target": target}
            yield arms.arm(
                f"xclip_half_tau_{tau:g}_{target}", f"xCLIP, tau {tau:g}, target {target}", "factors", "xclip", changes,
                tuned="xclip", objective=SEARCHED_XCLIP, **half,
            )  # fmt: skip
    yield arms.arm("clip_half", "CLIP", "factors", "clip", {}, tuned="clip", **half)


def _longer_smoothed(arms: Arms) -> Arm:
    return arms.arm(
        LONGER_SMOOTHED, f"CLIP, {MORE_STEPS:g} times the steps, label smoothing {SMOOTHING:g}", "controls", "clip",
        SMOOTHED, seeds=SEEDS, tuned="clip", length=MORE_STEPS,
    )  # fmt: skip


def _searched(arms: Arms) -> Iterator[Arm]:
    """Yield nCLIP with the setting that the factors chose, by itself and in xCLIP."""
    yield arms.arm(SEARCHED, "nCLIP, tau 0.5", "controls", "nclip", {}, seeds=SEEDS, tuned=SEARCHED)
    yield arms.arm(SEARCHED_AGAIN, "nCLIP, tau 0.35", "controls", "nclip", {}, seeds=SEEDS, tuned=SEARCHED_AGAIN)
    heading = f"{title('xclip_50')}, tau 0.5"
    yield arms.arm("xclip_searched", heading, "controls", "xclip", XCLIP_SEARCHED, seeds=SEEDS, tuned="xclip")
    heading_again = f"{title('xclip_50')}, tau 0.35"
    yield arms.arm(SEARCHED_XCLIP, heading_again, "controls", "xclip", {}, seeds=SEEDS, tuned=SEARCHED_XCLIP)
    shuffled = XCLIP_SEARCHED | {"objective.nclip.shuffle_targets": True}
    yield arms.arm(
        "xclip_searched_shuffled", f"{heading}, shuffled pseudo-labels", "controls", "xclip", shuffled, seeds=SEEDS,
        tuned="xclip",
    )  # fmt: skip


# Each was declared before the first of its runs, see texts.CHANGED.
_OURS = (
    Claim(
        "Besides the paper: nCLIP with the setting that was tuned on validation, tau 0.5, learns better "
        "representations than CLIP.",
        (ClaimPart("its probe is better", SEARCHED, "clip", "probe"),),
        tuned_on_seeds=FACTOR_SEEDS,
    ),
    Claim(
        "Besides the paper: xCLIP with that setting is at least as good as CLIP at zero-shot, and better at "
        "representation.",
        (
            ClaimPart("its zero-shot is at least as good", "xclip_searched", "clip", "zeroshot", margin=1.0),
            ClaimPart("its probe is better", "xclip_searched", "clip", "probe"),
        ),
        tuned_on_seeds=FACTOR_SEEDS,
    ),
    Claim(
        "Besides the paper, a second attempt at the fourth: nCLIP with the best setting of a second search, tau "
        "0.35, learns better representations than CLIP.",
        (ClaimPart("its probe is better", SEARCHED_AGAIN, "clip", "probe"),),
        tuned_on_seeds=FACTOR_SEEDS,
    ),
    Claim(
        "Besides the paper, a second attempt at the fifth: xCLIP with the best setting of a search of its own, "
        "tau 0.35 too, is at least as good as CLIP at zero-shot, and better at representation.",
        (
            ClaimPart("its zero-shot is at least as good", SEARCHED_XCLIP, "clip", "zeroshot", margin=1.0),
            ClaimPart("its probe is better", SEARCHED_XCLIP, "clip", "probe"),
        ),
        tuned_on_seeds=FACTOR_SEEDS,
    ),
)

TUNED_COMPARISONS = (
    (SEARCHED, "nclip", "what the search is worth"),
    (SEARCHED, "clip", "whether it is ahead of CLIP"),
    (SEARCHED_AGAIN, SEARCHED, "what the second search is worth"),
    (SEARCHED_AGAIN, "clip", "whether that is ahead of CLIP"),
    (SEARCHED_AGAIN, "clip_smoothed", "whether it is ahead of CLIP with soft targets"),
    ("xclip_searched", "xclip", "what nCLIP's setting is worth in xCLIP"),
    ("xclip_searched", "clip", "whether that is ahead of CLIP"),
    (SEARCHED_XCLIP, "xclip_searched", "what xCLIP's own search is worth"),
    (SEARCHED_XCLIP, "clip", "whether that is ahead of CLIP"),
    (SEARCHED_XCLIP, "clip_longer", "whether it is ahead of CLIP trained for the same time"),
    (SEARCHED_XCLIP, "clip_smoothed", "whether it is ahead of CLIP with soft targets"),
    (SEARCHED_XCLIP, LONGER_SMOOTHED, "whether it is ahead of CLIP with both"),
)
TUNED_CONTROLS = (
    *(
        ("xclip_searched", name, SHOWS[name])
        for name in (FLOOR, "clip_longer", "clip_twice", "clip_smoothed", LONGER_SMOOTHED)
    ),
    ("xclip_searched", "xclip_searched_shuffled", SHOWS["xclip_shuffled"]),
)
EXTRA_COMPARISONS = ExtraComparisons(
    "xCLIP, half nCLIP and half CLIP, with tau tuned on validation",
    ("CLIP, as many steps", "CLIP, the same time", f"CLIP, label smoothing {SMOOTHING:g}", "CLIP, both at once"),
    {
        **{
            f"tau {tau:g}": [(arm, name) for name in ("clip", "clip_longer", "clip_smoothed", LONGER_SMOOTHED)]
            for tau, arm in ((0.5, "xclip_searched"), (0.35, SEARCHED_XCLIP))
        },
        "tau 0.5, 25 % of captions exchanged for both": [
            ("xclip_noise25", f"clip_noise25{name}") for name in ("", "_longer", "_smoothed")
        ],
        f"tau 0.5, {_LONGEST:,} steps": [
            (f"xclip_steps{_LONGEST}", f"clip_steps{_LONGEST}{name}") for name in ("", "_longer")
        ],
    },
    ("zeroshot", "probe"),
    "xCLIP, half nCLIP and half CLIP, with tau 0.5, tuned on validation, minus CLIP, at zero-shot on unseen concepts / "
    f"the linear probe: {{0}} after as many steps, {{1}} after the same time ({MORE_STEPS:g} times the steps), {{3}} "
    "after the same time where CLIP has label smoothing.",
)


# The recipe has the tau that the factors chose; the arms were declared with the first version's tau.
_CHANGES = {
    "steps": STEPS, "optim.warmup": WARM_UP, "objective.nclip.tau": 1.0, "log.every": 20, "data.cache": True,
}  # fmt: skip


def study(recipe: str = RECIPE) -> Study:
    """Return the study; `recipe` is the config that all arms start from, with the argument "objective"."""
    arms = Arms(recipe, SEEDS, TUNING_SEEDS, more_steps=MORE_STEPS)
    candidates = {
        objective: (*_FIRST_PASS, *_SECOND_PASS[objective], *_THIRD_PASS[objective]) for objective in OBJECTIVES
    }
    return Study(
        title="Contrastive and non-contrastive pre-training, put to the test",
        about=texts.ABOUT,
        arms=(
            *arms.tuning(candidates),
            *arms.core(),
            *_searched(arms),
            *arms.controls(),
            _longer_smoothed(arms),
            *arms.common(COMMON),
            *_dose_arms(arms),
            *_factors(arms),
        ),
        changes=_CHANGES,
        validation=VALIDATION,
        tests=TESTS,
        # Steadier than top-1 from one run to the next.
        choose=Measure(
            "choose", "rank among validation concepts", VALIDATION[0], "rank_gmean", higher=False, ratio=True
        ),
        measures=MEASURES,
        claims=(*claims(MEASURES), *_OURS),
        baseline="clip",
        choices={"xclip": tuple(XCLIP)},
        named=dict(zip(VALIDATION, ("zeroshot", "rendering"), strict=True)),
        common={title(name): f"common_{name}" for name, *_ in objectives()},
        controls=(*CONTROLS, ("xclip", LONGER_SMOOTHED, SHOWS[LONGER_SMOOTHED])),
        floor=FLOOR,
        tuned_comparisons=TUNED_COMPARISONS,
        tuned_controls=TUNED_CONTROLS,
        secondary=SECONDARY,
        shown=(
            ("nclip", SEARCHED_AGAIN, "xclip", SEARCHED_XCLIP, "clip_longer"),
            ("zeroshot", "rendering", "retrieval", "probe", "aliases"),
        ),
        extra_comparisons=EXTRA_COMPARISONS,
        weights={"0.3": "xclip_30", "0.5": "xclip_50", "0.7": "xclip_70", "1": "nclip"},
        doses=tuple(_doses()),
        factors=(
            Measure("information", "mutual information, nats", "", "nclip/mutual_information_img", digits=2),
            Measure("clusters", "clusters in a batch", "", "nclip/clusters_img"),
            SEARCH,
            Measure("validation_zeroshot", "zero-shot, validation concepts", VALIDATION[0]),
        ),
        search=SEARCH,
        threats=texts.THREATS,
        recipe="" if recipe == RECIPE else recipe,
        scope=texts.SCOPE,
        changed=texts.CHANGED,
        commits=texts.COMMITS,
        seconds_per_pair=1.3e-3,  # 0.33 s a step of 256 at 36 px on two cores
    )
