"""The study of photographs in stages; each is declared as soon as records and measured costs decide its arms.

study.md is the declaration. Names of arms begin with their stage: "defaults_", "pilot_", "search1_", "search2_",
"final_", "control_", "captions_", "batch_".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from scipy.stats import rankdata

from studies.declaration import Arm, Measure, Study
from studies.matrix import LoadConfig, Matrix
from studies.photographs.claims import BOTH_WAYS, CLAIMS
from studies.photographs.spaces import CONTROLS, TEAMS, TIMED, Settings, changes_of, clusters, training, xclip
from studies.records import RunRecord
from xclip_jax.config.load import load_config

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
TESTS = tuple(
    f"photographs/test_{name}"
    for name in (
        "unseen", "unseen_templates", "unseen_titles", "known", "known_templates", "known_titles", "colours",
        "retrieval", "retrieval_tight", "probe", "geometry",
    )
)  # fmt: skip
MEASURES = (
    Measure("unseen", "unseen kinds", "photographs/test_unseen"),
    Measure("unseen_templates", "unseen kinds, three templates", "photographs/test_unseen_templates"),
    Measure("unseen_titles", "unseen kinds, ten titles", "photographs/test_unseen_titles"),
    Measure("known", "known kinds", "photographs/test_known"),
    Measure("known_templates", "known kinds, three templates", "photographs/test_known_templates"),
    Measure("known_titles", "known kinds, ten titles", "photographs/test_known_titles"),
    Measure("colours", "colours", "photographs/test_colours"),
    Measure("to_text", "image to title, R@1", "photographs/test_retrieval", BOTH_WAYS[:1]),
    Measure("to_image", "title to image, R@1", "photographs/test_retrieval", BOTH_WAYS[1:]),
    Measure("retrieval", "retrieval, mean of both", "photographs/test_retrieval", BOTH_WAYS),
    Measure("retrieval_tight", "retrieval of tight captions", "photographs/test_retrieval_tight", BOTH_WAYS),
    Measure("kind", "probe of kind", "photographs/test_probe", ("kind/linear/top1",)),
    Measure("season", "probe of season", "photographs/test_probe", ("season/linear/top1",)),
    Measure("audience", "probe of audience", "photographs/test_probe", ("audience/linear/top1",)),
    Measure("knn", "neighbours, kind", "photographs/test_probe", ("kind/knn/top1",)),
    Measure("rank", "effective rank of features", "photographs/test_geometry", ("rank",)),
    Measure("clusters", "kind by cluster", "photographs/test_geometry", ("clusters/kind",)),
    Measure("kmeans", "kind by k-means of features", "photographs/test_geometry", ("kmeans/kind",)),
)


class PhotographsStudy(Study):
    """A study whose validation sets depend on an arm's training data."""

    def sets_of(self, arm: Arm) -> tuple[str, ...]:
        if arm.recipe.startswith(ICONS):
            return ICON_VALIDATION
        return CURVES if arm.tested else VALIDATION


class PhotographsMatrix(Matrix):
    """Runs of the study; probes of validation are evaluated only at the end of runs."""

    def config(self, arm: Arm, seed: int) -> ml_collections.ConfigDict:
        config = super().config(arm, seed)
        probes = tuple(name for name in config.eval.sets if name.endswith("_probe"))
        config.eval.sets = tuple(name for name in config.eval.sets if name not in probes)
        config.eval.sets_at_end = (*config.eval.sets_at_end, *probes)
        if not arm.name.startswith(("defaults_", "search")):
            config.eval.every = config.steps // EIGHTHS
        return config


def study_of(arms: Sequence[Arm]) -> PhotographsStudy:
    """Return a study of these arms."""
    return PhotographsStudy(
        title="Photographs with loose titles",
        arms=tuple(arms),
        changes={"log.every": 20},
        validation=VALIDATION,
        tests=TESTS,
        measures=MEASURES,
        claims=CLAIMS,
    )


def arm_of(name: str, title: str, objective: str, changes: Settings, seeds: Sequence[int], data: str = "") -> Arm:
    """Return an arm on the photographs; without `data`, such as "split=train,captions=tight", it is for choices."""
    recipe = f"{RECIPE}:objective={objective}{',' if data else ''}{data}"
    return Arm(name, title, recipe, changes, seeds, tested=bool(data))


# --- choices from records


def naming(record: RunRecord, name: str) -> float:
    """Return minus the logarithm of the mean rank of the right name, by the best of the model's similarities."""
    ranks = [r.value for r in record.results if (r.set, r.metric) == (name, "rank_gmean") and not r.group]
    return -math.log(min(ranks)) if ranks else -math.inf


def retrieval(record: RunRecord, name: str) -> float:
    """Return the mean of the recalls at 1 of both directions."""
    values = [record.value(name, metric) for metric in BOTH_WAYS]
    return -math.inf if None in values else float(np.mean(values))  # ty: ignore[no-matching-overload]


