"""Comparison of two evaluations set by set, with bootstrap intervals of the differences, of ranks of their ratios."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from xclip_jax.errors import UserError
from xclip_jax.evaluators import results
from xclip_jax.evaluators.result import from_json
from xclip_jax.evaluators.statistics import bootstrap
from xclip_jax.evaluators.summary import shorten
from xclip_jax.run_folder import evaluation_file, not_found

# What two results must have in common.
_COMPARED_KEYS = ("split_hash", "version", "metric", "templates", "protocol")
# The least widths of a table's columns before the intervals.
_WIDTHS = (36, 24, 6, 8, 8, 8)


def compare(
    a: str, b: str, *, step: int | None = None, profile: str | None = None, refused: list[str] | None = None
) -> list[dict[str, Any]]:
    """Compare two evaluations set by set.

    Returns for each set {set, metric, unit, a, b, difference, low, high, step_a, step_b, profile}; the unit is that of
    `Result`. Ranks have "ratio", b / a, in place of the difference b - a. The interval, low to high, is the 95 %
    percentile bootstrap of the paired difference or ratio; absent for metrics that cannot be resampled.

    Args:
      a, b: runs' folders, or results files of `xclip_jax.evaluate`.
      step: of both; by default the newest that each file has.
      profile: of both; by default the last evaluated one of those that both files have for a set.
      refused: list to which a sentence is added for each set whose data or protocol differ; without it the first one is
        an error.

    Raises:
      UserError: a file that is missing or damaged, no set in common, or sets whose data or protocol differ.
    """
    (entries_a, items_a), (entries_b, items_b) = _read(a, step, profile), _read(b, step, profile)
    rows = []
    for name in dict.fromkeys(entry["set"] for entry in entries_a):
        of_a, of_b = ([entry for entry in entries if entry["set"] == name] for entries in (entries_a, entries_b))
        if not of_b:
            continue
        left, right = _pair(of_a, of_b)
        try:
            _check_comparable(left, right, f"in {a} and {b}")
        except UserError as error:
            if refused is None:
                raise
            refused.append(str(error))
            continue
        unit = _unit(left)
        ratio = unit == "rank"  # a geometric mean: half the rank is as good at 200 as at 20
        row = {
            "set": name,
            "metric": left["metric"],
            "unit": unit,
            "a": left["value"],
            "b": right["value"],
            "step_a": left["step"],
            "step_b": right["step"],
            "profile": left["profile"],
        }
        row |= {"ratio": right["value"] / left["value"]} if ratio else {"difference": right["value"] - left["value"]}
        rows.append(row | _interval(left, right, items_a, items_b, ratio=ratio))
    if not rows and not refused:
        raise UserError(f"{a} and {b} have no set in common; evaluate both with the same --suite.")
    return rows


def _read(path: str, step: int | None, profile: str | None) -> tuple[list[results.Entry], results.ItemsOf]:
    """Return the entries of one step, the newest by default, of the checkpoint and model that were evaluated last."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(not_found(path, "name the folder of a run, or a file of results."))
    file = evaluation_file(file) if file.is_dir() else file
    entries, items = results.read(file)
    if not entries:
        raise UserError(f"{file} has no results; evaluate again with --checkpoint.")
    entries = [entry for entry in entries if entry["checkpoint"] == entries[-1]["checkpoint"]]
    steps = sorted({entry["step"] for entry in entries})
    selected = steps[-1] if step is None else step
    if selected not in steps:
        raise UserError(f"{file} has no results of step {step}, only of {', '.join(map(str, steps))}.")
    entries = [entry for entry in entries if entry["step"] == selected]
    last = entries[-1]["fingerprint"]
    entries = [e for e in entries if e["fingerprint"] == last and profile in (None, e["profile"])]
    if not entries:
        raise UserError(f"{file} has no results of step {selected} and profile {profile!r}.")
    return entries, items


