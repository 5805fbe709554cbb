"""The duel in stages; each is declared as soon as records and measured costs decide its arms."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from scipy.stats import rankdata

from studies.declaration import Arm, Measure, Study
from studies.duel import spaces
from studies.icons import study as icons
from studies.matrix import LoadConfig, Matrix
from studies.records import RunRecord
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import UserError

PROBE = icons.SEARCH.set
VALIDATION = (*icons.VALIDATION, PROBE)
CHANGES = {"log.every": 20, "data.cache": True}
MOST_COST = 1.03  # of a step of xCLIP over CLIP's
TUNING_SEEDS, SEEDS, WRONG_SEEDS = (100, 101), (0, 1, 2, 3, 4), (0, 1, 2)
HEAD_STEPS, FINAL_STEPS, RETUNING_STEPS, WRONG_STEPS = 500, 4000, 750, 3000
LEVELS, BEST_AT_HALF = (25, 50), 4  # % of captions exchanged; arms that the rule chooses for the second level
ADDED_AT_HALF = ("gce", "cheaper")  # also run at the second level; in no claim, unless they are among the best
# Arms with all of SEEDS at the first level; others have WRONG_SEEDS, by which the second level's are chosen.
FIVE_SEEDS = ("clip", "smoothed", "gce", "distilled", "superclip", "xclip")
_CLIPS_STEP = ("clip", "smoothed", "positives")  # take as long as CLIP's
_SECONDS, _VALIDATED, _TESTED = 0.35, 20.0, 75.0  # of a step on two cores, and of evaluations


@dataclasses.dataclass(frozen=True)
class Rung:
    """A round of the search: `kept` candidates of each team, each trained for `steps` with each of `seeds`."""

    kept: int
    steps: int
    seeds: Sequence[int]


RUNGS = (Rung(spaces.CANDIDATES, 500, (100,)), Rung(8, 1000, (101,)), Rung(3, 2000, (102, 103)))


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage will have run when it is complete; names of its arms begin with `prefix`."""

    prefix: str
    title: str
    runs: int
    steps: int
    tested: bool = False

    def hours(self, runs: int) -> float:
        """Hours of two cores for this number of its runs, at steps of CLIP's clock."""
        return runs * (self.steps * _SECONDS + (_TESTED if self.tested else _VALIDATED)) / 3600


def stages() -> tuple[Stage, ...]:
    """All stages in the order in which they run."""
    rungs = (
        Stage(f"rung{i}", f"two teams, rung {i}", 2 * rung.kept * len(rung.seeds), rung.steps)
        for i, rung in enumerate(RUNGS, 1)
    )
    wrong, added = [], {*ADDED_AT_HALF}
    arms = (len(spaces.WRONG), BEST_AT_HALF + len(added & spaces.WRONG.keys()))
    followers = (len(spaces.FOLLOWERS), len(added & spaces.FOLLOWERS.keys()))
    for level, number, more in zip(LEVELS, arms, followers, strict=True):
        wrong.append(Stage(f"tune{level}", f"{level} % wrong captions, retuning", 4 * number, RETUNING_STEPS))
        runs = (number + more) * len(WRONG_SEEDS)
        runs += len(FIVE_SEEDS) * (len(SEEDS) - len(WRONG_SEEDS)) if level == LEVELS[0] else 0
        wrong.append(Stage(f"wrong{level}", f"{level} % wrong captions", runs, WRONG_STEPS, tested=True))
    finals = (5 + len(spaces.RIVALS)) * len(SEEDS)
    heads = len(spaces.HEADS) * len(TUNING_SEEDS)
    return (
        Stage("heads", "cheap clusters", heads, HEAD_STEPS),
        *rungs,
        Stage("final", "finalists and controls", finals, FINAL_STEPS, tested=True),
        *wrong,
    )


class DuelMatrix(Matrix):
    """Runs of the duel; those with wrong captions keep checkpoints for `mechanism`."""

    def config(self, arm: Arm, seed: int, tuned: Mapping[str, Any]) -> ml_collections.ConfigDict:
        """As `Matrix.config`."""
        config = super().config(arm, seed, tuned)
        config.checkpoint.keep = 20 if arm.name.startswith("wrong") else 1  # interruptions leave some too
        return config


