"""What the duel tries: each team's space and its candidates, cluster heads, rivals, and arms under wrong captions."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

SUPERCLIP = {"objective.name": "superclip", "objective.terms": {"clip": 1.0, "tokens": 1.0}}

Settings = dict[str, Any]
CANDIDATES = 24
FILE = pathlib.Path(__file__).with_name("candidates.jsonl")
_TERMS = "studies.duel.terms"

# Learning rates that are good for 500 steps of CLIP, by python -m studies.optimizers.
BASE_RATES = {"adamw": 2e-3, "muon": 4e-3}

# Warm-up is a share of the steps. "average": the moving average of the parameters is evaluated. A value that stands
# twice is dealt twice as often.
SHARED: dict[str, Sequence[Any]] = {
    "optimizer": ("muon", "muon", "adamw"),
    "rate": (0.5, 1.0, 2.0),  # times BASE_RATES
    "warmup": (0.15, 0.3, 0.45, 0.6),
    "smoothing": (0.0, 0.05, 0.1, 0.2),
    "positives": ("pair", "caption"),
    "average": (False, True),
    "decay": (0.05, 0.1, 0.3),
}
SPACES: dict[str, dict[str, Sequence[Any]]] = {
    "clip": SHARED,
    "xclip": SHARED
    | {
        "tau": (0.25, 0.35, 0.5, 0.7),
        "weight": (0.3, 0.5, 0.7),  # of nCLIP, the rest is CLIP's
        "schedule": ("constant", "early", "late"),  # of nCLIP's weight
        "target": ("detach", "joint", "ema"),
        "momentum": (0.0, 0.9, 0.99),  # of the marginal in the smoothness term; 0 for the batch's own
    },
}
# The first candidate of each team is the recipe of the first study.
_FIRST_CLIP = {
    "optimizer": "adamw", "rate": 1.0, "warmup": 0.6, "smoothing": 0.0, "positives": "pair", "average": False,
    "decay": 0.1,
}  # fmt: skip
_FIRST: dict[str, Settings] = {
    "clip": _FIRST_CLIP,
    "xclip": _FIRST_CLIP
    | {"warmup": 0.45, "tau": 0.5, "weight": 0.5, "schedule": "constant", "target": "detach", "momentum": 0.0},
}


def draw(team: str) -> list[Settings]:
    """Draw a team's candidates: values of a key are dealt out in turn, joined by hashes; no state, no seed."""
    candidates = [dict(_FIRST[team]) for _ in range(CANDIDATES)]
    for name, values in SPACES[team].items():
        order = sorted(range(1, CANDIDATES), key=lambda i: hashlib.sha256(f"{team} {name} {i}".encode()).digest())
        for place, i in enumerate(order):
            candidates[i][name] = values[place % len(values)]
    return candidates


def candidates(team: str) -> list[Settings]:
    """Return a team's candidates as candidates.jsonl lists them."""
    lines = [json.loads(line) for line in FILE.read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in ("team", "number")} for line in lines
            if line["team"] == team]  # fmt: skip


def render() -> str:
    """Return the text of candidates.jsonl."""
    lines = [{"team": team, "number": i} | drawn for team in SPACES for i, drawn in enumerate(draw(team), 1)]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


# --- cluster heads: (clusters, hidden width, hidden layers); the first is the first study's

HEADS: dict[str, tuple[int, int, int]] = {
    "k1024_h1024": (1024, 1024, 1),
    "k1024_h256": (1024, 256, 1),
    "k1024_h128": (1024, 128, 1),
    "k1024_linear": (1024, 1, 0),
    "k256_h256": (256, 256, 1),
    "k256_linear": (256, 1, 0),
}


def head(name: str) -> dict[str, Any]:
    """The change that gives a model this cluster head."""
    clusters, hidden, layers = HEADS[name]
    return {"model.cluster_head": {"clusters": clusters, "hidden": hidden, "layers": layers, "last_norm": False}}


# --- settings as changes of a config

_AVERAGED = {"ema.momentum": 0.99, "ema.schedule": "constant"}  # over 100 steps: runs are short


