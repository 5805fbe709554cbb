"""The declared study at scale: the same claims on CC12M with ViT-B/16, to be run on TPUs. No run has been made."""

import pathlib

from studies.arms import (
    CHOICE,
    CLASSIFIERS,
    CONTROLS,
    FLOOR,
    OBJECTIVES,
    OUT_OF_DOMAIN,
    WEIGHTS,
    XCLIP,
    Arms,
    claims,
)
from studies.declaration import Measure, Study

RECIPE = str(pathlib.Path(__file__).with_name("recipe.py"))
SEEDS, TUNING_SEEDS = (0, 1, 2), (100,)
# Candidates (learning rate, warm-up) at a fifth of the steps, with a fifth of the warm-up.
_CANDIDATES = tuple((lr, warmup) for lr in (5e-4, 1e-3, 2e-3, 4e-3) for warmup in (2000, 4000))
_TUNING_LENGTH = 0.2

VALIDATION = ("imagenet_minival",)
TESTS = (
    "imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "coco_retrieval", "probe/imagenet",
    "trec", "glue/sst2",
)  # fmt: skip
MEASURES = (
    Measure(
        "zeroshot", "zero-shot, ImageNet", "imagenet", family="zero-shot classification",
        what="validation images of ImageNet by class names, with prompts; top-1",
    ),
    Measure(
        "v2", "zero-shot, ImageNet v2", "imagenet_v2", family=f"{OUT_OF_DOMAIN}: ImageNet v2",
        what="new images of the same classes, collected as ImageNet's were; top-1",
    ),
    Measure(
        "rendition", "zero-shot, ImageNet-R", "imagenet_r", family=f"{OUT_OF_DOMAIN}: ImageNet-R",
        what="art, cartoons and other renditions of 200 of the classes; top-1",
    ),
    Measure(
        "sketch", "zero-shot, ImageNet-Sketch", "imagenet_sketch", family=f"{OUT_OF_DOMAIN}: ImageNet-Sketch",
        what="sketches of the same classes; top-1",
    ),
    Measure(
        "adversarial", "zero-shot, ImageNet-A", "imagenet_a", family=f"{OUT_OF_DOMAIN}: ImageNet-A",
        what="images of 200 of the classes that other models got wrong; top-1",
    ),
    Measure(
        "retrieval", "retrieval, COCO", "coco_retrieval", family="retrieval",
        what="an image's captions among the captions of all images of the test; recall at 1",
    ),
    Measure(
        "probe", "linear probe, ImageNet", "probe/imagenet", family="visual representation",
        what="logistic regression on features of training images, tested on validation images; top-1",
    ),
    Measure(
        "trec", "text probe, TREC", "trec", family="textual representation: TREC",
        what="logistic regression on features of questions: their type; top-1",
    ),
    Measure(
        "sst2", "text probe, SST-2", "glue/sst2", family="textual representation: SST-2",
        what="logistic regression on features of sentences of film reviews: positive or negative; top-1",
    ),
)  # fmt: skip
_ABOUT = (
    "The claims are those of the abstract of arXiv 2210.09304 in our words; its authors' settings are unknown to us. "
    "The recipe is that of `studies/cc12m/recipe.py`: ViT-B/16 on CC12M, batches of 4096. Every objective has a "
    "learning rate and a warm-up of its own, chosen on the last hundredth of ImageNet's training images at a fifth of "
    "the steps.",
    f"{CLASSIFIERS} {WEIGHTS} nCLIP's loss has tau 0.5, the best of the first search of the study on icons "
    "(a second one preferred 0.35, and the tests do not tell the two apart).",
)
_COST = (
    "A run of 75,825 steps takes 135 chip-hours of TPU v5e for CLIP and 137 for nCLIP and xCLIP, at an MFU of 40 %, "
    "which is a guess (it does not count that blocks are computed again, a third more work): 17 hours on 8 chips. "
    "`python -m xclip_jax.commands.plan --config studies/cc12m/recipe.py:objective=clip --topology v5e:2x4 --mfu 0.4 "
    "--price 1.2` prints "
    "`75,825 steps take 0.70 days, 135 chip-hours, which cost 162`. "
    "All arms with their seeds and candidates come to 5,770 chip-hours, 6,930 at that price.",
    "The command runs them one after another on the chips of one machine. On a pod start each run by a launch script, "
    "with `--config studies/cc12m/recipe.py:arm=xclip_30,seed=0`, candidates first, and write the records with "
    "`python -m studies --study cc12m --collect gs://bucket/RUN ...`. Commit those of the candidates before "
    "the arms start: the scripts ship the last commit, and the arms read there what was chosen.",
)

_THREATS = (
    "Three seeds: intervals are wide, and the exact sign-flip test cannot reach 0.05. Claim 3 needs nine parts at once "
    "and could hardly hold.",
    "Recipes are the best of eight of one seed at a fifth of the steps; other keys are not tuned.",
    "A third of the links of CC12M are dead: whose tars they are decides what was trained on.",
    CHOICE,
    "The validation images are of ImageNet, as most of the tests are.",
)


def study(recipe: str = RECIPE) -> Study:
    """Return the study; `recipe` is the config that all arms start from, with the argument "objective"."""
    arms = Arms(recipe, SEEDS, TUNING_SEEDS, more_steps=1.02)
    candidates = dict.fromkeys(OBJECTIVES, _CANDIDATES)
    return Study(
        name="cc12m",
        title="Contrastive and non-contrastive pre-training on CC12M",
        about=(*_ABOUT, *_COST),
        arms=(*arms.tuning(candidates, _TUNING_LENGTH), *arms.core(), *arms.controls()),
        changes={},
        validation=VALIDATION,
        tests=TESTS,
        choose=Measure("choose", "zero-shot, ImageNet's last hundredth of training images", VALIDATION[0]),
        measures=MEASURES,
        claims=claims(MEASURES),
        baseline="clip",
        choices={"xclip": tuple(XCLIP)},
        named={VALIDATION[0]: "zeroshot"},
        controls=CONTROLS,
        floor=FLOOR,
        threats=_THREATS,
        recipe="" if recipe == RECIPE else recipe,
        seconds_per_pair=1 / 5000,  # 8 chips of v5e at an MFU of 40 %, by plan
    )
