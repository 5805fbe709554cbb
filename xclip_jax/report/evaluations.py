"""Evaluations of a run: joined by step, the newest of each set, and what the sets are called on a page."""

import collections
from collections.abc import Iterable

from xclip_jax.evaluators import tables
from xclip_jax.evaluators.results import Result

Key = tuple[str, str]  # family and set
Evaluation = tuple[int, list[Result]]  # step and results


def by_step(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Return one evaluation for each step: results.jsonl has the last evaluation set by set."""
    joined: dict[int, dict[str, Result]] = {}
    for step, results in evaluations:
        joined.setdefault(step, {}).update({result.name: result for result in results})
    return [(step, list(joined[step].values())) for step in sorted(joined)]


def newest(evaluations: Iterable[Evaluation]) -> tuple[list[Result], dict[Key, int]]:
    """Return the results of each set at the newest step that has it, and {(family, set): that step}.

    Args:
      evaluations: of equal steps the last one counts.
    """
    of_sets: dict[Key, tuple[int, list[Result]]] = {}
    for step, results in sorted(evaluations, key=lambda evaluation: evaluation[0]):
        sets: dict[Key, list[Result]] = {}
        for result in results:
            sets.setdefault((result.family, result.set), []).append(result)
        # Metrics that are not numbers are absent: what is left of such a set replaces nothing.
        of_sets |= {key: (step, own) for key, own in sets.items() if tables.rows(own)}
    return [result for _, own in of_sets.values() for result in own], {key: step for key, (step, _) in of_sets.items()}


def labels(rows: Iterable[tables.Row]) -> dict[Key, str]:
    """Return {(family, name) of each row: its short name}, with the family's title where two rows have one name."""
    keys = list(dict.fromkeys((row.family, row.name) for row in rows))
    short = tables.shorten(name for _, name in keys)
    counts = collections.Counter(short[name] for _, name in keys)
    return {
        (family, name): f"{short[name]} ({tables.title(family)})" if counts[short[name]] > 1 else short[name]
        for family, name in keys
    }