def by_mean_rank(values: Mapping[str, tuple[float, float]]) -> list[str]:
    """Order candidates by the mean of their ranks at two measures, best first: the rule of all choices.

    Equal ones are ordered by the first measure, then as they come.

    Args:
      values: {candidate: its two measures}, more is better; minus infinity for a run that diverged.
    """
    table = np.round(np.array(list(values.values()), float).reshape(-1, 2), 3)  # records have rounded values
    ranks = np.stack([rankdata(-column) for column in table.T], axis=1)
    order = sorted(range(len(table)), key=lambda i: (ranks[i].mean(), ranks[i, 0], i))
    return [list(values)[i] for i in order]


def naming(record: RunRecord) -> float:
    """Minus the logarithm of the rank of the right name on validation, by the best of the model's similarities."""
    ranks = [r.value for r in record.results if (r.set, r.metric) == (VALIDATION[0], "rank_gmean") and not r.group]
    return -math.log(min(ranks)) if ranks else -math.inf


def arm_of(
    name: str, title: str, section: str, objective: str, changes: Mapping[str, Any], seeds: Sequence[int]
) -> Arm:
    """Return an arm on the recipe of the icons."""
    return Arm(name, title, section, f"{icons.RECIPE}:objective={objective}", changes, seeds)


# Cluster heads are chosen with the optimizer that is faster here, at the first study's other settings; their clock:
_WITH_MUON = {"optimizer": "muon"}
_PLAIN = spaces.training(spaces.candidates("clip")[0] | _WITH_MUON, HEAD_STEPS)
PLAIN = arm_of("plain_clip", "CLIP", "factors", "clip", _PLAIN, ())


