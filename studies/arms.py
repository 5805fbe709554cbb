"""Arms and claims of a study of the paper (arXiv 2210.09304) on whatever data: the objectives, and their controls."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from studies.declaration import Arm, Claim, ClaimPart, Measure

OBJECTIVES = ("clip", "siglip", "nclip", "xclip")
XCLIP = {"xclip_30": 0.3, "xclip_50": 0.5, "xclip_70": 0.7}  # weight of nCLIP, the rest is CLIP's
SMOOTHING = 0.1
SMOOTHED = {"objective.clip.label_smoothing": SMOOTHING}
AGAINST = {
    "clip_idle_head": "CLIP again, with cluster heads that nothing trains: equal to it but for rounding",
    "clip_longer": "gain over CLIP trained for the same time",
    "clip_twice": "gain over CLIP trained twice as long",
    "clip_smoothed": "gain over CLIP with soft targets",
    "xclip_shuffled": "gain over the same with the pseudo-labels of other pairs",
}
FLOOR = "clip_idle_head"
OUT_OF_DOMAIN = "out-of-domain classification"  # in `Measure.family`
# Sentences for `Study.about`.
WEIGHTS = "Weights are written nCLIP : CLIP; the xCLIP of the claims is the weight that is best on validation."
CLASSIFIERS = (
    "nCLIP classifies by its clusters, since it has no projection; CLIP, SigLIP and xCLIP by the cosine of their "
    "embeddings."
)
# A sentence for `Study.threats`.
CHOICE = (
    "The weight of xCLIP is the best of three on validation sets of the same runs, where CLIP has one candidate; "
    "intervals do not count that choice."
)
# What each control is subtracted from.
CONTROLS = tuple(("xclip_30" if name == "xclip_shuffled" else "xclip", name, text) for name, text in AGAINST.items())


def terms(nclip: float) -> dict[str, Any]:
    """The change that gives nCLIP this weight and CLIP the rest."""
    return {"objective.terms": {"clip": round(1 - nclip, 6), "nclip": nclip}}


def title(name: str) -> str:
    """The title of an arm of the core."""
    titles = {"clip": "CLIP", "siglip": "SigLIP", "nclip": "nCLIP"}
    return titles.get(name) or f"xCLIP {XCLIP[name]:g} : {1 - XCLIP[name]:g}"


def objectives() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(arm, objective, changes) of the six arms of the core."""
    yield from ((name, name, {}) for name in ("clip", "siglip", "nclip"))
    yield from ((name, "xclip", terms(weight)) for name, weight in XCLIP.items())


@dataclasses.dataclass(frozen=True)
class Arms:
    """Makes the arms that studies have in common.

    Attributes:
      recipe: the config that all start from, "NAME" or "NAME:ARGUMENT"; it takes the argument "objective".
      seeds: of core and controls.
      tuning_seeds: of candidates; none of `seeds`, so that these are no part of the choice.
      more_steps: what xCLIP's step costs over CLIP's, which a control has as more steps.
    """

    recipe: str
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    more_steps: float

    def arm(self, name: str, heading: str, section: str, trained: str, changes: Mapping[str, Any], **more: Any) -> Arm:
        """Return an arm on the recipe of the objective that is `trained`."""
        argument = "," if ":" in self.recipe else ":"
        return Arm(name, heading, section, f"{self.recipe}{argument}objective={trained}", changes, **more)

    def tuning(self, candidates: Mapping[str, Sequence[tuple[float, int]]], length: float = 1.0) -> Iterator[Arm]:
        """Candidates: {objective: (learning rate, warm-up)}.

        xCLIP is tuned at the lowest weight of nCLIP, and all of its weights have that recipe.
        """
        for objective, recipes in candidates.items():
            own = terms(min(XCLIP.values())) if objective == "xclip" else {}
            for lr, warmup in recipes:
                changes = {"optim.lr": lr, "optim.warmup": warmup, **own}
                yield self.arm(
                    f"tuning_{objective}_lr{lr:g}_w{warmup}", f"lr {lr:g}, warm-up {warmup}", "tuning", objective,
                    changes, seeds=self.tuning_seeds, objective=objective, length=length,
                )  # fmt: skip

    def core(self) -> Iterator[Arm]:
        """All objectives, each at its own best recipe."""
        for name, objective, changes in objectives():
            yield self.arm(name, title(name), "core", objective, changes, seeds=self.seeds, tuned=objective)

    def controls(self) -> Iterator[Arm]:
        """What else could explain a gain of xCLIP over CLIP."""

        def control(name: str, heading: str, tuned: str, changes: Mapping[str, Any], length: float = 1.0) -> Arm:
            objective = "xclip" if "objective.terms" in changes else tuned
            return self.arm(name, heading, "controls", objective, changes, seeds=self.seeds, tuned=tuned, length=length)

        yield control("clip_idle_head", "CLIP, untrained cluster heads", "clip", terms(0.0))
        yield control("clip_longer", f"CLIP, {self.more_steps:g} times the steps", "clip", {}, length=self.more_steps)
        yield control("clip_twice", "CLIP, twice the steps", "clip", {}, length=2.0)
        yield control("clip_smoothed", f"CLIP, label smoothing {SMOOTHING:g}", "clip", SMOOTHED)
        shuffled = terms(0.3) | {"objective.nclip.shuffle_targets": True}
        yield control("xclip_shuffled", "xCLIP 0.3 : 0.7, shuffled pseudo-labels", "xclip", shuffled)

    def common(self, recipe: Mapping[str, Any]) -> Iterator[Arm]:
        """All objectives at one recipe."""
        for name, objective, changes in objectives():
            heading = f"{title(name)}, common recipe"
            yield self.arm(f"common_{name}", heading, "controls", objective, {**recipe, **changes}, seeds=self.seeds)


def claims(measures: Sequence[Measure]) -> tuple[Claim, ...]:
    """The paper's three claims.

    Args:
      measures: of the study; "zeroshot" and "probe" are among them.
    """
    return (
        Claim(
            "nCLIP alone learns better representations than CLIP alone and is clearly worse at zero-shot.",
            (
                ClaimPart("nCLIP's probe is better", "nclip", "clip", "probe"),
                ClaimPart("nCLIP's zero-shot is worse", "nclip", "clip", "zeroshot", better=False),
            ),
            short="nCLIP has better representations and worse zero-shot",
        ),
        Claim(
            "xCLIP is at least as good as CLIP at zero-shot, and better at representation.",
            (
                ClaimPart("xCLIP's zero-shot is at least as good", "xclip", "clip", "zeroshot", margin=1.0),
                ClaimPart("xCLIP's probe is better", "xclip", "clip", "probe"),
            ),
            short="xCLIP has zero-shot as good and better representations",
            all_choices=True,
        ),
        Claim(
            "xCLIP's gain holds over zero-shot, out-of-domain classification, retrieval, visual and textual "
            "representation.",
            tuple(ClaimPart(f"xCLIP gains at {m.family}", "xclip", "clip", m.name) for m in measures if m.family),
            short="xCLIP gains in every family of tests",
        ),
    )
