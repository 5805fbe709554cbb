"""The runs of a declared study with their configs, and the values of finished ones."""

import dataclasses
import functools
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from studies.declaration import Arm, Measure, Study
from studies.records import RunRecord, config_key, full, short
from xclip_jax.config import schema
from xclip_jax.config.load import check_keys, load_config
from xclip_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed of an arm, with its config, without a folder, and the config's key, see `records.config_key`."""

    arm: Arm
    seed: int
    config: ml_collections.ConfigDict
    key: str


class Matrix:
    """The runs of a study, and the records of finished ones, {key: record}."""

    def __init__(self, study: Study, records: Mapping[str, RunRecord]) -> None:
        self.study = study
        self.records = records
        self._recipes: dict[str, ml_collections.ConfigDict] = {}
        self._runs: dict[tuple[str, int], Run] = {}

    def runs(self, only: Collection[str] = ()) -> list[Run]:
        """Return the runs of the arms named in `only`, by default of all, in the order in which they are run.

        First seeds come before second ones, so that finished runs can be compared at any time. Equal configs are listed
        once.
        """
        arms = [arm for arm in self.study.arms if not only or arm.name in only]
        most = max((len(arm.seeds) for arm in arms), default=0)
        runs: dict[str, Run] = {}
        for i in range(most):
            for arm in arms:
                for seed in arm.seeds[i : i + 1]:
                    run = self.run(arm, seed)
                    runs.setdefault(run.key, run)
        return list(runs.values())

    def run(self, arm: Arm, seed: int) -> Run:
        identity = (arm.name, seed)
        if identity not in self._runs:
            config = self.config(arm, seed)
            self._runs[identity] = Run(arm, seed, config, config_key(config.to_dict()))
        return self._runs[identity]

    def config(self, arm: Arm, seed: int) -> ml_collections.ConfigDict:
        """Make the config of a run.

        Raises:
          UserError: an unknown key, a forbidden value, or forbidden sets.
        """
        if arm.recipe not in self._recipes:
            self._recipes[arm.recipe] = load_config(arm.recipe)
        config = self._recipes[arm.recipe].copy_and_resolve_references()
        changes = {"eval.report": False, "eval.every": 0, "seed": seed, **self.study.changes, **arm.changes}
        try:
            for name, value in changes.items():
                _set(config, name, full(value))
            config.checkpoint.every = max(config.steps // 4, 1)
            config.checkpoint.keep = 1
            schema.resolve(config)
        except UserError as error:
            raise UserError(f"arm {arm.name!r}: {error}") from error
        choosing = [*config.eval.sets, *(() if arm.tested else config.eval.sets_at_end)]
        others = set(short(choosing)) - set(self.study.validation)
        if others:
            raise UserError(
                f"arm {arm.name!r} would be evaluated on {min(others)!r} before its end or to choose by it; only the "
                f"sets of `validation` are for that: {', '.join(self.study.validation)}."
            )
        return config

    def finished(self, name: str) -> dict[int, RunRecord]:
        """Return {seed: record} of an arm; none of an undeclared arm."""
        arm = self.study.arm(name)
        keys = {seed: self.run(arm, seed).key for seed in arm.seeds} if arm else {}
        return {seed: self.records[key] for seed, key in keys.items() if key in self.records}

    def values(self, name: str, measure: Measure) -> dict[int, float]:
        """Return {seed: value} of an arm's finished runs, logarithms for a ratio; runs that diverged have no value."""
        means = {seed: record.mean(measure.set, measure.metrics) for seed, record in self.finished(name).items()}
        known = {seed: mean for seed, mean in means.items() if mean is not None}
        return {seed: math.log(mean) for seed, mean in known.items()} if measure.ratio else known

    def missing(self) -> dict[str, int]:
        """Return {arm: number of its missing runs}, without complete arms."""
        left = {arm.name: len(arm.seeds) - len(self.finished(arm.name)) for arm in self.study.arms}
        return {name: number for name, number in left.items() if number}


def _set(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    """Set a dotted key; groups such as objective.terms are replaced."""
    check_keys(config, [f"--config.{name}"])
    *path, last = name.split(".")
    group = functools.reduce(operator.getitem, path, config)
    try:
        group[last] = ml_collections.ConfigDict(value) if isinstance(value, Mapping) else value
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be {value!r}: {error}") from error
