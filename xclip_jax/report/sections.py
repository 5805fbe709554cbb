"""The sections of a page of one or more runs, contents for the macros of the template `page.html`."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import tables
from xclip_jax.objectives import Check
from xclip_jax.objectives.similarity import cluster_similarity
from xclip_jax.report import charts
from xclip_jax.report.charts import chart, decimals, metric_lines, term_chart
from xclip_jax.report.collect import Record, Run, Warnings, short_set_names
from xclip_jax.report.examples import Gallery, Prediction, SearchResult

_RANK = (("rank/img", "images"), ("rank/txt", "texts"))


class Section(NamedTuple):
    """A part of the page: content for the template's macro `id`, and the reason to show if it is empty."""

    id: str
    title: str
    content: Any = None
    missing: str = ""


class Panel(NamedTuple):
    """Cards below a heading and a text, with one block per run.

    A block is (run, `Prediction`, number of names), or for `searches` (run, `SearchResult`, `Gallery`).
    """

    title: str
    text: str
    cards: list[list[tuple[Run, Any, Any]]]
    searches: bool = False


def sections(runs: Sequence[Run], step: int | None) -> list[Section]:
    """Return the sections of a page; several runs are compared at `step`, by default at their newest evaluation."""
    first, *others = runs
    shown = [names(runs), search(runs)]
    if others:
        compared = [(run, *_differences(first, run, runs, step)) for run in others]
        return [results(runs), Section("differences", "Differences", compared), *shown, training(runs), settings(runs)]
    record = first.record
    if cluster_similarity(record.objective.similarities):
        shown.append(Section("clusters", "Clusters", first.examples.clusters, _reason(runs)))
    return [*shown, results(runs), training(runs), health(record), about(record)]


def _reason(runs: Sequence[Run]) -> str:
    sentences = dict.fromkeys(sentence for run in runs for sentence in run.examples.missing)
    if sentences:
        return " ".join(sentences)
    folders = " ".join(str(run.record.folder) for run in runs)
    remedy = f"Add some to eval.sets_at_end, or run: xclip-jax report {folders} --sets NAME,NAME"
    return f"No evaluation set has images and texts. {remedy}"


def names(runs: Sequence[Run]) -> Section:
    """Return zero-shot predictions for each set of the first run."""
    panels = []
    for first in runs[0].examples.named:
        same = [(run, named) for run in runs for named in run.examples.named if named.title == first.title]
        cards = _cards([(run, named.guesses, named.num_classes) for run, named in same])
        panels.append(Panel(first.title, first.sentence, cards))
    reason = f"No zero-shot set was evaluated for this page. {_reason(runs)}"
    return Section("names", "Zero-shot classification", panels, reason)


def search(runs: Sequence[Run]) -> Section:
    """Return retrieval in both directions and searches, if present for all runs."""
    panels = []
    retrieved = [(run, run.examples.retrieved) for run in runs if run.examples.retrieved]
    if len(retrieved) == len(runs):
        first = retrieved[0][1]
        n = len(first.gallery.images)
        text = f"Captions of {first.title} with the top of {n:,} images; a green frame is right."
        cards = _searches([(run, predicted.by_text, predicted.gallery) for run, predicted in retrieved])
        panels.append(Panel("Text to image", text, cards, searches=True))
        text = f"Images with the top of {len(first.texts):,} captions; green is right. Bars: {first.meaning}."
        cards = _cards([(run, predicted.by_image, len(predicted.texts)) for run, predicted in retrieved])
        panels.append(Panel("Image to text", text, cards))
    if all(run.examples.searches for run in runs):
        n = len(runs[0].examples.gallery.images)
        text = f"The same queries for every run, with the top of {n:,} test images, best first."
        cards = _searches([(run, run.examples.searches, run.examples.gallery) for run in runs])
        panels.append(Panel("Search by words", text, cards, searches=True))
    reason = f"No retrieval set was evaluated for this page. {_reason(runs)}"
    return Section("search", "Retrieval", panels, reason)


def _cards(columns: Sequence[tuple[Run, Sequence[Prediction], int]]) -> list[list[tuple[Run, Prediction, int]]]:
    """Return a card per image, with a block for each run with the same images as the first."""
    first = columns[0][1]
    same = [column for column in columns if [x.name for x in column[1]] == [x.name for x in first]]
    return [[(run, guesses[i], n) for run, guesses, n in same] for i in range(len(first))]


def _searches(columns: Sequence[tuple[Run, Sequence[SearchResult], Gallery]]) -> list[list[tuple[Run, Any, Gallery]]]:
    by_text = [(run, {result.text: result for result in results}, gallery) for run, results, gallery in columns]
    texts = [text for text in by_text[0][1] if all(text in results for _, results, _ in by_text)]
    return [[(run, results[text], gallery) for run, results, gallery in by_text] for text in texts]