def training(settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The changes of any arm: steps, optimizer, CLIP's targets and the moving average."""
    return {
        "steps": steps,
        "optim.name": settings["optimizer"],
        "optim.lr": settings["rate"] * BASE_RATES[settings["optimizer"]],
        "optim.warmup": round(settings["warmup"] * steps),
        "optim.weight_decay": settings["decay"],
        "objective.clip.label_smoothing": settings["smoothing"],
        "objective.clip.positives": settings["positives"],
        **({"ema.on": True, "eval.ema": True} | _AVERAGED if settings["average"] else {}),
        **(_AVERAGED if settings.get("target") == "ema" else {}),
    }


def clusters(settings: Mapping[str, Any], steps: int, *, shuffled: bool = False) -> dict[str, Any]:
    """The changes of nCLIP's term; a shuffled target has no gradient, so that "joint" becomes "detach"."""
    target = "detach" if shuffled and settings["target"] == "joint" else settings["target"]
    options = {"tau": settings["tau"], "target": target, "shuffle_targets": shuffled}
    if settings["schedule"] == "constant" and not settings["momentum"]:
        return {f"objective.nclip.{name}": value for name, value in options.items()}
    ours = {"schedule": settings["schedule"], "horizon": steps, "momentum": settings["momentum"]}
    return {"objective.plugins": {"nclip": {"type": f"{_TERMS}:ScheduledNclip"} | options | ours}}


def xclip(settings: Mapping[str, Any], steps: int, head_name: str, *, shuffled: bool = False) -> dict[str, Any]:
    """The changes of xCLIP on the recipe of xCLIP."""
    weights = {"clip": round(1 - settings["weight"], 6), "nclip": settings["weight"]}
    return {
        **training(settings, steps),
        **clusters(settings, steps, shuffled=shuffled),
        **head(head_name),
        "objective.terms": weights,
    }


def rival(name: str, settings: Mapping[str, Any], steps: int, head_name: str) -> dict[str, Any]:
    """The changes of a rival on the recipe of CLIP, at the settings of CLIP's team.

    Args:
      name: superclip, second, distilled or gce.
      settings: of CLIP's team; "distill" and "q" are the rival's own.
      steps: of the run.
      head_name: the cluster head whose size a second contrastive head has.
    """
    # A teacher's targets are soft already, and a bounded loss takes one target a pair.
    hard = {"distilled": {"smoothing": 0.0}, "gce": {"smoothing": 0.0, "positives": "pair"}}
    base = training({**settings, **hard.get(name, {})}, steps)
    options = {"label_smoothing": settings["smoothing"], "positives": settings["positives"]}
    second = {"type": f"{_TERMS}:SecondHead"} | options
    own = {
        "superclip": SUPERCLIP,
        "second": {
            "objective.name": "second",
            "objective.terms": {"clip": 0.5, "second": 0.5},
            "objective.plugins": {"second": second},
            **head(head_name),
        },
        "distilled": {"objective.clip.distill": settings.get("distill", 0.5), **_AVERAGED},
        "gce": {"objective.clip.q": settings.get("q", 0.5)},
    }
    return {**base, **own[name]}


# --- titles of arms

RIVALS = {
    "superclip": "SuperCLIP's tokens",
    "second": "second contrastive head",
    "distilled": "self-distilled targets",
}
WRONG_TITLES = {
    "clip": "CLIP", "smoothed": "CLIP, tuned smoothing", "siglip": "SigLIP", "gce": "generalised cross-entropy",
    "distilled": "self-distilled targets", "superclip": "SuperCLIP's tokens", "nclip": "nCLIP", "xclip": "xCLIP",
    "shuffled": "xCLIP, shuffled pseudo-labels", "oracle": "CLIP on clean pairs only",
    "cheaper": "xCLIP without a teacher",
}  # fmt: skip


# --- wrong captions: arms, and the key that each has of its own with two values to choose from

RATES, WARM_UPS = (0.5, 1.0), (0.3, 0.6)  # rates are multiples of the winner's rate of the arm's team
# Both winners' settings are candidates: warm-up 0.6 with smoothing 0.2, and warm-up 0.3 with tau 0.35.
WRONG: dict[str, tuple[str, Sequence[Any]]] = {
    "clip": ("", ()),
    "smoothed": ("smoothing", (0.2, 0.4)),
    "siglip": ("", ()),
    "gce": ("q", (0.3, 0.7)),
    "distilled": ("distill", (0.3, 0.6)),
    "superclip": ("", ()),
    "nclip": ("tau", (0.5, 0.35)),
    "xclip": ("tau", (0.5, 0.35)),
}
# Arms that take over another's choice: xCLIP with shuffled pseudo-labels or without a teacher, CLIP on clean pairs.
FOLLOWERS = {"shuffled": "xclip", "oracle": "clip", "cheaper": "xclip"}


def team_of(arm: str) -> str:
    """Return the team whose winner an arm under wrong captions starts from; "cheaper" is xCLIP's runner-up."""
    return arm if arm == "cheaper" else "xclip" if arm in ("nclip", "xclip", "shuffled") else "clip"


def retuned(arm: str, rate: float) -> list[Settings]:
    """Return an arm's four candidates: rates and warm-ups, or a half of the eight with two values of its own key.

    Args:
      arm: of `WRONG`.
      rate: of its team's winner.
    """
    own, values = WRONG[arm]
    return [
        {"rate": rate * times, "warmup": warmup} | ({own: values[(i + j) % 2]} if own else {})
        for i, times in enumerate(RATES)
        for j, warmup in enumerate(WARM_UPS)
    ]