class Duel:
    """What is declared so far.

    Attributes:
      arms: all arms that are decided, in the order of the stages.
      to_measure: (arm, arm that it is compared with) whose costs decide what comes next.
      impossible: {arm: why the package cannot run it}.
      head: name of the chosen cluster head; "" while open.
      winners, retuned: {team: index of its winner}, {arm under wrong captions: settings}, as far as they are known.
    """

    def __init__(
        self, records: Mapping[str, RunRecord], costs: Mapping[str, float], load: LoadConfig = load_config
    ) -> None:
        """Declare all that `records` {key: run} and `costs` {arm: ratio to its clock} decide."""
        self.records, self.costs = records, costs
        self.arms: list[Arm] = []
        self.to_measure: list[tuple[Arm, Arm]] = []
        self.impossible: dict[str, str] = {}
        self._most_cost = MOST_COST
        self.head, self.winners, self.retuned = "", dict[str, int](), dict[str, spaces.Settings]()
        self.added: Sequence[str] = ()  # arms of `ADDED_AT_HALF` that are not among the best
        self._cheaper: spaces.Settings | None = None  # the best xCLIP of the last rung without a teacher
        self._declare_heads()
        self._matrix = DuelMatrix(study_of(self.arms), load)
        if (head := self._choose_head()) is None:
            return
        self.head = head
        halved = {team: self._halve(team) for team in spaces.SPACES}
        self.winners = {team: index for team, index in halved.items() if index is not None}
        if len(self.winners) == len(halved) and self._declare_finals():
            best = self._declare_wrong(LEVELS[0], tuple(spaces.WRONG))
            if best is not None:
                self.added = tuple(arm for arm in ADDED_AT_HALF if arm in spaces.WRONG and arm not in best)
                self._declare_wrong(LEVELS[1], (*best, *self.added))

    # --- what records say

    def record(self, arm: Arm, seed: int) -> RunRecord | None:
        """Return the finished run of an arm, or None."""
        return self.records.get(self._matrix.run(arm, seed).key)

    def done(self, arm: Arm) -> int:
        """Return the number of an arm's finished runs."""
        return sum(self.record(arm, seed) is not None for seed in arm.seeds)

    def of_stage(self, stage: Stage) -> list[Arm]:
        """Return the declared arms of a stage."""
        return [arm for arm in self.arms if arm.name.startswith(f"{stage.prefix}_")]

    def progress(self) -> list[tuple[Stage, int, float]]:
        """Return each stage with the number of its finished runs and the hours that are left."""
        heads, *others = stages()
        heads = dataclasses.replace(heads, runs=sum(len(arm.seeds) for arm in self.of_stage(heads)))
        done = {stage: sum(map(self.done, self.of_stage(stage))) for stage in (heads, *others)}
        return [(stage, number, stage.hours(max(stage.runs - number, 0))) for stage, number in done.items()]

    def missing(self, only: str = "") -> list[str]:
        """Return a line for each thing that is missing, of arms whose names begin with `only`."""
        arms = [arm for arm in self.arms if arm.name.startswith(only) and self.done(arm) < len(arm.seeds)]
        lines = [f"{arm.name}: {len(arm.seeds) - self.done(arm)} of {len(arm.seeds)} runs" for arm in arms]
        lines += [f"{arm.name}: the cost of its step over {clock.name}'s" for arm, clock in self.to_measure]
        lines += [f"{name}: cannot run; {reason}" for name, reason in self.impossible.items() if name.startswith(only)]
        return [*lines, *(f"{stage.prefix}: its arms are not decided yet" for stage in stages()
                          if stage.prefix.startswith(only) and not self.of_stage(stage))]  # fmt: skip

    def values(self, arm: Arm) -> tuple[float, float] | None:
        """Return an arm's naming and probe on validation, means over seeds; None while runs are missing."""
        finished = [self.record(arm, seed) for seed in arm.seeds]
        runs = [record for record in finished if record is not None]
        if len(runs) < len(finished):
            return None
        probes = [record.value(PROBE, "") for record in runs]
        probe = float(np.mean([-math.inf if value is None else value for value in probes]))
        return float(np.mean([naming(record) for record in runs])), probe

    def _best(self, arms: Mapping[str, Arm]) -> list[str] | None:
        """{name: arm} by `by_mean_rank`; None while one has a run missing."""
        values = {name: self.values(arm) for name, arm in arms.items()}
        known = {name: value for name, value in values.items() if value is not None}
        return by_mean_rank(known) if known and len(known) == len(values) else None

    def _add(self, arm: Arm) -> bool:
        """Declare an arm if the package has its keys."""
        try:
            self._matrix.config(arm, 0, {})
        except UserError as error:
            self.impossible[arm.name] = str(error)
            return False
        self.arms.append(arm)
        return True

    def _ratio(self, arm: Arm, clock: Arm) -> float | None:
        """The measured cost of an arm's step, or None and a note that it is to be measured."""
        if arm.name == clock.name:
            return 1.0
        if arm.name not in self.costs:
            self.to_measure.append((arm, clock))
        return self.costs.get(arm.name)

    # --- stages

    def _declare_heads(self) -> None:
        """Declare the first study's head, and those that cost little enough; the cheapest where none does."""
        arms = []
        for name in spaces.HEADS:
            changes = spaces.xclip(spaces.candidates("xclip")[0] | _WITH_MUON, HEAD_STEPS, name)
            arms.append(arm_of(f"heads_{name}", name, "factors", "xclip", changes, TUNING_SEEDS))
        ratios = [self._ratio(arm, PLAIN) for arm in arms]
        known = [ratio for ratio in ratios if ratio is not None]
        self._most_cost = max(MOST_COST, min(known, default=MOST_COST))
        self.arms = [arms[0]]
        if len(known) == len(arms):
            self.arms += [arm for arm, ratio in zip(arms[1:], known[1:], strict=True) if ratio <= self._most_cost]

    def _choose_head(self) -> str | None:
        """The best head on validation that costs little enough."""
        order = None if self.to_measure else self._best({arm.title: arm for arm in self.arms})
        costs = {arm.title: self.costs[arm.name] for arm in self.arms} if order else {}
        return next((name for name in order or () if costs[name] <= self._most_cost), None)

    def _settings(self, team: str) -> spaces.Settings:
        return self._cheaper if self._cheaper and team == "cheaper" else spaces.candidates(team)[self.winners[team]]

    def _halve(self, team: str) -> int | None:
        """Declare the rungs of a team as far as they are decided, and return its winner."""
        drawn = spaces.candidates(team)
        left = [str(i) for i in range(len(drawn))]
        for number, rung in enumerate(RUNGS, 1):
            arms = {}
            for i in left[: rung.kept]:
                settings = drawn[int(i)]
                make = spaces.training if team == "clip" else spaces.xclip
                changes = make(settings, rung.steps, *([self.head] if team == "xclip" else []))
                name = f"rung{number}_{team}_{int(i) + 1:02d}"
                arms[i] = arm_of(name, f"{team} {int(i) + 1}", "factors", team, changes, rung.seeds)
            if not all(list(map(self._add, arms.values()))):  # all are noted
                return None
            if (order := self._best(arms)) is None:
                return None
            left = order
        if team == "xclip":
            self._cheaper = next((drawn[int(i)] for i in left if drawn[int(i)]["target"] != "ema"), None)
        return int(left[0])

    def _final(self, name: str, steps: int) -> Arm:
        """A finalist or a control that takes `steps` steps."""
        clip, ours = self._settings("clip"), self._settings("xclip")
        trained, without = spaces.training(clip, steps), self._cheaper or ours
        equal = {"objective.clip.positives": "caption", "data.spread_duplicate_captions": False}
        shuffled = spaces.xclip(ours, steps, self.head, shuffled=True)
        known = {
            "clip": ("CLIP", "core", "clip", trained),
            "positives": ("CLIP, equal captions match", "controls", "clip", trained | equal),
            "xclip": ("xCLIP", "core", "xclip", spaces.xclip(ours, steps, self.head)),
            "cheaper": ("xCLIP without a teacher", "controls", "xclip", spaces.xclip(without, steps, self.head)),
            "shuffled": ("xCLIP, shuffled pseudo-labels", "controls", "xclip", shuffled),
        }
        if name in known:
            return arm_of(f"final_{name}", *known[name], SEEDS)
        changes = spaces.rival(name, clip, steps, self.head)
        return arm_of(f"final_{name}", f"CLIP, {spaces.RIVALS[name]}", "controls", "clip", changes, SEEDS)

    def _declare_finals(self) -> bool:
        """Declare finalists and controls at equal cost; returns whether their costs are known."""
        clock, complete = self._final("clip", FINAL_STEPS), True
        more = ("cheaper",) if self._cheaper not in (None, self._settings("xclip")) else ()
        for name in ("clip", "xclip", "shuffled", *spaces.RIVALS, *more, "positives"):
            arm = self._final(name, FINAL_STEPS)
            if not self._possible(arm):
                continue
            measured = self._final("xclip", FINAL_STEPS) if name == "shuffled" else arm
            ratio = 1.0 if name in _CLIPS_STEP else self._ratio(measured, clock)
            if ratio is not None:
                self._add(self._final(name, round(FINAL_STEPS / ratio)))
            complete = complete and (ratio is not None or name in more)  # nothing waits for an arm that no claim has
        self.to_measure = list({arm.name: (arm, against) for arm, against in self.to_measure}.values())
        return complete

    def _possible(self, arm: Arm) -> bool:
        """Whether the package has an arm's keys; nothing is declared."""
        if possible := self._add(arm):
            self.arms.pop()
        return possible

    def _wrong(
        self, arm: str, name: str, level: int, own: spaces.Settings, steps: int, section: str, seeds: Sequence[int]
    ) -> Arm:
        """An arm under wrong captions, `own` being its rate, warm-up and own key."""
        settings = {**self._settings(spaces.team_of(arm)), **({"smoothing": 0.0} if arm == "clip" else {}), **own}
        objective, noise = "clip", {"data.caption_noise": level / 100}
        if arm in ("xclip", "shuffled", "cheaper"):
            objective, changes = "xclip", spaces.xclip(settings, steps, self.head, shuffled=arm == "shuffled")
        elif arm == "nclip":  # a schedule of its weight has no meaning by itself
            changes = spaces.training(settings, steps) | spaces.clusters({**settings, "schedule": "constant"}, steps)
            objective, changes = "nclip", changes | spaces.head(self.head)
        elif arm in ("gce", "distilled", "superclip"):
            changes = spaces.rival(arm, settings, steps, self.head)
        else:
            changes = spaces.training(settings, steps)
        if arm == "siglip":
            objective, changes = "siglip", changes | {"objective.siglip.positives": settings["positives"]}
        if arm == "oracle":
            # Exchanged pairs are drawn at random, so that any share of clean pairs of this size is as good.
            noise = {"data.subset": 1 - level / 100}
        title = f"{spaces.WRONG_TITLES[arm]}, {level} %"
        return arm_of(name, title, section, objective, changes | noise, seeds)

    def _declare_wrong(self, level: int, arms: Sequence[str]) -> Sequence[str] | None:
        """Declare retuning and runs at a level; returns the best arms by validation, None while that is open."""
        clock = self._final("clip", FINAL_STEPS)
        complete, finals = True, {}
        for arm in arms:
            tried, candidates = {}, spaces.retuned(arm, self._settings(spaces.team_of(arm))["rate"])
            for i, own in enumerate(candidates, 1):
                name = f"tune{level}_{arm}_{i}"
                candidate = self._wrong(arm, name, level, own, RETUNING_STEPS, "factors", TUNING_SEEDS[:1])
                if self._add(candidate):
                    tried[str(i)] = candidate
            if not tried:
                continue
            order = self._best(tried)
            ratio = self._ratio(self._clocked(arm, tried["1"]), clock) if arm not in _CLIPS_STEP else 1.0
            if order is None or ratio is None:
                complete = False
                continue
            own = candidates[int(order[0]) - 1]
            self.retuned[f"wrong{level}_{arm}"] = own
            followers = [name for name, led in spaces.FOLLOWERS.items() if led == arm]
            for name in (arm, *(name for name in followers if level == LEVELS[0] or name in ADDED_AT_HALF)):
                settings = {} if name == "oracle" else own  # clean pairs have the recipe of clean pairs
                seeds = SEEDS if name in FIVE_SEEDS and level == LEVELS[0] else WRONG_SEEDS
                if cost := self.costs.get("final_cheaper") if name == "cheaper" else ratio:
                    steps = round(WRONG_STEPS / cost)
                    finals[name] = self._wrong(name, f"wrong{level}_{name}", level, settings, steps, "dose", seeds)
                    self._add(finals[name])
        compared = {arm: dataclasses.replace(finals[arm], seeds=WRONG_SEEDS) for arm in arms if arm in finals}
        order = self._best(compared) if complete else None
        return None if order is None else order[:BEST_AT_HALF]

    @staticmethod
    def _clocked(arm: str, like: Arm) -> Arm:
        """The arm by whose name the cost of a step is kept, for all levels."""
        return dataclasses.replace(like, name=f"wrong_{arm}")


def study_of(arms: Sequence[Arm], **more: Any) -> Study:
    """Return a study of these arms; `more` are further fields."""
    choose = Measure("choose", "rank among validation concepts", VALIDATION[0], "rank_gmean", higher=False, ratio=True)
    declared: dict[str, Any] = {
        "title": "xCLIP at its best against CLIP at its best, at equal cost",
        "about": (),
        "arms": tuple(arms),
        "changes": CHANGES,
        "validation": VALIDATION,
        "tests": icons.TESTS,
        "choose": choose,
        "measures": icons.MEASURES,
        "claims": (),
        "baseline": arms[0].name,
        "name": "duel",
        "seconds_per_pair": 1.2e-3,
    }
    return Study(**declared | more)


def read_costs(path: pathlib.Path) -> dict[str, float]:
    """Return {arm: ratio of its step to its clock's} of a costs.jsonl; the last line of an arm counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["arm"]: line["ratio"] for line in map(json.loads, lines)}
