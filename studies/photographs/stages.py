"""The study of photographs in stages; each is declared as soon as records and measured costs decide its arms.

study.md is the declaration. Names of arms begin with their stage: "defaults_", "pilot_", "search1_", "search2_",
"final_", "control_", "captions_", "batch_".
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from studies.declaration import Arm, Measure, Study
from studies.matrix import Matrix
from studies.photographs.claims import BOTH_WAYS, CLAIMS
from studies.photographs.spaces import CONTROLS, TEAMS, TIMED, TITLES, Settings, changes_of, in_words
from studies.records import RunRecord

RECIPE, ICONS = "studies/photographs/recipe.py", "studies/icons/recipe.py"
SEEDS, CONTROL_SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2), (100, 101, 102)
DEFAULT_STEPS, ICON_STEPS = 800, 1000
LENGTHS, FALLBACK, SETTLED = (800, 1600, 3200), 1600, 1.0  # steps of pilots; without an answer; points
EIGHTHS = 8  # evaluations of a run whose curve is kept
RATES, SMOOTHINGS = (4e-3, 8e-3), (0.0, 0.1, 0.2)
BATCHES = (64, 512)
KEPT = 4  # candidates of each team in the second round

VALIDATION = tuple(f"photographs/validation_{name}" for name in ("unseen", "known", "retrieval", "probe"))
ICON_VALIDATION = tuple(f"icons/validation_{name}" for name in ("concepts", "retrieval", "probe"))
CURVES = VALIDATION[1:3]  # of runs that train on all kinds
PROBE = ("kind/linear/top1",)
MEASURES = (
    Measure("unseen", "unseen kinds", "photographs/test_unseen"),
    Measure("unseen_mean", "unseen kinds, mean over kinds", "photographs/test_unseen", ("mean_per_class",)),
    Measure("unseen_templates", "unseen kinds, three templates", "photographs/test_unseen_templates"),
    Measure("unseen_titles", "unseen kinds, ten titles", "photographs/test_unseen_titles"),
    Measure("known", "known kinds", "photographs/test_known"),
    Measure("known_mean", "known kinds, mean over kinds", "photographs/test_known", ("mean_per_class",)),
    Measure("known_templates", "known kinds, three templates", "photographs/test_known_templates"),
    Measure("known_titles", "known kinds, ten titles", "photographs/test_known_titles"),
    Measure("colours", "colours", "photographs/test_colours"),
    Measure("to_text", "image to title, R@1", "photographs/test_retrieval", BOTH_WAYS[:1]),
    Measure("to_image", "title to image, R@1", "photographs/test_retrieval", BOTH_WAYS[1:]),
    Measure("retrieval", "retrieval, mean of both", "photographs/test_retrieval", BOTH_WAYS),
    Measure("retrieval_tight", "retrieval of tight captions", "photographs/test_retrieval_tight", BOTH_WAYS),
    Measure("kind", "probe of kind", "photographs/test_probe", PROBE),
    Measure("season", "probe of season", "photographs/test_probe", ("season/linear/top1",)),
    Measure("audience", "probe of audience", "photographs/test_probe", ("audience/linear/top1",)),
    Measure("knn", "neighbours, kind", "photographs/test_probe", ("kind/knn/top1",)),
    Measure("rank", "effective rank of features", "photographs/test_geometry", ("rank",)),
    Measure("clusters", "kind by cluster", "photographs/test_geometry", ("clusters/kind",)),
    Measure("kmeans", "kind by k-means of features", "photographs/test_geometry", ("kmeans/kind",)),
)
TESTS = tuple(dict.fromkeys(measure.set for measure in MEASURES))


def arm_of(name: str, title: str, objective: str, changes: Settings, seeds: Sequence[int], data: str = "") -> Arm:
    """Return an arm on the photographs; without `data`, such as "split=train,captions=tight", it is for choices.

    Probes of validation are evaluated only at the end of a run.
    """
    recipe = f"{RECIPE}:objective={objective}{',' if data else ''}{data}"
    own: Settings = {"eval.sets": VALIDATION[:3], "eval.sets_at_end": VALIDATION[3:]}
    if data:
        own = {"eval.sets": CURVES, "eval.sets_at_end": TESTS}
    if not name.startswith("search"):  # the shortest pilot's run is that of a default setting
        own["eval.every"] = changes["steps"] // EIGHTHS
    return Arm(name, title, recipe, own | changes, seeds, tested=bool(data))


# --- choices from records


def values_of(record: RunRecord, own: bool = False) -> list[float]:
    """Return the measures for comparing candidates: naming of unseen and known kinds, retrieval, probe of kind.

    Naming is minus the logarithm of the mean rank of the right name, by the best of the model's similarities or, with
    `own`, by that of the embeddings. A diverged run, or a value that is not finite, has minus infinity.
    """
    values: list[float | None] = []
    for name in VALIDATION[:2]:
        ranks = [
            r.value
            for r in record.results
            if (r.set, r.metric) == (name, "rank_gmean") and not r.group and not (own and r.score)
            if math.isfinite(r.value)
        ]
        values.append(-math.log(min(ranks)) if ranks else None)
    values += [record.mean(VALIDATION[2], BOTH_WAYS), record.mean(VALIDATION[3], PROBE)]
    return [-math.inf if value is None else value for value in values]


def by_mean_rank(values: Sequence[Sequence[float]]) -> list[int]:
    """Order candidates, of which each has several `values`, by the mean of their ranks, best first."""
    table = np.round(np.array(values, float), 3)
    mean = np.stack([rankdata(-column) for column in table.T], axis=1).mean(axis=1)
    return np.argsort(mean, kind="stable").tolist()


def both_heads_are_better(runs: Sequence[RunRecord]) -> bool:
    """Whether the sum of both similarities names unseen kinds better than the model's own one, by the mean rank."""
    both, own = ([run.value(VALIDATION[0], metric) for run in runs] for metric in ("both/rank_gmean", "rank_gmean"))
    ranks = [(x, y) for x, y in zip(both, own, strict=True) if x and y]  # of runs that have both and did not diverge
    return len(ranks) == len(runs) and math.prod(x / y for x, y in ranks) < 1