def results(runs: Sequence[Run]) -> Section:
    """Return a table of each set's first metric, with one column per run, and all metrics as text."""
    measured = [{(row.family, row.name): row.shown[0] for row in tables.rows(run.record.results)} for run in runs]
    keys = dict.fromkeys(key for of_run in measured for key in of_run)
    if not keys:
        folder = runs[0].record.folder if len(runs) == 1 else "RUN"
        reason = f"None yet; evaluate with xclip-jax evaluate --checkpoint {folder} --suite NAME."
        return Section("results", "Results", missing=reason)
    short = short_set_names(runs)
    rows = []
    for key in keys:
        metric = next(of_run[key][0] for of_run in measured if key in of_run)
        column = [(run, of_run[key][1] if key in of_run else None) for run, of_run in zip(runs, measured, strict=True)]
        cells = [(result, run.record.step_of(result)) if result else None for run, result in column]
        of_data = {result.protocol.split_hash for _, result in column if result}
        label = metric.label + "; the runs' data differ" * (len(of_data) > 1)
        rows.append((short[key[1]], label, cells))
    texts = {run.name: tables.render(run.record.results) for run in runs if run.record.results}
    return Section("results", "Results", (rows, texts))


def _differences(
    first: Run, run: Run, runs: Sequence[Run], step: int | None
) -> tuple[list[dict[str, Any]], Sequence[str]]:
    """Return rows of a run's paired differences to the first, and sentences on incomparable sets."""
    refused: list[str] = []
    try:
        rows = tables.compare(str(first.record.folder), str(run.record.folder), step=step, refused=refused)
    except UserError as error:
        return [], [str(error)]
    short = tables.shorten([*short_set_names(runs), *(row["set"] for row in rows)])
    ends = [row.get(key, math.nan) for row in rows if row["unit"] != "rank" for key in ("difference", "low", "high")]
    end = max((abs(value) for value in ends if math.isfinite(value)), default=0.0)
    last = (first.record.steps, run.record.steps)
    refused += tables.prepared_differently(rows, first.name, run.name)
    return [_difference(row, short[row["set"]], end, last) for row in rows], refused


def _difference(row: Mapping[str, Any], name: str, end: float, last: tuple[int, int]) -> dict[str, Any]:
    """Return the cells of a row of `tables.compare`, with bars on an axis from -end to end.

    Results before the runs' last steps show their step.
    """
    ranks = row["unit"] == "rank"
    value = row["difference"]
    low = row.get("low", math.nan)
    high = row.get("high", math.nan)
    verdict = "not distinguishable"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) != ranks else "worse"  # of ranks the smaller is better
    steps = [row["step_a"], row["step_b"]]
    if steps == [*last]:
        steps = [None, None]
    drawn = end and not ranks
    return {
        "set": name,
        "metric": row["metric"],
        "values": [(decimals(row[side], ".1f"), step) for side, step in zip(("a", "b"), steps, strict=True)],
        "change": decimals(value, "+.1f"),
        "interval": f"{low:+.1f} to {high:+.1f}" if math.isfinite(low) else "",
        "verdict": verdict,
        # On an axis of 200 units; None if off the axis.
        "bar": [100 + 94 * v / end if drawn and math.isfinite(v) else None for v in (value, low, high)],
    }


def training(runs: Sequence[Run]) -> Section:
    """Return charts of the logged metrics over steps."""
    return Section("curves", "Training", charts.of_runs(runs), "No step is logged yet.")


def health(record: Record) -> Section:
    """Return lights and charts for failures declared by the objective's terms, and the rank of features."""
    if not record.training:
        return Section("health", "Health", missing="No step is logged yet.")
    terms = []
    drawn = []
    for name in record.objective.terms:
        warnings = Warnings.collect(record, name)
        judged = warnings.health
        if judged.checks:
            terms.append((judged.summary, [_light(check, warnings) for check in judged.checks]))
        drawn += [term_chart(curve, record.training, name) for curve in judged.curves]
    note = "Number of directions in which features vary over a batch; 1 is collapse. It does not raise an alarm."
    drawn.append(chart("Effective rank of features", metric_lines(record.training, _RANK), note=note))
    return Section("health", "Health", (terms, list(filter(None, drawn))))


def _light(check: Check, warnings: Warnings) -> dict[str, Any]:
    warning = warnings.last(check.name)
    light = {"check": check, "history": warnings.history(check.name)}
    if warning:
        return light | {"state": "alarm", "label": "alarm", "text": warning.partition(": ")[2]}
    light["text"] = f"{check.meaning} {check.measurement}"
    return light | ({"state": "", "label": "healthy"} if warnings.steps else {"state": "early", "label": "too early"})


def about(record: Record) -> Section:
    """Return the command, and versions, config and data as JSON."""
    environment = dict(record.environment)
    started_by = environment.pop("command", "")
    parts = {
        "Versions and machine": environment,
        "All keys of the config": schema.to_dict(record.config),
        "Training data": record.sources,
    }
    folded = {name: json.dumps(part, indent=2, sort_keys=True) for name, part in parts.items() if part}
    return Section("run", "This run", (started_by, folded))


def settings(runs: Sequence[Run]) -> Section:
    """Return the differing config keys, and each run's devices, commit and logged steps."""
    configs = [schema.flatten(schema.to_dict(run.record.config)) for run in runs]
    left_out = schema.keys_where(compared=False)
    keys = sorted({key for config in configs for key in config if key not in left_out})
    rows = {key: [config.get(key, "") for config in configs] for key in keys}
    differing = {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
    facts = {key: [run.record.environment.get(key, "") for run in runs] for key in ("devices", "commit")}
    facts["steps logged"] = [run.record.steps for run in runs]
    text = f"{len(differing)} of {len(keys):,} config keys differ, not counting logs, checkpoints and folders."
    return Section("settings", "What differs", (text, facts | differing))