def _pair(lefts: Sequence[results.Entry], rights: Sequence[results.Entry]) -> tuple[results.Entry, results.Entry]:
    """Return the last entries of one profile, or else the last two."""
    pairs = [
        (left, right)
        for left in lefts
        for right in rights
        if (left["profile"], left["changes"]) == (right["profile"], right["changes"])
    ]
    return pairs[-1] if pairs else (lefts[-1], rights[-1])


def _check_comparable(left: results.Entry, right: results.Entry, files: str) -> None:
    """Raise `UserError` where the data or the protocol of two entries of a set differ."""
    # Within one profile images are resized as the profile, or else each model, defines it.
    resizing = ("preprocessing",) if left["profile"] != right["profile"] else ()
    for key in (*_COMPARED_KEYS, *resizing):
        if _comparable(left, key) != _comparable(right, key):
            raise UserError(
                f"{left['set']} is not the same {files}: {key} is {left.get(key)!r} and {right.get(key)!r}; "
                "evaluate both again with the same data and --profile."
            )


def _comparable(entry: results.Entry, key: str) -> Any:
    """Return the part of an entry's `key` that two models share; sizes and statistics of pixels belong to the model."""
    if key == "preprocessing":
        return re.sub(r"(?<=side) to \d+|, \d+ px, .*", "", entry.get(key, ""))
    return entry.get(key)


def _unit(entry: results.Entry) -> str:
    """Return the unit of an entry's metric, as in its records; files of earlier versions have none but percent."""
    return next((r.unit for r in from_json(entry.get("records", ())) if r.key == entry["metric"]), "%")


def _interval(
    left: results.Entry, right: results.Entry, items_a: results.ItemsOf, items_b: results.ItemsOf, *, ratio: bool
) -> dict[str, float]:
    """Return {"low", "high"} of the difference or ratio, or {} for a metric that cannot be resampled."""
    metric = f"{left['name']}/{left['metric']}"
    of_a, of_b = (items.get(entry["items"], {}) for items, entry in ((items_a, left), (items_b, right)))
    if metric not in of_a or metric not in of_b:
        return {}
    _, low, high = bootstrap(of_a[metric], of_b[metric], ratio=ratio)
    return {} if math.isnan(low) else {"low": low, "high": high}


def render(rows: Sequence[Mapping[str, Any]], a: str, b: str) -> str:
    """Return the rows of `compare` as a table, each difference in the unit of its row, and ratios after an "x".

    Columns are as wide as their longest cell; of paths of sets only the last parts are shown that distinguish them.
    A star marks those whose interval excludes equality.
    """
    lines = [f"{side.upper()}: {file}, step {rows[0][f'step_{side}']}" for side, file in (("a", a), ("b", b))]
    short = shorten(row["set"] for row in rows)
    table = [["set", "metric", "unit", "A", "B", "B - A", "95 % interval"]]
    for row in rows:
        ratio = "ratio" in row
        equal, number = (1, ".2f") if ratio else (0, "+.1f")
        change = f"x {row['ratio']:.2f}" if ratio else f"{row['difference']:+.1f}"
        interval = ""
        if "low" in row:
            star = " *" if row["low"] > equal or row["high"] < equal else ""
            interval = f"{row['low']:{number}} to {row['high']:{number}}{star}"
        values = (f"{row[key]:.{2 if ratio else 1}f}" for key in ("a", "b"))
        table.append([short[row["set"]], row["metric"], row["unit"], *values, change, interval])
    widths = [max(least, *(len(cells[i]) + 2 for cells in table)) for i, least in enumerate(_WIDTHS)]
    for cells in table:
        names = "".join(f"{cell:<{width}}" for cell, width in zip(cells[:3], widths[:3], strict=True))
        values = "".join(f"{cell:>{width}}" for cell, width in zip(cells[3:6], widths[3:], strict=True))
        lines.append(f"{names}{values}   {cells[6]}".rstrip())
    if any("ratio" in row for row in rows):
        lines.append("x: B / A, of ranks from 1; less is better")
    return "\n".join(lines)