def values_of(record: RunRecord) -> tuple[float, ...]:
    """Return the measures for comparing candidates: naming of unseen and known kinds, retrieval, probe of kind."""
    probe = record.value(VALIDATION[3], "kind/linear/top1")
    values = naming(record, VALIDATION[0]), naming(record, VALIDATION[1]), retrieval(record, VALIDATION[2])
    return (*values, -math.inf if probe is None else probe)


def by_mean_rank(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Order candidates {name: measures} by the mean of their ranks, best first; a diverged run has -inf."""
    table = np.round(np.array(list(values.values()), float), 3)
    mean = np.stack([rankdata(-column) for column in table.T], axis=1).mean(axis=1)
    return [list(values)[i] for i in np.argsort(mean, kind="stable")]


def settles(record: RunRecord) -> bool:
    """Whether a run's validation moves by less than `SETTLED` points over its last quarter."""
    evaluations = record.evaluations
    steps = record.config["steps"]
    before = next((line for line in evaluations if line["step"] == steps * 6 // EIGHTHS), None)
    last = next((line for line in evaluations if line["step"] == steps), None)
    if before is None or last is None:
        return False
    names = [name for name in before if name != "step" and name in last]
    return bool(names) and all(abs(last[name] - before[name]) < SETTLED for name in names)


class Photographs:
    """The arms declared so far.

    Attributes:
      arms: all decided arms, in the order of the stages.
      to_measure: (arm, arm for comparison) whose costs decide later arms.
      length: steps of CLIP in finals; 0 while open.
      chosen: {team: settings of its winner}, as far as they are known.
    """

    def __init__(
        self, records: Mapping[str, RunRecord], costs: Mapping[str, float], load: LoadConfig = load_config
    ) -> None:
        """Declare all that `records` {key: run} and `costs` {arm: ratio of its step to CLIP's} decide."""
        self.records = records
        self.costs = costs
        self.arms: list[Arm] = [*_defaults(), *_pilots()]
        self.to_measure: list[tuple[Arm, Arm]] = []
        self.length = 0
        self.chosen: dict[str, Settings] = {}
        self._matrix = PhotographsMatrix(study_of(self.arms), load)
        self.length = self._pilot_length()
        if not self.length:
            return
        for team in TEAMS:
            winner = self._search(team)
            if winner is not None:
                self.chosen[team] = winner
        if len(self.chosen) == len(TEAMS):
            self._declare_tested()

    def record(self, arm: Arm, seed: int) -> RunRecord | None:
        """Return the finished run of an arm, or None."""
        return self.records.get(self._matrix.run(arm, seed).key)

    def done(self, arm: Arm) -> int:
        """Return the number of an arm's finished runs."""
        return sum(self.record(arm, seed) is not None for seed in arm.seeds)

    def finished(self, arm: Arm) -> list[RunRecord] | None:
        """Return the runs of an arm, or None while some are missing."""
        finished = [self.record(arm, seed) for seed in arm.seeds]
        runs = [record for record in finished if record is not None]
        return runs if len(runs) == len(finished) else None

    def _best(self, arms: Mapping[str, Arm]) -> list[str] | None:
        """Return the keys of `arms` by `by_mean_rank`; None while a run is missing."""
        means = {}
        for key, arm in arms.items():
            runs = self.finished(arm)
            if runs is None:
                return None
            means[key] = np.mean([values_of(run) for run in runs], axis=0)
        return by_mean_rank(means)

    def _pilot_length(self) -> int:
        """Return the shortest length at which a pilot settles, `FALLBACK` if none does, 0 while pilots are missing."""
        for arm, steps in zip(_pilots(), LENGTHS, strict=True):
            runs = self.finished(arm)
            if runs is None:
                return 0
            if all(map(settles, runs)):
                return steps
        return FALLBACK

    def _search(self, team: str) -> Settings | None:
        """Declare both rounds of a team as far as they are decided, and return the winner's settings."""
        left = [str(i) for i in range(len(TEAMS[team]))]
        rounds = ((1, len(left), self.length // 2, TUNING_SEEDS[:1]), (2, KEPT, self.length, TUNING_SEEDS[1:]))
        for number, kept, steps, seeds in rounds:
            arms = {}
            for i in left[:kept]:
                changes = changes_of(team, TEAMS[team][int(i)], steps)
                name = f"search{number}_{team}_{int(i) + 1}"
                arms[i] = arm_of(name, f"{team} {int(i) + 1}", team, changes, seeds)
            self.arms += arms.values()
            order = self._best(arms)
            if order is None:
                return None
            left = order
        return TEAMS[team][int(left[0])]

    def _steps(self, name: str, make: Any) -> int | None:
        """Return the steps of an arm that takes as long as CLIP; None, and a note, while its cost is not measured."""
        if name not in self.costs:
            self.to_measure.append((make(self.length), self._clip(self.length)))
            return None
        return round(self.length / self.costs[name])

    def _clip(self, steps: int) -> Arm:
        return arm_of("final_clip", "CLIP", "clip", training(self.chosen["clip"], steps), SEEDS, "split=train")

    def _xclip(self, steps: int) -> Arm:
        changes = xclip(self.chosen["xclip"], steps)
        return arm_of("final_xclip", "xCLIP", "xclip", changes, SEEDS, "split=train")

    def _control(self, name: str, steps: int) -> Arm:
        title, objective, team, own = CONTROLS[name]
        settings = self.chosen[team]
        changes = training(settings, steps)
        if name in ("shuffled", "nclip"):
            changes |= clusters(settings, shuffled=name == "shuffled")
        if name == "shuffled":
            changes = xclip(settings, steps, shuffled=True)
        if name == "second_head":
            options = {"label_smoothing": settings["smoothing"]}
            plugin = own["objective.plugins"]["second"] | options
            own = own | {"objective.plugins": {"second": plugin}}
        return arm_of(f"control_{name}", title, objective, changes | own, CONTROL_SEEDS, "split=train")

    def _declare_tested(self) -> None:
        """Declare the tested arms, as far as their costs are known."""
        steps = self._steps("final_xclip", self._xclip)
        self.arms.append(self._clip(self.length))
        if steps is not None:
            self.arms.append(self._xclip(steps))
        for name in CONTROLS:
            of_control = self.length
            if name in TIMED:
                measured = self._steps(f"control_{name}", lambda n, name=name: self._control(name, n))
                if measured is None:
                    continue
                of_control = measured
            self.arms.append(self._control(name, of_control))
        if steps is None:
            return
        team_steps = {"clip": self.length, "xclip": steps}
        self.arms += self._captions(team_steps)
        self.arms += self._batches(team_steps)

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
                arms.append(arm_of(name, f"{team}, {captions}", team, changes, seeds, data))
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
                arms.append(arm_of(name, f"{team}, batch {batch}", team, changes, CONTROL_SEEDS, "split=train"))
        return arms


def _defaults() -> list[Arm]:
    """Return CLIP at rates and smoothings that `small` may choose, on both corpora."""
    arms = []
    for lr in RATES:
        for smoothing in SMOOTHINGS:
            own = {"lr": lr, "warmup": 0.6, "smoothing": smoothing}
            name = f"{lr:g}_{smoothing:g}"
            title = f"rate {lr:g}, smoothing {smoothing:g}"
            changes = training(own, DEFAULT_STEPS)
            arms.append(arm_of(f"defaults_photographs_{name}", title, "clip", changes, TUNING_SEEDS))
            icons = training(own, ICON_STEPS) | {"optim.name": "muon", "optim.weight_decay": 0.05}
            recipe = f"{ICONS}:objective=clip"
            arms.append(Arm(f"defaults_icons_{name}", title, recipe, icons, TUNING_SEEDS, tested=False))
    return arms


def _pilots() -> list[Arm]:
    """Return CLIP at the trial's better settings, of several lengths."""
    own = {"lr": 4e-3, "warmup": 0.6}
    return [
        arm_of(f"pilot_{steps}", f"CLIP, {steps:,} steps", "clip", training(own, steps), TUNING_SEEDS[:1])
        for steps in LENGTHS
    ]


def regrets(records: Mapping[str, Sequence[RunRecord]]) -> dict[str, dict[str, float]]:
    """Return {"0.004_0": {"photographs, unseen kinds": points behind the best setting}} of runs by `_defaults` arm."""
    of_corpus = {
        "photographs": {
            "unseen kinds": (VALIDATION[0], ("top1",)),
            "known kinds": (VALIDATION[1], ("top1",)),
            "retrieval": (VALIDATION[2], BOTH_WAYS),
            "probe of kind": (VALIDATION[3], ("kind/linear/top1",)),
        },
        "icons": {
            "unseen concepts": (ICON_VALIDATION[0], ("top1",)),
            "retrieval": (ICON_VALIDATION[1], BOTH_WAYS),
            "probe": (ICON_VALIDATION[2], ("",)),
        },
    }
    behind: dict[str, dict[str, float]] = {}
    for corpus, measures in of_corpus.items():
        names = [name for name in records if name.startswith(f"defaults_{corpus}_")]
        for measure, (set_name, metrics) in measures.items():
            means = {
                name: float(np.mean([run.value(set_name, metric) for run in records[name] for metric in metrics]))
                for name in names
            }
            for name, mean in means.items():
                setting = name.removeprefix(f"defaults_{corpus}_")
                behind.setdefault(setting, {})[f"{corpus}, {measure}"] = max(means.values()) - mean
    return behind
