"""The study's settings: candidates of each team, controls, and both as changes of a config."""

from typing import Any

Settings = dict[str, Any]
# Every rate stands twice in each team, with both warm-ups, and each value of another key stands four times.
TEAMS: dict[str, list[Settings]] = {
    "clip": [
        {"lr": lr, "warmup": warmup, "smoothing": smoothing}
        for lr, of_rate in (
            (1e-3, ((0.3, 0.0), (0.6, 0.1))),
            (2e-3, ((0.3, 0.1), (0.6, 0.0))),
            (4e-3, ((0.3, 0.0), (0.6, 0.1))),
            (8e-3, ((0.3, 0.1), (0.6, 0.0))),
        )
        for warmup, smoothing in of_rate
    ],
    "xclip": [
        {"lr": lr, "warmup": warmup, "tau": tau, "weight": weight}
        for lr, of_rate in (
            (1e-3, ((0.3, 0.35, 0.3), (0.6, 0.5, 0.5))),
            (2e-3, ((0.3, 0.5, 0.3), (0.6, 0.35, 0.5))),
            (4e-3, ((0.3, 0.35, 0.5), (0.6, 0.5, 0.3))),
            (8e-3, ((0.3, 0.5, 0.5), (0.6, 0.35, 0.3))),
        )
        for warmup, tau, weight in of_rate
    ],
}

TITLES = {"clip": "CLIP", "xclip": "xCLIP"}


def in_words(settings: Settings) -> str:
    """Return "rate 0.004, warm-up 0.6, smoothing 0"."""
    names = {"lr": "rate", "warmup": "warm-up"}
    return ", ".join(f"{names.get(key, key)} {value:g}" for key, value in settings.items())


def changes_of(objective: str, settings: Settings, steps: int) -> Settings:
    """Return the changes of an arm by its team's settings, as far as its recipe's objective has them."""
    changes = {
        "steps": steps,
        "optim.lr": settings["lr"],
        "optim.warmup": round(settings["warmup"] * steps),
        "objective.clip.label_smoothing": settings.get("smoothing", 0.0),
    }
    if objective in ("nclip", "xclip") and "tau" in settings:
        changes |= {"objective.nclip.tau": settings["tau"], "objective.nclip.target": "detach"}
        if objective == "xclip":
            weight = settings["weight"]
            changes["objective.terms"] = {"clip": round(1 - weight, 6), "nclip": weight}
    return changes


_SECOND = {
    "objective.name": "second",
    "objective.terms": {"clip": 0.5, "second": 0.5},
    "objective.plugins": {"second": {"type": "studies.photographs.terms:SecondHead", "label_smoothing": 0.0}},
}
_TOKENS = {
    "objective.name": "common",
    "objective.terms": {"clip": 1.0, "common": 1.0},
    "objective.plugins": {"common": {"type": "studies.photographs.terms:CommonTokens"}},
}
_FIXED = {
    "objective.name": "fixed",
    "objective.terms": {"clip": 1.0, "fixed": 1.0},
    "objective.plugins": {"fixed": {"type": "studies.photographs.terms:FixedHead"}},
}
_DETACHED = {
    "objective.name": "detached",
    "objective.plugins": {
        "detached": {"type": "studies.photographs.terms:DetachedHead", "target": "detach", "tau": 0.5},
    },
}
# Control: (title, objective of its recipe, team whose settings it has, changes).
CONTROLS: dict[str, tuple[str, str, str, Settings]] = {
    "same_optimizer": ("CLIP at xCLIP's rate and warm-up", "clip", "xclip", {}),
    "untrained_head": (
        "CLIP, cluster head of weight 0", "xclip", "clip", {"objective.terms": {"clip": 1.0, "nclip": 0.0}},
    ),
    "shuffled": ("xCLIP, shuffled pseudo-labels", "xclip", "xclip", {"objective.nclip.shuffle_targets": True}),
    "second_head": ("CLIP, second contrastive head", "clip", "clip", _SECOND),  # with the smoothing of `clip`
    "positives": ("CLIP, equal captions match", "clip", "clip", {"objective.clip.positives": "caption"}),
    "smoothing_0.1": ("CLIP, smoothing 0.1", "clip", "clip", {"objective.clip.label_smoothing": 0.1}),
    "smoothing_0.2": ("CLIP, smoothing 0.2", "clip", "clip", {"objective.clip.label_smoothing": 0.2}),
    "siglip": ("SigLIP", "siglip", "clip", {}),
    "nclip": ("nCLIP", "nclip", "xclip", {}),
    "gce": (
        "CLIP, generalised cross-entropy", "clip", "clip",
        {"objective.clip.label_smoothing": 0.0, "objective.clip.gce_q": 0.3},
    ),
    "tokens": ("CLIP, tokens of SuperCLIP", "clip", "clip", _TOKENS),
    "fixed_head": ("CLIP, untrained cluster head", "clip", "clip", _FIXED),
    "detached_head": ("CLIP, cluster head that does not train the towers", "clip", "xclip", _DETACHED),  # with its tau
}  # fmt: skip
TIMED = ("shuffled", "second_head", "siglip", "nclip", "tokens")  # controls whose step is not CLIP's
