"""How long runs take, from those that were measured, and the table of a study's arms."""

from collections.abc import Collection

from studies.declaration import SECTIONS
from studies.matrix import Matrix, Run, Snapshot
from studies.records import RunRecord

_EVALUATION = 60.0  # seconds, before any is measured


class Clock:
    """Estimates seconds of runs from the records of others: of the same arm, else of the same objective and batch."""

    def __init__(self, matrix: Matrix, snapshot: Snapshot) -> None:
        self._guess = matrix.study.seconds_per_pair
        self._records = [record for record in snapshot.records.values() if not record.error]

    def seconds(self, run: Run) -> float:
        """Return the estimate for a run, also for one that waits for its recipe."""
        config = run.config
        groups = (
            [r for r in self._records if r.arm == run.arm.name],
            [r for r in self._records if self._alike(r) == (config.objective.name, config.data.batch)],
            self._records,
        )
        speeds = next(
            (s for group in groups if (s := [v for r in group if (v := _per_pair(r)) is not None])), [self._guess]
        )
        sets = len({*config.eval.sets, *config.eval.final_sets})
        measured = [
            (len(_sets(r)), r.seconds["evaluation"]) for r in self._records if r.seconds["evaluation"] is not None
        ]
        same = [seconds for count, seconds in measured if count == sets] or [seconds for _, seconds in measured]
        evaluation = sum(same) / len(same) if same else _EVALUATION
        return config.steps * config.data.batch * sum(speeds) / len(speeds) + evaluation

    @staticmethod
    def _alike(record: RunRecord) -> tuple[str, int]:
        return record.config["objective.name"], record.config["data.batch"]


def _sets(record: RunRecord) -> set[str]:
    return {*record.config["eval.sets"], *record.config["eval.final_sets"]}


def _per_pair(record: RunRecord) -> float | None:
    seconds = record.seconds["training"]
    return None if seconds is None else seconds / (record.config["steps"] * record.config["data.batch"])


def selected(snapshot: Snapshot, only: Collection[str]) -> list[Run]:
    """Return the runs of sections and arms named in `only`, without repetitions of one config; all for an empty one."""
    runs = [run for run in snapshot.runs if not only or {run.arm.section, run.arm.name} & set(only)]
    first = {run.twin: run for run in reversed(runs)}
    return [run for run in runs if first[run.twin] is run]


def table(matrix: Matrix, snapshot: Snapshot, only: Collection[str]) -> str:
    """Return what --dry-run prints: a line for each arm with finished and missing runs and the hours of the latter."""
    clock, runs = Clock(matrix, snapshot), selected(snapshot, only)
    width = max((len(run.arm.name) for run in runs), default=4)
    lines = [f"{'arm':<{width}}  {'section':<9}{'runs':>5}{'done':>6}{'hours left':>12}"]
    total = dict.fromkeys(SECTIONS, 0.0)
    for name in dict.fromkeys(run.arm.name for run in runs):
        of_arm = [run for run in runs if run.arm.name == name]
        arm = of_arm[0].arm
        left = [run for run in of_arm if run.key not in snapshot.records]
        hours = sum(map(clock.seconds, left)) / 3600
        total[arm.section] += hours
        waits = f"  waits for tuning of {arm.tuned}" if any(not run.key for run in left) else ""
        lines.append(
            f"{name:<{width}}  {arm.section:<9}{len(of_arm):>5}{len(of_arm) - len(left):>6}{hours:>12.2f}{waits}"
        )
    lines += ["", *(f"{section:<9}{hours:>8.1f} hours" for section, hours in total.items() if hours)]
    return "\n".join([*lines, f"{'all':<9}{sum(total.values()):>8.1f} hours, one run at a time"])