def settles(record: RunRecord) -> bool:
    """Whether a run's validation moves by less than `SETTLED` points over its last quarter."""
    lines: dict[float, dict[str, float]] = {}
    for line in record.evaluations:  # the last step has a line for each set
        lines.setdefault(line["step"], {}).update(line)
    steps = record.config["steps"]
    before = lines.get(steps * 6 // EIGHTHS, {})
    last = lines.get(steps, {})
    names = [name for name in before if name != "step" and name in last]
    return bool(names) and all(abs(last[name] - before[name]) < SETTLED for name in names)


class Photographs(Matrix):
    """The arms declared so far, in the order of the stages.

    Attributes:
      to_measure: (arm, arm for comparison) whose costs decide later arms.
      length: steps of CLIP in finals; 0 while open.
      chosen: {team: settings of its winner}, as far as they are known.
      by_own: the same if the last round's candidates were compared by the embeddings' similarity alone.
      both_heads: whether models with two similarities are read by the sum of both, which validation decides.
    """

    def __init__(self, records: Mapping[str, RunRecord], costs: Mapping[str, float]) -> None:
        """Declare all that `records` {key: run} and `costs` {arm: ratio of its step to CLIP's} decide."""
        study = Study(
            title="Photographs with loose titles",
            arms=[*_defaults(), *_pilots()],
            changes={"log.every": 20},
            validation=(*VALIDATION, *ICON_VALIDATION),
            measures=MEASURES,
            claims=CLAIMS,
        )
        super().__init__(study, records)
        self.costs = costs
        self.to_measure: list[tuple[Arm, Arm]] = []
        self.chosen: dict[str, Settings] = {}
        self.by_own: dict[str, Settings] = {}
        self.both_heads = False
        self.length = self._pilot_length()
        if not self.length:
            return
        for team in TEAMS:
            self._search(team)
        if len(self.chosen) == len(TEAMS):
            self._declare_tested()

    def values(self, name: str, measure: Measure) -> dict[int, float]:
        """Return {seed: value}, see `Matrix.values`; if `both_heads`, by both similarities of a model that has two."""
        by_both = dataclasses.replace(measure, metrics=[f"both/{metric or 'top1'}" for metric in measure.metrics])
        return (self.both_heads and super().values(name, by_both)) or super().values(name, measure)

    def complete(self, arm: Arm) -> list[RunRecord]:
        """Return the runs of an arm; none while some are missing."""
        runs = list(self.finished(arm.name).values())
        return runs if len(runs) == len(arm.seeds) else []

    def _pilot_length(self) -> int:
        """Return the shortest length at which a pilot settles, `FALLBACK` if none does, 0 while pilots are missing."""
        for arm, steps in zip(_pilots(), LENGTHS, strict=True):
            runs = self.complete(arm)
            if not runs:
                return 0
            if all(map(settles, runs)):
                return steps
        return FALLBACK

    def _search(self, team: str) -> None:
        """Declare both rounds of a team as far as they are decided, and choose the winner."""
        left = list(range(len(TEAMS[team])))
        for number, steps, seeds in ((1, self.length // 2, TUNING_SEEDS[:1]), (2, self.length, TUNING_SEEDS[1:])):
            arms = []
            for i in left:
                changes = changes_of(team, TEAMS[team][i], steps)
                title = f"{TITLES[team]}, {in_words(TEAMS[team][i])}, {steps:,} steps"
                arms.append(arm_of(f"search{number}_{team}_{i + 1}", title, team, changes, seeds))
            self.study.arms.extend(arms)
            runs = [self.complete(arm) for arm in arms]
            if not all(runs):
                return
            best, best_by_own = (
                by_mean_rank([np.mean([values_of(run, own) for run in of_arm], axis=0) for of_arm in runs])
                for own in (False, True)
            )
            self.by_own[team] = TEAMS[team][left[best_by_own[0]]]
            left = [left[i] for i in best][:KEPT]
        self.chosen[team] = TEAMS[team][left[0]]
        if team == "xclip":
            winner = f"search2_{team}_{left[0] + 1}"
            self.both_heads = both_heads_are_better(self.complete(next(arm for arm in arms if arm.name == winner)))

    def _equal_time(self, make: Callable[[int], Arm]) -> int:
        """Return the steps of an arm that takes as long as CLIP; 0, and a note, while its cost is not measured."""
        arm = make(self.length)
        if arm.name in self.costs:
            return round(self.length / self.costs[arm.name])
        self.to_measure.append((arm, self._final("clip", self.length)))
        return 0

    def _final(self, team: str, steps: int) -> Arm:
        changes = changes_of(team, self.chosen[team], steps)
        return arm_of(f"final_{team}", TITLES[team], team, changes, SEEDS, "split=train")

    def _control(self, name: str, steps: int) -> Arm:
        title, objective, team, own = CONTROLS[name]
        settings = self.chosen[team]
        changes = changes_of(objective, settings, steps) | own
        if name == "second_head":
            changes["objective.plugins.second.label_smoothing"] = settings["smoothing"]
        if name == "detached_head":  # xCLIP but for the gradient
            changes["objective.terms"] = {"clip": round(1 - settings["weight"], 6), "detached": settings["weight"]}
            changes["objective.plugins.detached.tau"] = settings["tau"]
        # The head of weight 0 changes nothing, so that one seed shows it; see study.md on tokens.
        seeds = {"untrained_head": CONTROL_SEEDS[:1], "tokens": SEEDS}.get(name, CONTROL_SEEDS)
        return arm_of(f"control_{name}", title, objective, changes, seeds, "split=train")

    def _declare_tested(self) -> None:
        """Declare the tested arms, as far as their costs are known."""
        steps = {"clip": self.length, "xclip": self._equal_time(functools.partial(self._final, "xclip"))}
        self.study.arms.extend(self._final(team, of_team) for team, of_team in steps.items() if of_team)
        for name in CONTROLS:
            make = functools.partial(self._control, name)
            like_xclip = name == "detached_head"
            of_control = self._equal_time(make) if name in TIMED else steps["xclip" if like_xclip else "clip"]
            if of_control:
                self.study.arms.append(make(of_control))
        if steps["xclip"]:
            self.study.arms.extend([*self._captions(steps), *self._batches(steps)])

    def _captions(self, steps: Mapping[str, int]) -> list[Arm]:
        """Arms on tight captions and on half of them tight; equal captions match, since most are repeated."""
        arms = []
        equal = {"objective.clip.positives": "caption"}
        cases = (("tight", SEEDS, equal), ("half", CONTROL_SEEDS, equal), ("tight", CONTROL_SEEDS, {}))
        for captions, seeds, own in cases:
            for team in TEAMS:
                name = f"captions_{captions}{'' if own else '_pairs'}_{team}"
                changes = changes_of(team, self.chosen[team], steps[team]) | own
                data = f"split=train,captions={captions}"
                title = f"{TITLES[team]}, {captions} captions{'' if own else ', equal ones not matching'}"
                arms.append(arm_of(name, title, team, changes, seeds, data))
        return arms

    def _batches(self, steps: Mapping[str, int]) -> list[Arm]:
        """Arms of other batches at equal samples; the rate grows with the root of the batch."""
        arms = []
        for batch in BATCHES:
            for team in TEAMS:
                settings = self.chosen[team]
                scaled = settings | {"lr": settings["lr"] * math.sqrt(batch / 256)}
                changes = changes_of(team, scaled, round(steps[team] * 256 / batch)) | {"data.batch": batch}
                name = f"batch_{batch}_{team}"
                arms.append(arm_of(name, f"{TITLES[team]}, batch {batch}", team, changes, CONTROL_SEEDS, "split=train"))
        return arms


def _defaults() -> list[Arm]:
    """Return CLIP at rates and smoothings that `small` may choose, on both corpora."""
    arms = []
    of_icons = {
        "eval.sets": ICON_VALIDATION[:2], "eval.sets_at_end": ICON_VALIDATION[2:], "optim.name": "muon",
        "optim.weight_decay": 0.05,
    }  # fmt: skip
    for lr, smoothing in itertools.product(RATES, SMOOTHINGS):
        settings = {"lr": lr, "warmup": 0.6, "smoothing": smoothing}
        name = f"{lr:g}_{smoothing:g}"
        title = f"rate {lr:g}, smoothing {smoothing:g}"
        changes = changes_of("clip", settings, DEFAULT_STEPS)
        arms.append(arm_of(f"defaults_photographs_{name}", title, "clip", changes, TUNING_SEEDS))
        icons = changes_of("clip", settings, ICON_STEPS) | of_icons
        arms.append(Arm(f"defaults_icons_{name}", title, ICONS, icons, TUNING_SEEDS, tested=False))
    return arms


def _pilots() -> list[Arm]:
    """Return CLIP at the trial's better settings, of several lengths."""
    own = {"lr": 4e-3, "warmup": 0.6}
    return [
        arm_of(f"pilot_{steps}", f"CLIP, {steps:,} steps", "clip", changes_of("clip", own, steps), TUNING_SEEDS[:1])
        for steps in LENGTHS
    ]
